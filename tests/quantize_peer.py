"""Compare `hotcold quantize` with llama-quantize: types, rounding errors, perplexity, speed (a script, not a test).

    python tests/quantize_peer.py --peer-python PYTHON types|errors|perplexity|speed [--model FILE.gguf] [--text FILE]

`types` and `errors` write the reference figures that the tests read; `errors --model` also prints a table for a model's
own weights. `perplexity` and `speed` print tables for --model, requantised by both. The peer (`pip install
llama-cpp-python` in PYTHON's environment) quantises in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PEER = """
import ctypes, json, sys, time
import llama_cpp
if sys.argv[1] == "where":
    print(llama_cpp.__file__)
    sys.exit()
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
source, out, file_type, threads, importance = json.loads(sys.argv[1])
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread, options.allow_requantize = file_type, threads, True
if importance:  # a list that ends at once: there is an imatrix, without entries
    end = llama_cpp.llama_cpp.llama_model_imatrix_data()
    options.imatrix = ctypes.pointer(end)
start = time.perf_counter()
code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))
print(time.perf_counter() - start)
sys.exit(code)
"""


def peer_quantize(python: str, source: Path, out: Path, file_type: int, importance: bool = False) -> float:
    """Seconds that the peer took, on two threads."""
    request = json.dumps([str(source), str(out), file_type, 2, importance])
    done = subprocess.run([python, "-c", PEER, request], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama_model_quantize failed: {done.stderr[-500:]}")
    return float(done.stdout)


def peer_encoder(python: str) -> ctypes.CDLL:
    """ggml's library, for ggml_quantize_chunk."""
    where = subprocess.run([python, "-c", PEER, "where"], capture_output=True, text=True, check=True).stdout.strip()
    library = ctypes.CDLL(next(str(path) for path in Path(where).parent.rglob("libggml-base.*")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return library


def write_model(path: Path, case) -> None:
    """All zeros, in F16."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), case.arch)
    writer.add_context_length(64)
    writer.add_block_count(case.n_layer)
    writer.add_embedding_length(case.n)
    writer.add_feed_forward_length(case.n)
    writer.add_head_count(8)
    writer.add_head_count_kv(case.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(case.n // 8)
    writer.add_vocab_size(256)
    if case.n_expert:
        writer.add_expert_count(case.n_expert)
    for key, value in case.keys.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{case.arch}.{key}", value)
    for name, shape in case.tensors():
        writer.add_tensor(name, np.zeros(shape[::-1], np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types(python: str) -> None:
    from quantize_cases import CASES, TYPES, by_kind

    from hotcold.formats.gguf import GGUFFile
    from hotcold.formats.mixes import MIXES

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.gguf"), Path(folder, "out.gguf")
        for label, case in CASES.items():
            write_model(source, case)
            found[label] = {}
            for mix in MIXES.values():
                peer_quantize(python, source, out, mix.file_type, importance=case.importance)
                with GGUFFile(out) as file:
                    assert file.get("general.file_type") == mix.file_type
                    found[label][mix.name] = by_kind({name: info.type.name for name, info in file.tensors.items()})
            print(label, "done")
    TYPES.write_text(json.dumps(found, indent=1) + "\n")


def errors(python: str, model: Path | None) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants
    from quantize_cases import ERRORS, error, importance, weights

    from hotcold.formats.types import GGMLType
    from hotcold.runtime.encode import ENCODED, encode

    library = peer_encoder(python)

    def theirs(kind: str, x: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
        form = GGMLType[kind]
        out = np.empty((len(x), x.shape[1] // form.block_size * form.type_size), np.uint8)
        given = None if counts is None else counts.ctypes.data
        library.ggml_quantize_chunk(int(form), x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], given)
        return out

    def decoded(kind: str, raw: np.ndarray) -> np.ndarray:
        return quants.dequantize(raw, GGMLQuantizationType[kind])

    kinds = [kind for kind in ENCODED if kind not in ("F32", "F16", "BF16")]
    found = {}
    sets = weights()
    for label, x in sets.items():
        found[label] = {
            kind: [error(decoded(kind, theirs(kind, x, c)), x, 1.0 if c is None else c) for c in (None, importance())]
            for kind in kinds
        }
    ERRORS.write_text(json.dumps(found, indent=1) + "\n")
    rng = np.random.default_rng(7)
    sets = {"normal": rng.standard_normal((1024, 1024), np.float32)}
    if model:
        sets |= dict(_matrices(model))
    print("| type | " + " | ".join(f"{label}: ours | theirs | ratio" for label in sets) + " |")
    print("|---" * (1 + 3 * len(sets)) + "|")
    for kind in kinds:
        cells = []
        for x in sets.values():
            size = float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))
            pair = [error(decoded(kind, raw), x) / size for raw in (encode(kind, x), theirs(kind, x, None))]
            cells += [*(f"{100 * value:.3f} %" for value in pair), f"{pair[0] / max(pair[1], 1e-12):.3f}"]
        print(f"| {kind} | " + " | ".join(cells) + " |")


def _matrices(model: Path) -> Iterator[tuple[str, object]]:
    import numpy as np

    from hotcold.formats.gguf import GGUFFile

    with GGUFFile(model) as file:
        for name in ("token_embd", "blk.10.attn_q", "blk.10.ffn_up", "blk.10.ffn_down"):
            values = file.dequantized(f"{name}.weight").reshape(-1)[: 1 << 20]
            yield name, np.ascontiguousarray(values[: values.size // 256 * 256].reshape(-1, 256))


def perplexity(python: str, model: Path, text: Path, chunks: int) -> None:
    from hotcold.formats.mixes import MIXES

    def measure(path: Path) -> tuple[float, float]:
        command = ["-c", "from hotcold.tools.cli import main; main()", "perplexity", str(path), str(text), "--json"]
        done = subprocess.run(
            [sys.executable, *command, "--chunks", str(chunks)], capture_output=True, text=True, check=True
        )
        report = json.loads(done.stdout)
        return report["perplexity"], path.stat().st_size / 1e6

    from hotcold.solver.quantize import Options, quantize

    print(f"{model.name}: {measure(model)[0]:.3f}")
    print("| type | MB | ours | theirs |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = Path(folder, "mine.gguf"), Path(folder, "theirs.gguf")
        for name in ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"):
            quantize(model, mine, name, Options(allow_requantize=True))
            peer_quantize(python, model, theirs, MIXES[name].file_type)
            (ours, size), (other, _) = measure(mine), measure(theirs)
            print(f"| {name} | {size:.1f} | {ours:.3f} | {other:.3f} |", flush=True)


def speed(python: str, model: Path, runs: int, names: list[str]) -> None:
    """Whole runs on two threads, in turns, medians; the process's start is not counted on either side."""
    from hotcold.formats.gguf import GGUFFile
    from hotcold.formats.mixes import MIXES
    from hotcold.solver.quantize import Options, quantize

    with GGUFFile(model) as file:
        count = sum(info.n_rows * info.shape[0] for info in file.tensors.values()) / 1e6
    print(f"{model.name}: {count:.0f} million weights, two threads, medians of {runs}")
    print("| type | ours, M weights/s | theirs | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder, "out.gguf")
        for name in names:
            times: tuple[list[float], list[float]] = [], []
            for _ in range(runs):
                start = time.perf_counter()
                quantize(model, out, name, Options(allow_requantize=True, n_threads=2))
                times[0].append(time.perf_counter() - start)
                times[1].append(peer_quantize(python, model, out, MIXES[name].file_type))
            ours, theirs = (count / statistics.median(side) for side in times)
            print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("types", "errors", "perplexity", "speed"))
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--types", default="Q4_0,Q8_0,Q5_1,Q4_K_M,Q6_K,Q2_K")
    given = parser.parse_args()
    if given.what == "types":
        types(given.peer_python)
    elif given.what == "errors":
        errors(given.peer_python, given.model)
    elif given.what == "perplexity":
        perplexity(given.peer_python, given.model, given.text, given.chunks)
    else:
        speed(given.peer_python, given.model, given.runs, given.types.split(","))


if __name__ == "__main__":
    main()
