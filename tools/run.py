"""`hotcold run`: one completion, or one chat answer, on stdout."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, gpu, options
from .conversation import CHAT_LENGTH

if TYPE_CHECKING:
    from ..runtime.stats import Stats
    from ..runtime.usage import Usage

RAW_LENGTH = 256

Length = Annotated[
    int | None,
    typer.Option(
        "--n-predict",
        "-n",
        metavar="N",
        min=-1,
        help=f"Tokens at most; -1 is no limit. [{RAW_LENGTH}, with --chat {CHAT_LENGTH}]",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Use the model's chat template: the prompt is a message.")]
Special = Annotated[bool, typer.Option("--special", help="Parse control tokens in the prompt.")]
Timings = Annotated[bool, typer.Option("--stats", help="Print timings to stderr afterwards.")]


def run(
    model: options.Model,
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    chat: Chat = False,
    special: Special = False,
    system: options.System = None,
    n_predict: Length = None,
    temp: options.Temp = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    ctx: options.Context = None,
    sparsity: options.Sparsity = "auto",
    vram_budget: options.VramBudget = None,
    require_gpu: options.RequireGpu = False,
    cold: options.Cold = "auto",
    trace: options.TraceFile = None,
    lora: options.Lora = None,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    prompt_cache: options.PromptCache = None,
    lookup: options.Lookup = 0,
    load: options.Load = "auto",
    timings: Timings = False,
) -> None:
    """Complete a prompt, or answer it (--chat)."""
    text = _prompt(prompt, file)
    if system is not None and not chat:
        raise typer.BadParameter("a system prompt needs --chat", param_hint="--system")
    chosen = options.sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    if n_predict is None:
        n_predict = CHAT_LENGTH if chat else RAW_LENGTH
    chosen["max_tokens"] = None if n_predict < 0 else n_predict
    wanted = gpu.GPUOptions(vram_budget, require_gpu, cold, trace)
    adapters = options.adapters(lora)
    more: dict[str, Any] = {"lookup": lookup, "load": load}
    more |= {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
    with gpu.open_llm(model, ctx, threads, sparsity, wanted, adapters, prompt_cache, **more) as llm:
        if chat:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": text})
            pieces = llm.stream_chat(messages, **chosen)
        else:
            pieces = llm.stream(text, special=special, **chosen)
        clean = console.printable if sys.stdout.isatty() else str
        with closing(pieces):
            for piece in pieces:
                sys.stdout.write(clean(piece))
                sys.stdout.flush()
        sys.stdout.write("\n")
        if timings:
            console.note(describe(llm.stats()))


def describe(stats: Stats) -> str:
    """One line on the last answer: prompt and answer tokens, speeds, context used, what a sparse FFN read."""
    return (
        f"prompt {stats.prompt_tokens} tokens "
        f"({stats.reused_tokens} cached; {stats.prompt_tok_s:.1f} tok/s), "
        f"answer {stats.decode_tokens} tokens ({stats.decode_tok_s:.1f} tok/s{_guesses(stats)}), "
        f"context {stats.context_used} of {stats.n_ctx}{_sparse(stats.usage)}"
    )


def _guesses(stats: Stats) -> str:
    return f"; {stats.right_guesses} of {stats.guessed_tokens} guesses right" if stats.guessed_tokens else ""


def _sparse(usage: Usage | None) -> str:
    if usage is None or not usage.places:
        return ""
    predictors = f", predictors {usage.predictor_share:.0%} of the time" if usage.predictor_ticks else ""
    return (
        f"; FFN: {usage.density:.1%} of neurons active, {console.human_bytes(round(usage.step_bytes))} a token "
        f"({usage.byte_share:.0%} of dense){predictors}"
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give either -p or -f", param_hint="-p/-f")
    if file is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return read_stdin()
    if prompt is None:
        raise typer.BadParameter("wanted -p PROMPT, -f FILE or text on stdin", param_hint="-p")
    return prompt


def read_stdin() -> str:
    """All of standard input as text; bytes that are not UTF-8 become replacement characters."""
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")
