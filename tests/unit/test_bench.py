"""The benchmark: what it evaluates and reports, and the child process that runs the peer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from hotcold.formats.errors import UnsupportedError
from hotcold.tools import bench
from hotcold.tools.cli import app


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


class FakeSide:
    """A side whose times are given; notes in which order it was asked."""

    def __init__(self, name: str, order: list[str], times: Sequence[float], rates: Sequence[float] = ()) -> None:
        self.name, self.order, self.times, self.rates = name, order, list(times), list(rates)
        self.load_s, self.first_token_s = 1.0, 2.0

    def prompt(self, ids: list[int]) -> float:
        self.order.append(f"{self.name} prompt {len(ids)}")
        return self.times[0]

    def decode(self, first: int, n: int) -> float:
        self.order.append(f"{self.name} decode {n}")
        return self.times.pop(0)

    def read_rate(self) -> float | None:
        return self.rates.pop(0) if self.rates else None

    def peak_rss(self) -> int | None:
        return 5


def test_measure_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    order: list[str] = []
    sides = [FakeSide("a", order, [9, 1, 2, 4]), FakeSide("b", order, [9, 8, 8, 8])]
    ours, theirs = bench.measure(sides, [1] * 16, 32, 3)
    assert order == ["a prompt 16", "b prompt 16", "a decode 32", "b decode 32"] * 4
    assert (ours["prompt_tok_s"], ours["decode_tok_s"]) == (8.0, 16.0)
    assert (theirs["prompt_tok_s"], theirs["decode_tok_s"]) == (2.0, 4.0)
    assert (ours["load_s"], ours["first_token_s"], ours["peak_rss_bytes"]) == (1.0, 2.0, 5)


def test_reading_is_measured_before_and_after_each_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    sides = [FakeSide("a", [], [9, 1, 2, 4], [1, 1, 20, 40, 5, 7, 90, 110]), FakeSide("b", [], [9, 8, 8, 8])]
    ours, theirs = bench.measure(sides, [1] * 16, 32, 3)
    assert ours["read_bytes_s"] == 30 and theirs["read_bytes_s"] is None
    assert not sides[0].rates
    assert bench.reads(200, 10, 8000) == {
        "bytes_per_token": 200,
        "decode_bytes_s": 2000,
        "memory_bytes_s": 8000,
        "share": 0.25,
    }


def test_token_ids_are_valid_and_always_the_same() -> None:
    ids = bench.token_ids(50, 1000)
    assert ids == bench.token_ids(50, 1000) and set(ids) == set(range(50))


def fake_engine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    class Engine(fakes.FakeEngine):
        def __init__(self, path: Path, *, n_ctx: int, n_threads: int | None, sparsity: str, **rest: Any) -> None:
            assert sparsity == "auto" and rest["placement"] is rest["trace"] is None
            super().__init__(lambda tokens: None, n_ctx)
            self.n_threads = n_threads or 2
            made.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    class Reader:
        def rate(self, seconds: float) -> float:
            return 8e9

        def close(self) -> None:
            assert not made[-1].closed

    monkeypatch.setattr("hotcold.runtime.engine.Engine", Engine)
    monkeypatch.setattr("hotcold.runtime.limits.reader_of", lambda engine, progress: Reader())
    monkeypatch.setattr("hotcold.runtime.limits.bytes_outside_ffn", lambda engine: 1 << 20)
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    return made


# As much of llama_cpp as the child process calls; it "computes" the next token as the sum of all so far.
PEER = """
import ctypes, os, types
__version__ = "0"
llama_token = ctypes.c_int32
print("noise on stdout that is no reply")
class Context:
    tokens = ()
def llama_model_default_params(): return types.SimpleNamespace()
def llama_context_default_params(): return types.SimpleNamespace()
def llama_model_load_from_file(path, params): return None if b"broken" in path else "model"
def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch == 2 and params.n_ctx == 256
    return Context()
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return 8
def llama_get_memory(context): return context
def llama_memory_clear(context, data): context.tokens = ()
def llama_batch_get_one(array, n): return list(array)
def llama_decode(context, batch):
    context.tokens += tuple(batch)
    return 0
