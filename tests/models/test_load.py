"""How weights are loaded: copied into bands, or left in the mapped file; and where memory is short."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import powerinfer_files
import pytest

from hotcold import LLM, Engine
from hotcold.formats.errors import ParameterError
from hotcold.runtime import bands
from hotcold.runtime.memory import large_pages

Make = Callable[..., Path]
IDS = [int(i) for i in np.random.default_rng(3).integers(5, 290, 75)]
RELU = {"llama.hidden_activation": "relu"}


def ops(engine: Engine) -> dict[str, str]:
    """By matrix, the form that a dense step reads it in."""
    found = {}
    for node in engine._executor.tape.nodes:
        if node.op == "matmul":
            found[node.weight] = "bands" if engine._tensors.bands(node.weight) is not None else "rows"
    return found


def logits(path: Path, load: str, n_threads: int = 2) -> np.ndarray:
    with Engine(path, n_threads=n_threads, load=load) as engine:
        return np.array(engine.eval(engine.new_sequence(), IDS, all_logits=True))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K", "Q4_K"])
def test_copied_and_mapped_agree(tiny_model: Make, kind: str) -> None:
    """They quantise activations alike, and differ by the order of float32 sums only."""
    wide = {"n_embd": 256, "n_ff": 512} if kind.endswith("K") else {}
    path = tiny_model(qtype=kind, **wide)
    copied, mapped = logits(path, "copy"), logits(path, "mmap")
    assert not np.array_equal(copied, mapped)  # or the two were one
    error = np.sqrt(np.mean(np.square(copied - mapped))) / mapped.std()
    assert error < 0.02  # an activation's 8 bits may round to the other side
    np.testing.assert_array_equal(copied, logits(path, "copy", n_threads=1))


@pytest.mark.parametrize("kind", ["Q4_1", "Q3_K"])
def test_a_token_gets_the_same_as_in_a_prompt(tiny_model: Make, kind: str) -> None:
    wide = {"n_embd": 256, "n_ff": 512} if kind.endswith("K") else {}
    whole = logits(path := tiny_model(qtype=kind, **wide), "copy")
    with Engine(path, n_threads=2, load="copy") as engine:
        sequence = engine.new_sequence()
        rows = [np.array(engine.eval(sequence, [token])[0]) for token in IDS]
    np.testing.assert_array_equal(np.stack(rows), whole)


def test_what_is_copied(tiny_model: Make) -> None:
    """Quantised matrices that nobody reads row by row; a tied table is read both ways, from two places."""
    with Engine(tiny_model(qtype="Q8_0", tied=True), load="copy") as engine:
        assert set(ops(engine).values()) == {"bands"} and "token_embd.weight" in ops(engine)
    with Engine(tiny_model(qtype="F16", types={"blk.0.attn_q.weight": "Q8_0"}), load="copy") as engine:
        assert [name for name, form in ops(engine).items() if form == "bands"] == ["blk.0.attn_q.weight"]
    with Engine(tiny_model(qtype="Q8_0", metadata=RELU), sparsity="exact", load="copy") as engine:
        forms = {name.removeprefix("blk.0."): form for name, form in ops(engine).items() if "blk.0" in name}
        assert forms["ffn_up.weight"] == "rows" and forms["ffn_gate.weight"] == forms["attn_q.weight"] == "bands"
    with Engine(tiny_model(qtype="Q8_0"), load="mmap") as engine:
        assert set(ops(engine).values()) == {"rows"}


def test_short_memory(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(qtype="Q8_0")
    with Engine(path, n_ctx=64) as engine:
        size = sum(engine._tensors.info(name).nbytes for name in ops(engine)) + 64 * len(ops(engine))
        cache = engine.kv_bytes
    monkeypatch.setattr(bands, "available_bytes", lambda: cache + size // 2)
    with pytest.warns(UserWarning, match="weights are read from the mapped file, which is slower: a copy .* takes"):
        engine = Engine(path, n_ctx=64)
    with engine:
        assert set(ops(engine).values()) == {"rows"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(path, n_ctx=64, load="mmap").close()
        monkeypatch.setattr(bands, "available_bytes", lambda: size)
        Engine(path, n_ctx=64, load="copy").close()  # asked for, it may take all that is free
    monkeypatch.setattr(bands, "available_bytes", lambda: size // 2)
    with pytest.raises(ParameterError, match="load: got copy, but a copy of the weights takes .* are free; use mmap"):
        Engine(path, n_ctx=64, load="copy")
    monkeypatch.setattr(bands, "available_bytes", lambda: None)  # nobody tells
    with Engine(path, n_ctx=64) as engine:
        assert set(ops(engine).values()) == {"bands"}


def test_memory_that_the_system_does_not_give(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(qtype="Q8_0")

    def refuse(nbytes: int) -> np.ndarray:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(bands, "large_pages", refuse)
    with pytest.warns(UserWarning, match="the mapped file, which is slower: .* Cannot allocate memory"):
        engine = Engine(path, n_ctx=64)
    with engine:
        assert set(ops(engine).values()) == {"rows"}
    with pytest.raises(ParameterError, match="load: got copy, but .* Cannot allocate memory; use mmap"):
        Engine(path, n_ctx=64, load="copy")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_large_pages_are_large() -> None:
    """Where the system makes them for whom asks; memory of a mapping that is shared would have none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system has none")
    before = anonymous_large()
    array = large_pages(32 << 20)
    array[:] = 1
    assert anonymous_large() > before


def anonymous_large() -> int:
    """kB of this process in large anonymous pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("load", ["mmap", "copy"])
def test_powerinfer_files(tmp_path: Path, kind: str, load: str) -> None:
    """Their predictors are matrices of another file's names."""
    path = powerinfer_files.Tiny(qtype=kind).write(tmp_path / "tiny.powerinfer.gguf")
    with Engine(path, n_ctx=64, sparsity="predict", load=load) as engine:
        engine.eval(engine.new_sequence(), [5, 6, 7])
        forms = [form for name, form in ops(engine).items() if "ffn_pred" in name]
        assert forms and set(forms) == {"bands" if load == "copy" else "rows"}


def test_another_word(tiny_model: Make) -> None:
    for make in (Engine, LLM):
        with pytest.raises(ParameterError, match="load: got 'ram', wanted auto, mmap or copy"):
            make(tiny_model(qtype="Q8_0"), load="ram")
