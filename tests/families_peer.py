"""Compare hotcold's and llama.cpp's logits for tests/families with those of transformers (run by hand).

    python tests/families_peer.py --peer-python PYTHON [--files FOLDER] [--half-cache] [NAME ...]

Each family is converted to an F32 file, which hotcold computes here and llama-cpp-python in its own interpreter
(`pip install llama-cpp-python` there), each prompt at once and token by token. --files takes NAME.gguf from a
folder instead of converting. A family that llama.cpp computes differently by its own choice is measured up to where
the two part, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from families import BY_NAME, FAMILIES, Family, relative_error

UNKNOWN = ("opt", "bamboo")  # names of PowerInfer's fork only
WINDOW = 8
# Name -> positions that can agree, and why no others (or none) can.
PARTS: dict[str, tuple[int, str]] = {
    "llama-relu": (0, "has no ReLU for `llama`"),
    "mistral": (WINDOW, "ignores `llama`'s sliding window"),
    "phi3": (WINDOW, "has `phi3`'s sliding window switched off"),
    "starcoder2": (WINDOW, "ignores `starcoder2`'s sliding window"),
    "gemma2-27b": (0, "tells 27B's score scale by its 46 layers"),
    "phi3-longrope-short": (0, "has no context below 256, so the long factors"),
}


def peer_main() -> None:
    """Run in the peer's interpreter: a JSON request on stdin, a JSON answer on stdout."""
    import llama_cpp

    request = json.load(sys.stdin)
    answer: dict[str, Any] = {"version": llama_cpp.__version__, "error": ""}
    cache_type = 1 if request["half_cache"] else 0  # ggml's F16 and F32
    try:
        llm = llama_cpp.Llama(
            request["file"], n_ctx=request["n_ctx"], n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True,
            flash_attn=False, type_k=cache_type, type_v=cache_type, verbose=False,
            kv_overrides={"general.name": "tiny"},  # of a name with phi-3 in it, it expects Phi-3's own tokens
        )  # fmt: skip
    except ValueError as error:
        answer["error"] = str(error)
    else:
        logits = {}
        for i, ids in enumerate(request["prompts"]):
            llm.reset()
            llm.eval(ids)
            logits[f"whole{i}"] = llm.scores[: len(ids)].copy()
            llm.reset()
            for token in ids:
                llm.eval([token])
            logits[f"steps{i}"] = llm.scores[: len(ids)].copy()
        np.savez(request["answer"], **logits)
    json.dump(answer, sys.stdout)


def ask_peer(python: str, family: Family, file: Path, half_cache: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run peer_main in another interpreter: its answer, and whole{i} and steps{i} (n_tokens, n_vocab) by prompt."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "logits.npz"
        prompts = [family.prompt.tolist(), *(ids.tolist() for ids, _ in family.batch)]
        request = {
            "file": str(file),
            "n_ctx": family.n_ctx,
            "prompts": prompts,
            "answer": str(arrays),
            "half_cache": half_cache,
        }
        done = subprocess.run(
            [python, __file__, "--as-peer"], input=json.dumps(request), stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            return {"version": "", "error": f"the process ended with {done.returncode}"}, {}
        answer = json.loads(done.stdout)
        if answer["error"]:
            return answer, {}
        with np.load(arrays) as logits:
            return answer, dict(logits)


def ours(family: Family, file: Path) -> dict[str, np.ndarray]:
    """The same arrays from hotcold."""
    from hotcold import Engine

    logits = {}
    with Engine(str(file), n_ctx=family.n_ctx, n_threads=1) as engine:
        for i, ids in enumerate([family.prompt, *(ids for ids, _ in family.batch)]):
            sequence = engine.new_sequence()
            logits[f"whole{i}"] = engine.eval(sequence, ids.tolist(), all_logits=True).copy()
            sequence.close()
            sequence = engine.new_sequence()
            logits[f"steps{i}"] = np.stack([engine.eval(sequence, [token])[-1].copy() for token in ids.tolist()])
            sequence.close()
    return logits


def agreement(family: Family, logits: dict[str, np.ndarray], upto: int) -> tuple[float, float]:
    """(largest relative error, share of equal best tokens) over all prompts' first `upto` positions."""
    errors, equal, total = [0.0], 0, 0
    for i, (_, expected) in enumerate([(family.prompt, family.logits), *family.batch]):
        for kind in ("whole", "steps"):
            got = logits[f"{kind}{i}"][:upto]
            wanted = expected[:upto]
            errors.append(relative_error(got, wanted))
            equal += int((got.argmax(1) == wanted.argmax(1)).sum())
            total += len(got)
    return max(errors), equal / total


def convert(family: Family, folder: Path) -> Path:
    """The family as an F32 file made by `hotcold convert`."""
    file = folder / f"{family.folder.name}.gguf"
    if not file.exists():
        call = "from hotcold.tools.cli import main; main()"
        command = [sys.executable, "-c", call, "convert", str(family.folder), str(file), "--type", "f32"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return file


def row(family: Family, python: str, file: Path, half_cache: bool) -> tuple[str, str]:
    """One line of the table, and the peer's version."""
    start = "| {} | {:.0e}, {:.0%} |".format(family.name, *agreement(family, ours(family, file), len(family.prompt)))
    if family.folder.name in UNKNOWN:
        return f"{start} - | not in llama.cpp: the name is PowerInfer's |", ""
    answer, logits = ask_peer(python, family, file, half_cache)
    if answer["error"]:
        return f"{start} **refused** | {answer['error']} |", answer["version"]
    note = ""
    if family.name in PARTS:
        upto, why = PARTS[family.name]
        note = f"llama.cpp {why}"
        if upto:
            note += "; first {} positions: {:.0e}, {:.0%}".format(upto, *agreement(family, logits, upto))
    peer = "{:.0e}, {:.0%}".format(*agreement(family, logits, len(family.prompt)))
    return f"{start} {peer} | {note} |", answer["version"]


def main() -> None:
    """Convert, run both, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--files", type=Path, help="folder of NAME.gguf, converted before")
    parser.add_argument("--half-cache", action="store_true", help="let the peer keep keys and values in float16")
    parser.add_argument("names", nargs="*", default=[family.name for family in FAMILIES])
    options = parser.parse_args()
    lines, versions = [], set()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names:
            family = BY_NAME[name]
            folder = options.files or Path(scratch)
            file = folder / f"{family.folder.name}.gguf" if options.files else convert(family, folder)
            line, version = row(family, options.peer_python, file, options.half_cache)
            lines.append(line)
            versions.add(version)
    cache = "float16" if options.half_cache else "float32"
    print("Largest relative error of the logits against transformers (float32), and share of equal best tokens;")
    print(f"llama.cpp as of llama-cpp-python {max(versions)}, {cache} keys and values, no flash attention.\n")
    print("| family | hotcold | llama.cpp | |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:] == ["--as-peer"]:
        peer_main()
    else:
        main()
