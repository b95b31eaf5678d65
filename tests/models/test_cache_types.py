"""Keys and values as q8_0 and q4_0: close to f16's logits, the same bits however computed, saved, counted, refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotcold import LLM, Engine
from hotcold.formats.errors import FormatError, ParameterError, UnsupportedError
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.engine import token_bytes
from hotcold.runtime.kv_types import KVTypes

IDS = [(7 * i + 3) % 290 for i in range(90)]
PAIRS = [("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0")]
# Of random weights, whose answers hang on noise more than a trained model's: largest distance of logits, by the spread.
FAR = {("q8_0", "q8_0"): 0.1, ("q4_0", "q4_0"): 1.0, ("q8_0", "q4_0"): 1.0}


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(n_ctx_train=512, n_embd=128, n_head=4, n_head_kv=2)  # heads of 32


def opened(model: Path, pair: tuple[str, str] = ("f16", "f16"), **options: Any) -> Engine:
    keys, values = pair
    return Engine(model, **{"n_ctx": 256, "n_threads": 2, "cache_type_k": keys, "cache_type_v": values, **options})


@pytest.mark.parametrize("pair", PAIRS)
def test_logits(model: Path, pair: tuple[str, str]) -> None:
    with opened(model) as plain, opened(model, pair) as engine:
        wanted = plain.eval(plain.new_sequence(), IDS, all_logits=True).copy()
        got = engine.eval(engine.new_sequence(), IDS, all_logits=True)
        distance = np.abs(got - wanted).max() / wanted.std()
        assert 0 < distance < FAR[pair]


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_beginnings_and_copies(model: Path, pair: tuple[str, str]) -> None:
    """A sequence that takes up another's blocks, and the begun one among them, says the same to the bit."""
    with opened(model, pair, n_parallel=2) as engine, closing(engine.new_sequence()) as first:
        engine.eval(first, IDS[:-1])
        first.share(tail=True)
        with closing(engine.new_sequence()) as second:
            assert second.adopt(IDS) == len(IDS) - 1
            got = engine.eval(second, IDS[-1:]).copy()
        np.testing.assert_array_equal(engine.eval(first, IDS[-1:]), got)


@pytest.mark.parametrize("pair", PAIRS)
def test_saved_states(model: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    with opened(model, pair) as engine:
        with closing(engine.new_sequence()) as sequence:
            wanted = engine.eval(sequence, IDS).copy()
            sequence.truncate(len(IDS) - 1)
            sequence.share(tail=True)
        with closing(engine.snapshot()) as snapshot:
            snapshot.write(tmp_path / "state")
    with opened(model, pair) as engine, closing(engine.new_sequence()) as sequence:
        with engine.saved(tmp_path / "state") as saved:
            assert saved.restore() == len(IDS) - 1
        assert sequence.adopt(IDS) == len(IDS) - 1
        np.testing.assert_allclose(engine.eval(sequence, IDS[-1:]), wanted, rtol=0, atol=1e-4)
    with opened(model) as engine, pytest.raises(FormatError, match="cache types: got 'q._0' keys") as caught:
        engine.saved(tmp_path / "state")
    assert "\n" not in str(caught.value)


def test_bytes(model: Path) -> None:
    """Blocks of 32 take 34 and 18 bytes, as ggml's."""
    with opened(model) as engine:
        config, plain = engine.config, engine.kv_bytes
    per_group = {"f16": 64, "q8_0": 34, "q4_0": 18}
    for pair in PAIRS:
        groups = config.n_layer * config.n_head_kv * config.head_dim_k // 32
        per_token = groups * sum(per_group[kind] for kind in pair)
        with opened(model, pair) as engine:
            assert engine.kv_bytes * 128 == plain * sum(per_group[kind] for kind in pair)
            assert engine.kv_bytes == per_token * (256 + KV_BLOCK)
        types = KVTypes.parse(*pair)
        assert token_bytes(config, types) - token_bytes(config) == per_token - groups * 128


def test_refusals(model: Path, tiny_model: Callable[..., Path]) -> None:
    wanted = "cache_type_k: got 'q5_1', wanted one of f16, q8_0, q4_0"
    for make in (Engine, LLM):
        with pytest.raises(ParameterError, match=wanted):
            make(model, cache_type_k="q5_1")
    with pytest.raises(ParameterError, match="cache_type_v: got 8"):
        Engine(model, cache_type_v=8)  # type: ignore[arg-type]
    small = tiny_model(n_embd=64, n_head=4, n_head_kv=2)  # heads of 16
    with pytest.raises(UnsupportedError, match="cache_type_v: q4_0 needs heads of a multiple of 32 dims"):
        Engine(small, cache_type_v="q4_0")
    with pytest.raises(UnsupportedError, match="a GPU keeps keys and values as f16"):
        Engine(model, cache_type_k="q8_0", placement=object())  # type: ignore[arg-type]
