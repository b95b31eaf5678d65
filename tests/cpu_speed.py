"""Decode and prompt speed against what the machine can do at most, and against llama-cpp-python, as Markdown rows.

    python tests/cpu_speed.py MODEL.gguf... [--threads 1,2] [--rounds 5] [--peer-python PYTHON]
    HOTCOLD_ISA=avx2 python tests/cpu_speed.py MODEL.gguf... --peer-python PYTHON_WITH_AN_AVX2_BUILD

Decode: GB/s is the weights that a token reads, times tokens a second; `of reading` its share of the rate at which as
many threads read the same weights and do nothing else, measured right before and after. Prompt: GMAC/s is the
multiplications of a prompt with the matrices of the layers, a second (attention's own are left out, and it counts in
the time); `of peak` the share of what the dot-product unit of this instruction-set level does in a loop without loads
from memory. All sides take turns; medians of rounds, of which the first warms up. The peer is built for whatever pip
built it for: its first line says. To compare at the avx2 level, build one with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip install --no-cache-dir
--no-binary llama-cpp-python llama-cpp-python (pip's own cache would hand out what another environment had built).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from hotcold import Engine
from hotcold.runtime.cpu import isa
from hotcold.runtime.limits import Reader, bytes_outside_ffn, product_rate, reader_of, weights
from hotcold.runtime.models import resolve
from hotcold.tools.bench import PAUSE_S, Side, Theirs, Timed, token_ids

READ_S = 0.1
SMALL = 1 << 28  # bytes of a model that gets one long prompt and a long decode
INFO = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
DECODE = "| model | threads | decode tok/s | GB/s | reading, GB/s | of reading | llama.cpp | ratio |"
PROMPT = "| model | threads | prompt | tok/s | GMAC/s | peak, GMAC/s | of peak | llama.cpp | ratio |"


class Ours(Timed):
    """The engine in this process, and a reader of its weights."""

    def __init__(self, engine: Engine, reader: Reader) -> None:
        super().__init__(engine)
        self.reader = reader

    def read_rate(self) -> float:
        """Bytes a second."""
        return self.reader.rate(READ_S)


def layer_weights(engine: Engine) -> int:
    """Weights that each token of a prompt is multiplied with: all matrices but the head, which sees the last alone."""
    infos = [engine.file.info(name) for name in weights(engine) if name.startswith("blk.") and name in engine.file]
    return sum(info.shape[0] * info.n_rows for info in infos if len(info.shape) > 1)


def measure(path: Path, n_threads: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """One result for the decode and one a prompt, printed as they come."""
    small = path.stat().st_size < SMALL
    prompts = [int(n) for n in options.prompts.split(",")] if options.prompts else [512] if small else [128, 512]
    n_gen = options.tokens or (128 if small else 32)
    with ExitStack() as stack:
        n_ctx = -(-max(*prompts, n_gen) // 256) * 256
        engine = stack.enter_context(Engine(path, n_ctx=n_ctx, n_threads=n_threads, sparsity="dense"))
        reader = reader_of(engine)
        stack.callback(reader.close)
        ours, ids = Ours(engine, reader), token_ids(engine.n_vocab, max(prompts))
        sides: list[Ours | Side] = [ours]
        if options.peer_python:
            sides.append(Theirs(options.peer_python, path, n_ctx, n_threads, engine.n_vocab))
            stack.callback(sides[1].close)
        found: dict[object, list[list[float]]] = {key: [[], []] for key in ("read", "peak", "decode", *prompts)}
        for round_ in range(options.rounds + 1):
            for number, side in enumerate(sides):
                time.sleep(PAUSE_S)
                rates = [side.read_rate() or 0.0]
                seconds = side.decode(ids[0], n_gen if round_ else 4)
                rates.append(side.read_rate() or 0.0)
                if round_:
                    found["decode"][number].append(n_gen / seconds)
                    found["read"][number].append(statistics.mean(rates))
            for n in prompts:
                for number, side in enumerate(sides):
                    time.sleep(PAUSE_S)
                    seconds = side.prompt(ids[:n])
                    if round_:
                        found[n][number].append(n / seconds)
            found["peak"][0].append(product_rate(n_threads, READ_S))
        median = {key: [statistics.median(times) if times else 0.0 for times in pair] for key, pair in found.items()}
        nbytes = bytes_outside_ffn(engine) + engine.usage.step_bytes
        read, peak, per_token = median["read"][0], median["peak"][0], layer_weights(engine)
    head = {"model": path.name, "threads": n_threads, "level": isa.choose()}
    results: list[dict[str, object]] = []
    for key in ("decode", *prompts):
        tok_s, peer = median[key]
        result = {
            **head,
            "what": key,
            "tok_s": tok_s,
            "peer_tok_s": peer or None,
            "ratio": tok_s / peer if peer else None,
        }
        if key == "decode":
            result |= {"bytes_s": tok_s * nbytes, "read_bytes_s": read, "share": tok_s * nbytes / read}
        else:
            result |= {"macs_s": tok_s * per_token, "peak_macs_s": peak, "share": tok_s * per_token / peak}
        results.append(result)
        print(row(result), flush=True)
    return results


def row(result: dict[str, object]) -> str:
    """A result as a row under DECODE or PROMPT."""
    get = {key: value if isinstance(value, float) else 0.0 for key, value in result.items()}
    peer = [f"{get['peer_tok_s']:.1f}", f"**{get['ratio']:.2f}**"] if result["ratio"] else ["", ""]
    cells = [str(result["model"]), str(result["threads"])]
    if result["what"] == "decode":
        cells += [f"{get['tok_s']:.1f}", f"{get['bytes_s'] / 1e9:.1f}", f"{get['read_bytes_s'] / 1e9:.1f}"]
    else:
        cells += [str(result["what"]), f"{get['tok_s']:.1f}", f"{get['macs_s'] / 1e9:.0f}"]
        cells += [f"{get['peak_macs_s'] / 1e9:.0f}"]
    return "| " + " | ".join([*cells, f"**{get['share']:.0%}**", *peer]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompts", help="tokens, as 128,512; default: 512 for small models, both for others")
    parser.add_argument("--tokens", type=int, help="of a decode; default: 128 for small models, 32 for others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--json", type=Path, help="append each result to this file, a line each")
    options = parser.parse_args()
    print(f"hotcold at level {isa.choose()}")
    if options.peer_python:
        said = subprocess.run([options.peer_python, "-c", INFO], capture_output=True, text=True, check=True)
        print("llama-cpp-python:", said.stdout.strip().splitlines()[-1])
    results = []
    print(f"rows of decodes and prompts, under\n{DECODE}\n{PROMPT}\n", flush=True)
    for model in options.models:
        for n_threads in map(int, options.threads.split(",")):
            found = measure(resolve(model), n_threads, options)
            results += found
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(result) + "\n" for result in found)
    for head, wanted in ((DECODE, True), (PROMPT, False)):
        print(f"\n{head}\n|{'---|' * (head.count('|') - 1)}")
        for result in results:
            if (result["what"] == "decode") == wanted:
                print(row(result))


if __name__ == "__main__":
    main()
