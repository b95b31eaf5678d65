"""Compare hotcold with llama-cpp-python: greedy tokens and perplexity (a benchmark script, not a test).

    python tests/peer_agreement.py --peer-python PYTHON [--model NAME] [--threads N] [--write-golden]

The peer runs in its own interpreter (`pip install llama-cpp-python` there), so that neither loads the other.
Perplexity is scored as llama-perplexity does: windows of 512 tokens, the first half of each unscored.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "models" / "smollm2_golden.json"
WINDOW = 512
PERPLEXITY_TOKENS = 4096
DECODE_TOKENS = 64
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# Chosen among 60 for the peer's own certainty: the five in whose first 16 steps its two best logits are farthest apart
# (0.43 at least; rounding activations to 8 bits moves logits by 0.3 in the mean), so that equality tests the
# arithmetic and not how a near-tie happened to round.
QUESTIONS = (
    "What is a black hole?",
    "Write a SQL query that selects all users.",
    "Write a JavaScript function that adds two numbers.",
    "What is democracy?",
    "Write a Python function that computes the factorial of a number.",
)


def window_nll(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Negative log-likelihoods of a window's scored tokens, from its logits (len(ids), n_vocab)."""
    first = len(ids) // 2
    rows = logits[first : len(ids) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[first + 1 :]]


def windows(ids: list[int]) -> list[list[int]]:
    """Whole windows of the text, no more than PERPLEXITY_TOKENS tokens in all."""
    return [ids[i : i + WINDOW] for i in range(0, min(len(ids), PERPLEXITY_TOKENS) - WINDOW + 1, WINDOW)]


def fixed_text() -> str:
    """Real English prose that every Python carries; its wording depends on the Python version."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:40000]


def peer_main() -> None:
    """Run in the peer's interpreter: a JSON request on stdin, a JSON answer on stdout."""
    import llama_cpp

    request = json.load(sys.stdin)
    llm = llama_cpp.Llama(
        request["model"], n_ctx=1024, n_threads=request["threads"], n_threads_batch=request["threads"],
        logits_all=True, verbose=False,
    )  # fmt: skip
    eos = llm.token_eos()
    answer: dict[str, Any] = {"version": llama_cpp.__version__, "greedy": [], "nll": []}
    for text in request["prompts"]:
        prompt = llm.tokenize(text.encode(), add_bos=False, special=True)
        ids: list[int] = []
        gaps: list[float] = []
        llm.reset()
        llm.eval(prompt)
        while len(ids) < DECODE_TOKENS and (not ids or ids[-1] != eos):
            row = llm.scores[llm.n_tokens - 1]
            second, best = np.partition(row, -2)[-2:]
            gaps.append(round(float(best - second), 3))
            ids.append(int(row.argmax()))
            llm.eval(ids[-1:])
        text = llm.detokenize(ids).decode(errors="replace")
        answer["greedy"].append({"prompt_ids": prompt, "ids": ids, "gaps": gaps, "text": text})
    answer["text_ids"] = llm.tokenize(request["text"].encode(), add_bos=False)[:PERPLEXITY_TOKENS]
    for window in windows(answer["text_ids"]):
        llm.reset()
        llm.eval(window)
        answer["nll"].append(window_nll(llm.scores[:WINDOW], window).tolist())
    json.dump(answer, sys.stdout)


