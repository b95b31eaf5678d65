"""Saved states: a new engine or LLM takes them up and says the same; others' and damaged files are refused."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import make_adapter, matrices

from hotcold import LLM, Engine
from hotcold.formats.errors import FormatError, ModelNotFoundError, StorageError
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.state import _HEAD, _TABLE_ROW, Saved

FIRST = [(7 * i + 3) % 290 for i in range(100)]
SECOND = FIRST[:64] + [(11 * i + 5) % 290 for i in range(50)]
OTHER = [(13 * i + 1) % 290 for i in range(20)]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(n_ctx_train=512)


def opened(model: Path, **options: Any) -> Engine:
    return Engine(model, **{"n_ctx": 512, "n_threads": 2, **options})


def feed(engine: Engine, *prompts: list[int]) -> None:
    for ids in prompts:
        with closing(engine.new_sequence()) as sequence:
            sequence.adopt(ids)
            engine.eval(sequence, ids[len(sequence) :])
            sequence.share(tail=True)


def save(engine: Engine, path: Path) -> int:
    with closing(engine.snapshot()) as snapshot:
        snapshot.write(path)
        return snapshot.n_tokens


def restore(engine: Engine, path: Path) -> int:
    with engine.saved(path) as saved:
        return saved.restore()


def known(engine: Engine, ids: list[int]) -> int:
    with closing(engine.new_sequence()) as sequence:
        return sequence.adopt([*ids, 0])


@pytest.fixture
def saved(model: Path, tmp_path: Path) -> Path:
    with opened(model) as engine:
        feed(engine, FIRST, SECOND, OTHER)
        assert save(engine, tmp_path / "state") == 100 + 50 + 20
    return tmp_path / "state"


def test_a_new_engine_goes_on_from_it(model: Path, saved: Path) -> None:
    more = [9, 8, 7]
    with opened(model) as engine:
        before = engine.cache.n_used
        assert restore(engine, saved) == 170
        assert [known(engine, ids) for ids in (FIRST, SECOND, OTHER, [5, 5])] == [100, 114, 20, 0]
        for ids in (FIRST, SECOND, OTHER):
            with closing(engine.new_sequence()) as taken, closing(engine.new_sequence()) as fresh:
                assert taken.adopt([*ids, 0]) == len(ids)
                wanted = engine.eval(fresh, ids)
                wanted = np.array(engine.eval(fresh, more))
                np.testing.assert_array_equal(engine.eval(taken, more), wanted)
        engine.cache.prefixes.clear()
        assert engine.cache.n_used == before  # nobody else holds a block


def test_saving_what_was_restored_gives_the_same_blocks(model: Path, saved: Path, tmp_path: Path) -> None:
    with opened(model) as engine:
        restore(engine, saved)
        assert restore(engine, saved) == 0  # again is no harm
        assert save(engine, tmp_path / "again") == 170
    with opened(model) as engine:
        assert restore(engine, tmp_path / "again") == 170
    blocks = [set(_data(path)) for path in (saved, tmp_path / "again")]
    assert blocks[0] == blocks[1] and len(blocks[0]) > 5


def _data(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    n = _HEAD.unpack_from(raw)[-1]
    start = _HEAD.size + 4 * n * _TABLE_ROW
    size = (len(raw) - 32 - start) // n
    return [raw[start + i * size : start + (i + 1) * size] for i in range(n)]


@pytest.mark.parametrize("written", [0, 2])
def test_answers_have_their_room_while_a_state_is_written(model: Path, tmp_path: Path, written: int) -> None:
    prompts = [[i] * 40 for i in (5, 6)]
    with closing(opened(model, n_ctx=96)) as engine:
        feed(engine, *prompts)
        save(engine, tmp_path / "quiet")
        with closing(engine.snapshot()) as snapshot:
            held = engine.cache.n_used
            pieces = snapshot._pieces

            def interrupted(row: int) -> list[bytes]:
                if row == written:
                    snapshot._pieces = pieces  # type: ignore[method-assign]
                    snapshot._lock.release()
                    with closing(engine.new_sequence()) as sequence:
                        engine.eval(sequence, [7] * 96)  # all that there is
                    snapshot._lock.acquire()
                    return snapshot._copies.pop(row)
                return pieces(row)

            snapshot._pieces = interrupted  # type: ignore[method-assign]
            snapshot.write(tmp_path / "busy")
            assert engine.cache.n_used < held and not engine.cache.lenders
    assert (tmp_path / "busy").read_bytes() == (tmp_path / "quiet").read_bytes()


def test_lanes_of_others_are_not_saved(model: Path, tmp_path: Path) -> None:
    """A block that was longer once: what followed in it is zero in the file."""
    with opened(model) as engine:
        feed(engine, OTHER + [1, 2, 3, 4])
        engine.cache.prefixes.clear()
        feed(engine, OTHER)  # in the same block, whose last lanes still hold the former
        save(engine, tmp_path / "state")
    data = np.frombuffer(_data(tmp_path / "state")[0], np.float16)
    keys = data[: data.size // 2].reshape(2, -1, KV_BLOCK)  # tiny models have keys and values of one size
    assert keys[:, :, : len(OTHER)].any(axis=(0, 1)).all() and not keys[:, :, len(OTHER) :].any()


def test_a_smaller_cache_takes_what_was_used_last(model: Path, saved: Path) -> None:
    with opened(model, n_ctx=KV_BLOCK * 2) as engine:
        assert restore(engine, saved) > 0
        assert known(engine, OTHER) == 20
        assert known(engine, FIRST[:64]) in (0, 32, 64)


def test_running_sequences_keep_their_room(model: Path, saved: Path) -> None:
    with opened(model, n_ctx=64) as engine, closing(engine.new_sequence()) as sequence:
        logits = np.array(engine.eval(sequence, FIRST[:60]))
        restore(engine, saved)
        with closing(engine.new_sequence()) as again:
            sequence.truncate(59)
            np.testing.assert_allclose(engine.eval(sequence, FIRST[59:60]), logits, atol=1e-4)
            again.close()


def test_another_model_or_settings(model: Path, saved: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    make_adapter(adapter, matrices(model))
    others: list[tuple[Path, dict[str, Any]]] = [
        (tiny_model(n_ctx_train=512, seed=1), {}),  # the same shapes
        (tiny_model(n_ctx_train=512, rope_base=20000.0), {}),
        (tiny_model(n_ctx_train=512, n_layer=3), {}),
        (model, {"lora": [adapter]}),
    ]
    for path, options in others:
        with opened(path, **options) as engine:
            with pytest.raises(FormatError, match="state: got another model's") as caught:
                restore(engine, saved)
        assert "\n" not in str(caught.value) and str(saved) in str(caught.value)
    with opened(model, lora=[adapter]) as engine:
        feed(engine, OTHER)
        save(engine, tmp_path / "adapted")
        assert restore(engine, tmp_path / "adapted") == 0
    with opened(model, lora=[(adapter, 0.5)]) as engine, pytest.raises(FormatError, match="another model's"):
        restore(engine, tmp_path / "adapted")
    with opened(model, n_threads=1, n_ctx=128) as engine:  # which do not matter
        assert restore(engine, saved) == 170


def test_torn_and_foreign_files(model: Path, saved: Path, tmp_path: Path) -> None:
    raw, bad = saved.read_bytes(), tmp_path / "bad"
    with opened(model) as engine:
        for data, message in (
            (b"", "magic"),
            (b"GGUF" + raw[4:], "magic"),
            (raw[:40], "magic"),
            (raw[:8] + struct.pack("<I", 3) + raw[12:], "version: got 3"),
            (raw[:-1], "size: got .* torn"),
            (raw + b"x", "size: got"),
            (raw[: _HEAD.size + 10], "size: got"),
            (raw[: _HEAD.size - 4] + struct.pack("<I", 2**32 - 1) + raw[_HEAD.size :], "size: got"),
            (raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:], "checksum"),
        ):
            bad.write_bytes(data)
            with pytest.raises(FormatError, match=message) as caught:
                restore(engine, bad)
            assert "\n" not in str(caught.value)
        with pytest.raises(ModelNotFoundError, match="no such file"):
            restore(engine, tmp_path / "none")
        with pytest.raises(ModelNotFoundError, match="regular file"):
            restore(engine, tmp_path)
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "pipe")
            with pytest.raises(ModelNotFoundError, match="regular file"):
                restore(engine, tmp_path / "pipe")
        assert engine.cache.n_used == 0


@pytest.mark.parametrize(
    ("column", "value"), [(0, 5), (0, -2), (0, 0), (1, 0), (1, KV_BLOCK + 1), (1, -1), (2, 300), (2, -1)]
)
def test_hostile_tables(model: Path, saved: Path, column: int, value: int) -> None:
    """Checksums that fit do not help: parents that come later, or are not full, wrong counts and ids."""
    raw = bytearray(saved.read_bytes())
    n = _HEAD.unpack_from(raw)[-1]
    table = np.frombuffer(raw, "<i4", n * _TABLE_ROW, _HEAD.size).reshape(n, _TABLE_ROW)
    if (column, value) == (0, 0):  # a child of a block that is not full
        table[0, 1] = KV_BLOCK - 1
        table[1, 0] = 0
    else:
        table[0, column] = value
    raw[-32:] = hashlib.sha256(raw[:-32]).digest()
    saved.write_bytes(raw)
    with opened(model) as engine, pytest.raises(FormatError, match="table of blocks"):
        engine.saved(saved)


def test_a_failed_write_leaves_the_former_file(
    model: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    former = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(model) as engine:
        feed(engine, FIRST)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="No space left"):
            save(engine, saved)
        monkeypatch.undo()
        with pytest.raises(StorageError, match="none.*name a file"):
            save(engine, tmp_path / "none" / "state")
    assert saved.read_bytes() == former
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_nothing_is_a_state_too(model: Path, tmp_path: Path) -> None:
    with opened(model) as engine:
        assert save(engine, tmp_path / "state") == 0
        assert restore(engine, tmp_path / "state") == 0


def test_a_file_that_shrinks_meanwhile(model: Path, saved: Path) -> None:
    with opened(model) as engine, engine.saved(saved) as file:
        os.truncate(saved, _HEAD.size + 500)
        assert isinstance(file, Saved)
        with pytest.raises(FormatError, match="shorter"):
            file.restore()
        assert engine.cache.n_used == 0


GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
TEXT = "the cat and the hello world " * 6


def test_llm_state(model: Path, tmp_path: Path) -> None:
    with LLM(model, n_ctx=256, n_threads=2) as llm:
        wanted = llm.generate(TEXT, **GREEDY)
        n_prompt = llm.stats().prompt_tokens
        llm.save_state(tmp_path / "state")
        assert llm.generate(TEXT, **GREEDY) == wanted
    with LLM(model, n_ctx=256, n_threads=2) as llm:
        assert llm.load_state(tmp_path / "state") >= n_prompt
        assert llm.generate(TEXT, **GREEDY) == wanted
        assert llm.stats().reused_tokens >= n_prompt - KV_BLOCK
    with LLM(model, n_ctx=256, n_threads=2) as llm:
        assert llm.generate(TEXT, **GREEDY) == wanted
        assert llm.stats().reused_tokens == 0


def test_prompt_cache(model: Path, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    path = tmp_path / "cache"
    reused = []
    for _ in range(3):
        with LLM(model, n_ctx=256, n_threads=2, prompt_cache=path) as llm:
            llm.generate(TEXT, **GREEDY)
            reused.append(llm.stats().reused_tokens)
            llm.generate(TEXT[::-1], **GREEDY)
    assert reused[0] == 0 and min(reused[1:]) > 32
    before = path.read_bytes()
    with pytest.raises(FormatError, match="another model's"):
        LLM(tiny_model(seed=1), prompt_cache=path)
    with pytest.raises(FormatError, match="magic"):
        LLM(model, prompt_cache=model)  # a slip that must not cost a model
    assert path.read_bytes() == before


def test_an_unused_llm_leaves_the_cache_as_it_is(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with LLM(model, n_ctx=256, prompt_cache=path):
        pass
    assert not path.exists()