def llama_get_logits_ith(context, i):
    row = (ctypes.c_float * 8)()
    row[sum(context.tokens) % 8] = 1
    return ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
def llama_log_callback(function): return function
def llama_log_set(callback, data): pass
def llama_backend_init(): print("more noise", flush=True)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_bench_json(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    fake_engine(monkeypatch)
    result = invoke("bench", str(tiny_model()), "-p", "20", "-n", "4", "-r", "2", "-t", "2", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"] == str(tiny_model()) and report["threads"] == 2
    for key in ("prompt_tok_s", "decode_tok_s", "load_s", "first_token_s"):
        assert report[key] > 0
    assert report["ffn"]["sparsity"] == "dense" and report["ffn"]["active"] == 1
    assert report["peak_rss_bytes"] is None or report["peak_rss_bytes"] > 1 << 20
    assert "peer" not in report
    read = report["read"]
    assert read["bytes_per_token"] == 1 << 20 and read["memory_bytes_s"] == 8e9
    assert read["share"] == pytest.approx(report["decode_tok_s"] * (1 << 20) / 8e9)


def test_bench_evaluates_what_it_says(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    made = fake_engine(monkeypatch)
    result = invoke("bench", str(tiny_model()), "-p", "20", "-n", "4", "-r", "2")
    assert result.exit_code == 0 and "prompt 20 (tok/s)" in result.stdout
    assert "decode reads 1.0 MiB of weights a token" in result.stdout and "of the 8.0 at which" in result.stdout
    assert made[0].calls == [8] + [20, 1, 1, 1, 1] * 3 and made[0].n_ctx == 256 and made[0].closed


def test_bench_against(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], peer: None) -> None:
    fake_engine(monkeypatch)
    arguments = [
        "bench",
        str(tiny_model()),
        "-p",
        "20",
        "-n",
        "4",
        "-r",
        "1",
        "--against",
        "llama-cpp-python",
    ]
    report = json.loads(invoke(*arguments, "--json").stdout)
    assert "read_bytes_s" not in report and "read_bytes_s" not in report["peer"]
    keys = {"model", "threads", "prompt_tok_s", "decode_tok_s", "load_s", "first_token_s", "peak_rss_bytes"}
    assert keys <= set(report["peer"]) and report["peer"]["prompt_tok_s"] > 0
    assert report["ratio"]["prompt"] == report["prompt_tok_s"] / report["peer"]["prompt_tok_s"]
    assert report["ratio"]["decode"] == report["decode_tok_s"] / report["peer"]["decode_tok_s"]
    table = invoke(*arguments, "--peer-python", sys.executable).stdout
    assert "llama-cpp-python" in table and "x\n" in table


def test_the_peer_decodes_greedily(peer: None) -> None:
    theirs = bench.Theirs(Path(sys.executable), Path("model.gguf"), 256, 2, 8)
    try:
        assert theirs.load_s <= theirs.first_token_s
        assert theirs.prompt([1, 2, 3]) > 0 and theirs.decode(1, 5) > 0
    finally:
        theirs.close()
    assert theirs.process.returncode is not None


@pytest.mark.parametrize(
    ("python", "model", "says"),
    [
        (sys.executable, "broken.gguf", "could not load"),
        (str(Path(__file__)), "m.gguf", "wanted an interpreter"),
        ("nosuch-python", "m.gguf", "wanted an interpreter"),
    ],
)
def test_a_peer_that_does_not_work(peer: None, python: str, model: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        bench.Theirs(Path(python), Path(model), 256, 2, 8)


def test_a_python_without_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no llama here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no llama here; install it there"):
        bench.Theirs(Path(sys.executable), Path("m.gguf"), 256, 2, 8)
