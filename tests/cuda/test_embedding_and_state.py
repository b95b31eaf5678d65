"""What a GPU allows beside answers: embeddings where the output is the CPU's; no adapters, no saved states."""

from __future__ import annotations

from pathlib import Path

import cuda_simulator  # noqa: F401
import numpy as np
import pytest
import tiny
from adapters import make_adapter, matrices

from hotcold import LLM, Engine
from hotcold.formats.errors import UnsupportedError
from hotcold.formats.section import Placement

N_FF = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": N_FF}  # the simulator is slow
    return tiny.make_tiny_model(tmp_path_factory.mktemp("model") / "plain.gguf", **sizes)


def placed(head: bool) -> Placement:
    hot = tuple(np.arange(n, dtype=np.int32) for n in (32, N_FF))
    return Placement(hot, (True, True), head, 64, 1 << 30, 32, "cpu", "ours", "simulator")


def test_embeddings_with_the_output_on_the_cpu(model: Path) -> None:
    ids = [5, 9, 200, 31]
    with LLM(model, n_ctx=64, n_threads=2, sparsity="dense") as llm:
        wanted = llm.embed(ids).array
    with LLM(model, n_ctx=64, n_threads=2, sparsity="dense", placement=placed(head=False)) as llm:
        found = llm.embed([ids, ids[:2]]).array
        assert llm.engine.cache.n_used == 0
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)


def test_what_a_gpu_refuses(model: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter.gguf", matrices(model))
    with pytest.raises(UnsupportedError, match="lora: .* VRAM budget"):
        Engine(model, placement=placed(head=True), lora=[tmp_path / "adapter.gguf"])
    options = {"n_ctx": 64, "n_threads": 2, "placement": placed(head=True)}
    with LLM(model, **options) as llm:  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match="embeddings: .* VRAM budget"):
            llm.embed([5, 9])
        with pytest.raises(UnsupportedError, match="state: .* VRAM budget"):
            llm.save_state(tmp_path / "state")
        with pytest.raises(UnsupportedError, match="state: .* VRAM budget"):
            llm.load_state(tmp_path / "state")
        assert llm.engine.cache.n_used == 0
    with pytest.raises(UnsupportedError, match="state: .* VRAM budget"):
        LLM(model, prompt_cache=tmp_path / "cache", **options)  # type: ignore[arg-type]
