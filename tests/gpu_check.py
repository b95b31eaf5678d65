"""Everything that wants a GPU, unattended, in under 10 minutes: tests, speed against the card's own, the budget sweep.

    python tests/gpu_check.py [--model SmolLM2.gguf] [--folder DIR] [--layers N] [--skip-tests]

The CUDA tests run on the GPU; then a small model wholly on it must give the CPU's tokens (without --model, one with
random weights of SmolLM2-135M's sizes); then a synthetic ReLU model of a 7B's width is decoded at budgets from 20 to
100 % of what it takes as a whole, placed by the solver and naively (whole layers until the budget is full), beside the
CPU alone. One table is printed at the end; the exit status says whether all was as it must be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import GPUError, HotcoldError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import Placement
from hotcold.formats.types import GGMLType
from hotcold.runtime.cuda.device import Device, open_device
from hotcold.solver.synthetic import Shape, write_model
from hotcold.solver.synthetic_relu import ReluWeights

TESTS = Path(__file__).parent
N_CTX = 512
BUDGETS = (0.2, 0.4, 0.6, 0.8, 1.0)
TEST_SECONDS = 240  # the most that the tests may take
SMALL = Shape(GGMLType.Q8_0, 576, 1536, 30, 9, 3, 49152)
ACTIVE, SKEW, RANK = 0.1, 0.8, 1024
GIB = 1 << 30


class Row(NamedTuple):
    """A line of the table; nbytes: of the GPU's memory that this process used, budget: that it might."""

    what: str
    tokens_a_second: float
    nbytes: int = 0
    budget: int = 0
    remark: str = ""

    @property
    def within(self) -> bool:
        return not self.budget or self.nbytes <= self.budget


