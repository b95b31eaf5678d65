"""lm-evaluation-harness over HTTP against the same tasks in-process: both must score alike.

    python -m venv lmeval
    lmeval/bin/pip install 'lm-eval[api]' transformers torch 'hotcold[serve]'
    lmeval/bin/python tests/serve_lm_eval.py [--model smollm2] [--samples 24] [--threads 2]

Nothing is fetched: the tasks are made of Python's own documentation (pydoc_data.topics) and the tokenizer of the GGUF
file. Which of four continuations follows (multiple choice), perplexity of paragraphs (rolling), and a greedy
continuation (generate_until). `local-completions` sends the prompts as token ids to a server that this script starts,
with echo and logprobs; beside it, solver.harness' adapter takes log probabilities from LLM.logits. Exit code 1 where
a score differs. --server-python: an interpreter for the server, where hotcold is not installed beside lm-eval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from serve_process import KEY, Served

from hotcold import LLM
from hotcold.formats.gguf import GGUFFile
from hotcold.runtime.models import resolve
from hotcold.solver.harness import adapter

MAX_LENGTH = 1024
N_PARALLEL = 4  # for both: for one answer alone, other kernels round otherwise
TOLERANCE = 1e-3  # of a log probability summed over a continuation
SHARED = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}


def write_tasks(folder: Path, n: int) -> list[str]:
    """Three small tasks with local data; their names."""
    rng = random.Random(1)
    paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n")]
    paragraphs = [p for p in paragraphs if 300 < len(p) < 1200 and p[0].isalpha()]
    rng.shuffle(paragraphs)
    rows = []
    for paragraph in paragraphs[:n]:
        words = paragraph.split()
        cut = len(words) // 2
        choices = [" ".join(words[cut : cut + 5])]
        while len(choices) < 4:
            other = rng.choice(paragraphs).split()
            start = rng.randrange(max(1, len(other) - 5))
            choices.append(" ".join(other[start : start + 5]))
        order = rng.sample(range(4), 4)
        context = " ".join(words[:cut])
        rows.append({
            "context": context, "choices": [choices[i] for i in order], "label": order.index(0), "text": paragraph,
            "answer": choices[0],
        })  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    tasks: list[dict[str, Any]] = [
        {
            "task": "docs_choice", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "choices", "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "docs_perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        {
            "task": "docs_continue", "output_type": "generate_until", "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip
    for task in tasks:
        # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**SHARED, **files, **task}), encoding="utf-8")
    return [task["task"] for task in tasks]


def write_tokenizer(model: Path, folder: Path) -> None:
    """The file's tokenizer in Hugging Face's format, for byte-level BPE that is cut as SmolLM's or GPT-2's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    with GGUFFile(model) as file:
        read = {
            key: file.metadata[f"tokenizer.ggml.{key}"]
            for key in ("pre", "tokens", "token_type", "merges", "eos_token_id")
        }
    if read["pre"] not in ("smollm", "gpt-2"):
        sys.exit(f"{model}: tokenizer.ggml.pre is {read['pre']}; this script writes smollm's and gpt-2's")
    tokens = list(read["tokens"])
    merges = [tuple(merge.split(" ")) for merge in read["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if read["pre"] == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(read["token_type"])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[read["eos_token_id"]]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Where two results differ: scores, and sample by sample what the models said."""
    found = []
    for task, scores in here["results"].items():
        for name, score in scores.items():
            other = there["results"][task][name]
            same = score == other if isinstance(score, str) else math.isclose(score, other, rel_tol=1e-4, abs_tol=1e-9)
            if name != "alias" and not same:
                found.append(f"{task} {name}: {score} in-process, {other} by HTTP")
        pairs = zip(here["samples"][task], there["samples"][task], strict=True)
        for number, (one, two) in enumerate(pairs):
            for a, b in zip(one["resps"], two["resps"], strict=True):
                a, b = a[0], b[0]
                if isinstance(a, str) or isinstance(b, str):
                    same = a == b
                elif isinstance(a, (tuple, list)):
                    same = abs(a[0] - b[0]) < TOLERANCE and a[1] == b[1]
                else:
                    same = math.isclose(a, b, rel_tol=1e-4)
                if not same:
                    found.append(f"{task} sample {number}: {a!r} in-process, {b!r} by HTTP")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--server-python", default=sys.executable)
    options = parser.parse_args()
    model = Path(resolve(options.model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update({
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": KEY,
        })  # fmt: skip
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        (folder / "tasks").mkdir()
        (folder / "tokenizer").mkdir()
        tasks = write_tasks(folder / "tasks", options.samples)
        write_tokenizer(model, folder / "tokenizer")
        shared: dict[str, Any] = {"tasks": tasks, "bootstrap_iters": 0, "log_samples": True}
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        with LLM(model, n_ctx=MAX_LENGTH, n_threads=options.threads, n_parallel=N_PARALLEL) as llm:
            here = simple_evaluate(model=adapter(llm), task_manager=manager, **shared)
        serving = [options.server_python, "-c", "from hotcold.tools.cli import main; main()", "serve"]
        arguments = ["--ctx", str(MAX_LENGTH), "--threads", str(options.threads), "--parallel", str(N_PARALLEL)]
        with Served(model, *arguments, command=serving) as server:
            settings = {
                "model": server.model(), "base_url": server.url + "/v1/completions",
                "tokenizer": str(folder / "tokenizer"), "tokenizer_backend": "huggingface",
                "num_concurrent": options.concurrent, "max_length": MAX_LENGTH,
            }  # fmt: skip
            there = simple_evaluate(model="local-completions", model_args=settings, task_manager=manager, **shared)
    for task, scores in here["results"].items():
        print(json.dumps({"task": task, "in_process": scores, "http": there["results"][task]}, default=str))
    found = differences(here, there)
    print("\n".join(found) or "the same scores and the same samples")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
