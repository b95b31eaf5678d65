"""What the engine refuses, and that a refusal loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hotcold import LLM, Engine
from hotcold.formats.errors import ClosedError, ContextLengthError, ParameterError, UnsupportedError

Make = Callable[..., Path]
IDS = [5, 9, 250, 17]


@pytest.mark.parametrize("bad", [[-1], [300], [5, 10**12], [2**32 + 5], [-(2**40)]])
def test_ids_out_of_range(tiny_model: Make, bad: list[int]) -> None:
    with Engine(tiny_model(), n_threads=1) as engine:
        fresh, sequence = engine.new_sequence(), engine.new_sequence()
        engine.eval(sequence, IDS[:2])
        with pytest.raises(ParameterError) as caught:
            engine.eval(sequence, bad)
        assert "299" in str(caught.value)
        assert str(bad[-1]) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(sequence.tokens) == IDS[:2]
        wanted = engine.eval(fresh, IDS)[-1].copy()
        assert np.allclose(engine.eval(sequence, IDS[2:])[-1], wanted, atol=1e-3)


def test_the_context_can_be_filled_and_not_exceeded(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_ctx=32, n_threads=1) as engine:
        assert engine.n_ctx == 32
        sequence = engine.new_sequence()
        with pytest.raises(ContextLengthError, match="32"):
            engine.eval(sequence, [1] * 33)
        assert len(sequence) == 0
        engine.eval(sequence, [1] * 31)
        with pytest.raises(ContextLengthError):
            engine.eval(sequence, [1, 2])
        assert len(sequence) == 31
        assert np.isfinite(engine.eval(sequence, [2])).all()
        with pytest.raises(ContextLengthError):
            engine.eval(sequence, [3])
        sequence.truncate(30)
        engine.eval(sequence, [2, 3])
        assert len(sequence) == 32


def test_context_defaults_to_the_models(tiny_model: Make) -> None:
    with Engine(tiny_model(n_ctx_train=96)) as engine:
        assert engine.n_ctx == 96
        assert engine.n_threads >= 1


def test_context_is_capped_by_memory_and_never_nothing(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(n_ctx_train=2**31 - 1)
    for free, wanted in ((2**20, range(64, 2048)), (1, [32])):
        monkeypatch.setattr("hotcold.runtime.engine.available_bytes", lambda free=free: free)
        with Engine(path, n_threads=1) as engine:
            assert engine.n_ctx in wanted
            assert np.isfinite(engine.eval(engine.new_sequence(), IDS)).all()
    monkeypatch.undo()
    with Engine(path, n_threads=1) as engine:  # with whatever memory this machine has
        assert engine.n_ctx >= 32
        assert np.isfinite(engine.eval(engine.new_sequence(), IDS)).all()
    with Engine(tiny_model(n_ctx_train=16), n_threads=1) as engine:
        assert engine.n_ctx == 16


def test_a_context_beyond_all_memory_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model()
    for n_ctx in (2**30 + 1, 2**62, 10**30):
        with pytest.raises(ParameterError, match=f"n_ctx: got {n_ctx}, wanted 1 to {2**30}"):
            Engine(path, n_ctx=n_ctx)
        with pytest.raises(ParameterError, match="n_ctx"):
            LLM(path, n_ctx=n_ctx)

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError("no 128 GiB")

    monkeypatch.setattr("hotcold.runtime.engine.KVCache", fail)
    with pytest.raises(ParameterError, match="n_ctx: got 70, wanted less: out of memory .no 128 GiB."):
        Engine(path, n_ctx=70)
    monkeypatch.undo()
    monkeypatch.setattr("hotcold.runtime.engine.total_bytes", lambda: 2**20)
    with pytest.raises(ParameterError, match="n_ctx: got 100000, wanted at most [0-9]+: .* memory") as caught:
        Engine(path, n_ctx=100_000)
    limit = int(str(caught.value).split("at most ")[1].split(":")[0])
    with Engine(path, n_ctx=limit, n_threads=1) as engine:
        assert engine.n_ctx == limit and engine.kv_bytes < 2**20 + 2**15


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 0}, {"n_ctx": -5}, {"n_ctx": "9"}, {"n_threads": 0}, {"n_threads": -1}, {"n_threads": 2000}],
)
def test_bad_parameters(tiny_model: Make, options: dict[str, int]) -> None:
    with pytest.raises(ParameterError):
        Engine(tiny_model(), **options)  # type: ignore[arg-type]


def test_no_ids(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_threads=1) as engine:
        sequence = engine.new_sequence()
        with pytest.raises(ParameterError):
            engine.eval(sequence, [])
        assert len(sequence) == 0


def test_use_after_close(tiny_model: Make) -> None:
    engine = Engine(tiny_model(), n_threads=2)
    sequence = engine.new_sequence()
    engine.eval(sequence, IDS)
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(ClosedError):
        engine.eval(sequence, IDS)
    with pytest.raises(ClosedError):
        engine.new_sequence()
    with pytest.raises(ClosedError):
        engine.kv_bytes  # noqa: B018
    assert engine.weight_bytes > 0


def test_use_of_a_closed_sequence(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_threads=1) as engine:
        sequence = engine.new_sequence()
        sequence.close()
        sequence.close()
        with pytest.raises(ClosedError):
            engine.eval(sequence, IDS)


def test_a_type_without_kernels_is_named(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType as QType
    from tiny import make_tiny_model

    path = make_tiny_model(tmp_path / "iq.gguf", qtype="Q8_0", types={"blk.1.ffn_up.weight": "Q4_0"})
    data = bytearray(path.read_bytes())
    # The tensor list stores name, number of dimensions, dimensions, type: IQ4_NL has the block size of Q4_0.
    at = data.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16
    assert data[at] == QType.Q4_0
    data[at] = QType.IQ4_NL
    path.write_bytes(data)
    with pytest.raises(UnsupportedError) as caught:
        Engine(path)
    assert "blk.1.ffn_up.weight" in str(caught.value)
    assert "IQ4_NL" in str(caught.value)


def test_a_bad_batch_changes_nothing(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_ctx=600, n_threads=2) as engine:
        a, b = engine.new_sequence(), engine.new_sequence()
        engine.eval_batch([(a, IDS[:1]), (b, IDS[:2])])
        for batch, message in (
            ([], "got 0 sequences, wanted 1 to 128 different ones"),
            ([(a, [1]), (a, [2])], "got 2 sequences, wanted 1 to 128 different ones"),
            ([(a, [1]), (b, [])], "wanted a non-empty list"),
            ([(a, [1]), (b, [300])], "got 300"),
            ([(a, [1] * 300), (b, [1] * 213)], "got 513 tokens, wanted at most 512 in one step"),
        ):
            with pytest.raises(ParameterError, match=message):
                engine.eval_batch(batch)  # type: ignore[arg-type]
        assert (list(a.tokens), list(b.tokens)) == (IDS[:1], IDS[:2])
        got = engine.eval_batch([(a, IDS[1:]), (b, IDS[2:])])
        assert got.shape == (2, engine.n_vocab) and list(a.tokens) == list(b.tokens) == IDS
        assert np.allclose(got[0], engine.eval(engine.new_sequence(), IDS)[0], atol=1e-3)
        assert np.allclose(got[0], got[1], atol=1e-3)