def run_tests() -> bool:
    """The CUDA tests, on the GPU instead of the simulator."""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"} | {"HOTCOLD_TEST_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "cuda")]
    try:
        return subprocess.run(command, cwd=TESTS.parent, env=environment, timeout=TEST_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {TEST_SECONDS} s")
        return False


def best(work: Any, repetitions: int = 5) -> float:
    """Seconds, the least of a few."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_speed(device: Device) -> dict[str, float]:
    """Bytes a second: within the GPU (read and written bytes both count), to it and from it."""
    n, copies = GIB, 8
    here, there = (device.allocate((n,), np.uint8) for _ in range(2))
    host = device.pinned((n // 4,), np.uint8)
    part = here[: n // 4]

    def within() -> None:
        for _ in range(copies):
            there.copy_to_device(here, stream=device.stream)
        device.stream.synchronize()

    def to_device() -> None:
        part.copy_to_device(host, stream=device.stream)
        device.stream.synchronize()

    def from_device() -> None:
        part.copy_to_host(host, stream=device.stream)
        device.stream.synchronize()

    with device.check("copying"):
        return {
            "copy": 2 * copies * n / best(within),
            "to the GPU": n / 4 / best(to_device),
            "from the GPU": n / 4 / best(from_device),
        }


def whole(config: ModelConfig, budget: int) -> Placement:
    """All of a model on the GPU."""
    hot = tuple(np.arange(config.n_ff, dtype=np.int32) for _ in range(config.n_layer))
    return Placement(hot, (True,) * config.n_layer, True, N_CTX, budget, 64, "cpu", "all", "this one")


def decode(engine: Engine, n: int) -> tuple[list[int], float]:
    """Greedy tokens after a short prompt, and tokens a second of the later half."""
    sequence, times = engine.new_sequence(), []
    try:
        token = int(engine.eval(sequence, np.arange(3, 35) % engine.n_vocab)[-1].argmax())
        tokens = [token]
        for _ in range(n):
            start = time.perf_counter()
            token = int(engine.eval(sequence, [token])[0].argmax())
            times.append(time.perf_counter() - start)
            tokens.append(token)
    finally:
        sequence.close()
    return tokens, 1 / statistics.median(times[n // 2 :])


def measure(path: Path, what: str, device: Device, placement: Placement | None, n: int = 64) -> tuple[Row, list[int]]:
    """A run of the engine; a placement that cannot be loaded gives a row with 0 tokens a second and the reason."""
    budget = placement.budget if placement else 0
    try:
        with Engine(path, n_ctx=N_CTX, placement=placement) as engine:
            tokens, speed = decode(engine, n)
            return Row(what, speed, device.memory().used_by_us if placement else 0, budget), tokens
    except HotcoldError as error:
        return Row(what, 0.0, 0, budget, f"{type(error).__name__}: {error}"), []


def weight_bytes(path: Path) -> int:
    """Bytes of weights that a dense step reads."""
    with GGUFFile(path) as file:
        tied = ModelConfig.from_gguf(file).tied_output
        return sum(t.nbytes for name, t in file.tensors.items() if tied or name != "token_embd.weight")


def config_of(path: Path) -> ModelConfig:
    with GGUFFile(path) as file:
        return ModelConfig.from_gguf(file)


def small_model(path: Path, device: Device, copy: float) -> tuple[list[Row], bool]:
    """Tokens of the GPU against the CPU's."""
    cpu, wanted = measure(path, f"{path.stem}: CPU", device, None)
    gpu, got = measure(path, f"{path.stem}: GPU", device, whole(config_of(path), device.memory().free))
    read = weight_bytes(path) * gpu.tokens_a_second
    same = bool(got) and got == wanted
    equal = "equal" if same else "DIFFER"
    said = f"{read / 1e9:.0f} GB/s, {read / copy:.0%} of what a copy moves; tokens {equal}"
    return [cpu, gpu._replace(remark=gpu.remark or said)], same


def sweep(path: Path, device: Device) -> list[Row]:
    """Budgets from a fifth of the whole model to all of it."""
    from hotcold.solver.placement import place

    config = config_of(path)
    cpu, _ = measure(path, "ReLU: CPU alone", device, None, 32)
    full, _ = measure(path, "ReLU: GPU alone", device, whole(config, device.memory().free), 32)
    rows = [cpu, full]
    if not full.nbytes:
        return rows
    for share in BUDGETS:
        budget = int(full.nbytes * share) if share < 1 else full.nbytes + (64 << 20)
        for objective, name in (("ours", "placed"), ("layers", "naive")):
            what = f"ReLU: {share:4.0%} {name}"
            try:
                placement = place(path, budget, n_ctx=N_CTX, objective=objective).placement
            except HotcoldError as error:
                rows.append(Row(what, 0.0, 0, budget, f"{type(error).__name__}: {error}"))
                continue
            row, _ = measure(path, what, device, placement, 32)
            hot = np.mean([len(ids) for ids in placement.hot]) / config.n_ff
            says = f"{hot:.0%} hot, {row.tokens_a_second / cpu.tokens_a_second:.2f} x CPU"
            rows.append(row._replace(remark=row.remark or says))
    return rows


def relu_model(folder: Path, layers: int) -> Path:
    """The synthetic model, with how often its neurons are active in its section."""
    path = folder / f"relu-7b-wide-{layers}.gguf"
    if not path.exists():
        shape = Shape(GGMLType.Q4_0, 4096, 11008, layers, 32, 32, 32000)
        write_model(path, shape, relu=ReluWeights(shape, ACTIVE, SKEW, RANK, 0))
        start, text = "from hotcold.tools.cli import main; main()", str(TESTS.parent / "README.md")
        subprocess.run([sys.executable, "-c", start, "profile", str(path), text, "--tokens", "256"], check=True)
    return path


def table(rows: list[Row]) -> None:
    print(f"\n{'what':28s} {'tok/s':>8s} {'GPU MiB':>8s} {'budget':>8s}")
    for row in rows:
        sizes = (f"{n >> 20:8d}" if n else f"{'-':>8s}" for n in (row.nbytes, row.budget))
        over = "" if row.within else "OVER BUDGET "
        print(f"{row.what:28s} {row.tokens_a_second:8.1f} {' '.join(sizes)}  {over}{row.remark}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    began = time.perf_counter()
    good = arguments.skip_tests or run_tests()
    try:
        device = open_device()
    except GPUError as error:
        print(error)
        return 1
    before = device.memory()
    print(f"{device}, driver {device.driver}, capability {device.capability}, {before.free >> 20} MiB free")
    speed = copy_speed(device)
    device.close()  # and with it the memory that the copies took
    device = open_device()
    print(", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in speed.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        small = arguments.model or folder / "smollm2-like.gguf"
        if not small.exists():
            write_model(small, SMALL)
        rows, same = small_model(small, device, speed["copy"])
        table(rows)
        rows += sweep(relu_model(folder, arguments.layers), device)
    table(rows)
    good &= same and all(row.within and row.tokens_a_second for row in rows)
    print(f"{'all good' if good else 'NOT ALL GOOD'}, {time.perf_counter() - began:.0f} s")
    device.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