def ask_peer(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run peer_main in another interpreter."""
    command = [python, __file__, "--as-peer"]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def ours(model: str, threads: int, prompts: list[str], text: str) -> dict[str, Any]:
    """The same answer as the peer's, from hotcold."""
    from hotcold import Engine
    from hotcold.formats.tokenizer import load_tokenizer

    answer: dict[str, Any] = {"greedy": [], "nll": []}
    with Engine(model, n_ctx=1024, n_threads=threads) as engine:
        tokenizer = load_tokenizer(engine.file)
        for prompt in prompts:
            prompt_ids = tokenizer.encode(prompt, add_bos=False, special=True)
            sequence = engine.new_sequence()
            ids = [int(engine.eval(sequence, prompt_ids)[-1].argmax())]
            while len(ids) < DECODE_TOKENS and ids[-1] != tokenizer.eos_id:
                ids.append(int(engine.eval(sequence, ids[-1:])[-1].argmax()))
            sequence.close()
            answer["greedy"].append({"prompt_ids": prompt_ids, "ids": ids, "text": tokenizer.decode(ids)})
        answer["text_ids"] = tokenizer.encode(text, add_bos=False)[:PERPLEXITY_TOKENS]
        for window in windows(answer["text_ids"]):
            sequence = engine.new_sequence()
            answer["nll"].append(window_nll(engine.eval(sequence, window, all_logits=True), window).tolist())
            sequence.close()
    return answer


def perplexity(nll: list[list[float]]) -> float:
    """exp of the mean over all scored tokens."""
    return math.exp(np.mean(nll))


def write_golden(peer: dict[str, Any], prompts: list[str]) -> None:
    """Store the peer's token ids as the data of tests/models/test_smollm2.py."""
    rows = [
        {"prompt": prompt, "prompt_ids": row["prompt_ids"], "ids": row["ids"], "text": row["text"],
         "smallest_gap_of_16": min(row["gaps"][:16])}
        for prompt, row in zip(prompts, peer["greedy"], strict=True)
    ]  # fmt: skip
    golden = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "peer": f"llama-cpp-python {peer['version']}",
        "settings": "greedy, n_threads=2, F16 KV cache, prompt in one batch",
        "prompts": rows,
        "perplexity": {
            "text": f"pydoc_data.topics of Python {sys.version_info[0]}.{sys.version_info[1]}, sorted, "
            f"first {PERPLEXITY_TOKENS} tokens, windows of {WINDOW}",
            "value": round(perplexity(peer["nll"]), 4),
        },
    }
    lines = json.dumps(golden, indent=1, ensure_ascii=False)
    one_line_lists = re.sub(r"\[[\d,\s]+\]", lambda ids: re.sub(r"\s+", " ", ids[0]), lines)
    GOLDEN.write_text(one_line_lists + "\n", encoding="utf-8")


def main() -> None:
    """Run both, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-golden", action="store_true", help="store the peer's answer and stop")
    options = parser.parse_args()
    from hotcold.runtime.models import resolve

    model = str(resolve(options.model))
    prompts = [TEMPLATE.format(question) for question in QUESTIONS]
    text = fixed_text()
    peer = ask_peer(options.peer_python, {"model": model, "threads": options.threads, "prompts": prompts, "text": text})
    if options.write_golden:
        write_golden(peer, prompts)
        return
    own = ours(model, options.threads, prompts, text)
    print(f"peer: llama-cpp-python {peer['version']}; {options.threads} threads; {Path(model).name}\n")
    print("| prompt | same prompt ids | equal tokens from the start | peer's smallest gap in them |")
    print("|---|---|---|---|")
    for question, a, b in zip(QUESTIONS, own["greedy"], peer["greedy"], strict=True):
        pairs = list(zip(a["ids"], b["ids"], strict=False))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        gap = min(b["gaps"][: same + 1])
        print(f"| {question} | {a['prompt_ids'] == b['prompt_ids']} | {same} of {len(b['ids'])} | {gap} |")
    mine, theirs = perplexity(own["nll"]), perplexity(peer["nll"])
    same_ids = own["text_ids"] == peer["text_ids"]
    print(f"\n| perplexity, {len(peer['text_ids'])} tokens, same ids {same_ids} | |")
    print("|---|---|")
    print(f"| hotcold | {mine:.4f} |\n| llama-cpp-python | {theirs:.4f} |")
    print(f"| difference | {100 * (mine / theirs - 1):+.3f} % |")


if __name__ == "__main__":
    if sys.argv[1:] == ["--as-peer"]:
        peer_main()
    else:
        main()
