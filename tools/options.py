"""The command-line options that several commands share, named as llama.cpp names them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

DEFAULT_MODEL = "smollm2"

Model = Annotated[
    str,
    Argument(metavar="MODEL", help="GGUF file, alias (smollm2), hf:ORG/REPO/FILE.gguf or ORG/REPO:QUANT."),
]
System = Annotated[str | None, Option("--system", "-sys", metavar="TEXT", help="System prompt.")]
Temp = Annotated[
    float | None, Option("--temp", "--temperature", metavar="T", min=0.0, help="Temperature; 0 is greedy.")
]
TopK = Annotated[int | None, Option("--top-k", metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, Option("--top-p", metavar="P", help="Keep the likeliest up to this probability.")]
MinP = Annotated[float | None, Option("--min-p", metavar="P", help="Drop tokens below P times the likeliest.")]
RepeatPenalty = Annotated[
    float | None, Option("--repeat-penalty", metavar="X", help="Penalise the last 64 tokens; 1 is off.")
]
Seed = Annotated[int | None, Option("--seed", "-s", metavar="N", help="Same seed, same text; -1 is random.")]
Threads = Annotated[int | None, Option("--threads", "-t", metavar="N", min=1, help="CPU threads.")]
Context = Annotated[
    int | None,
    Option("--ctx", "--ctx-size", "-c", metavar="N", min=0, max=2**31, help="Context in tokens; 0 is the model's."),
]
Sparsity = Annotated[
    str,
    Option("--sparsity", metavar="MODE", help="Neurons computed: auto, dense, exact, threshold=D or predict."),
]
VramBudget = Annotated[
    str | None,
    Option("--vram-budget", metavar="B", help="Use the GPU, with at most B of its memory: 8GiB, 70%, auto."),
]
RequireGpu = Annotated[bool, Option("--require-gpu", help="Fail where the GPU cannot be used.")]
Cold = Annotated[
    str, Option("--cold", metavar="WHO", help="Computes what is not on the GPU: cpu, mapped (the GPU), auto.")
]
TraceFile = Annotated[
    Path | None, Option("--trace", metavar="FILE.json", help="Write a timeline of the CPU and the GPU.")
]
Lora = Annotated[
    list[str] | None,
    Option("--lora", metavar="FILE[=SCALE]", help="Add a LoRA adapter (GGUF), scaled; may be given several times."),
]
CacheTypeK = Annotated[
    str, Option("--cache-type-k", "-ctk", metavar="TYPE", help="Keys are kept as f16, q8_0 or q4_0.")
]
CacheTypeV = Annotated[
    str, Option("--cache-type-v", "-ctv", metavar="TYPE", help="Values are kept as f16, q8_0 or q4_0.")
]
Lookup = Annotated[
    int,
    Option("--lookup", metavar="N", min=0, max=16, help="Guess up to N tokens from the text so far, for speed."),
]
PromptCache = Annotated[
    Path | None,
    Option("--prompt-cache", metavar="FILE", help="Keep here what prompts begin with, for runs to come."),
]
Load = Annotated[
    str,
    Option("--load", metavar="HOW", help="Weights: copy into memory for speed, mmap (left in the file), auto."),
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]

Prompt = Annotated[str | None, Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads stdin.")]
PromptFile = Annotated[Path | None, Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")]


def adapters(given: list[str] | None) -> list[tuple[Path, float]]:
    """Paths and scales of --lora; without a scale, or where the whole is a file's name, it is 1."""
    found = []
    for text in given or []:
        path, _, number = text.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            path = ""
        found.append((Path(path), scale) if path and not Path(text).exists() else (Path(text), 1.0))
    return found


def sampling(
    temp: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repeat_penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """The options that were given, under SamplingParams' names; the others stay the model's own."""
    given = {
        "temperature": temp,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": None if seed == -1 else seed,
    }
    return {name: value for name, value in given.items() if value is not None}
