"""`hotcold inspect` on every family: its name, what sets it apart, and the memory that it will need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BY_NAME
from typer.testing import CliRunner

from hotcold.runtime.engine import Engine
from hotcold.solver.convert import convert
from hotcold.tools.cli import app
from hotcold.tools.console import human_bytes

ARCHITECTURES = {
    "falcon": "falcon", "gemma2": "gemma2", "gptneox": "gptneox", "llama": "llama", "mistral": "llama",
    "mixtral": "llama", "olmo3": "olmo2", "phi3": "phi3", "stablelm": "stablelm",
}  # fmt: skip
FEATURES: list[tuple[str, str, str]] = [
    ("gemma2", "attention", "sliding window of 8 tokens in 1 of 2 layers; scores capped softly at 2"),
    ("gemma2", "also", "tied embeddings; logits capped softly at 5; embeddings times 8"),
    ("gemma3", "positions", "base 1e+06; base 10000 in layers with a window; linear scaling by 8"),
    ("gemma3", "norms", "RMS norms before and after attention and FFN; of queries and keys, by head"),
    ("olmo2", "norms", "RMS norms after attention and FFN; of queries and keys, over all heads"),
    ("gpt2", "positions", "learned"),
    ("gpt2", "FFN", "GELU (tanh), without a gate"),
    ("gptneox", "norms", "layer norms before attention and FFN; attention and FFN in parallel"),
    ("gptneox", "FFN", "GELU (erf), without a gate"),
    ("falcon-7b", "attention", "1 of keys and values"),
    ("phi3-longrope", "positions", "longrope scaling"),
    ("stablelm", "positions", "rotary of 4 dimensions of each head, NeoX order"),
    ("mixtral", "FFN", "4 experts of"),
    ("mixtral", "FFN", "2 for each token; SiLU, gated"),
    ("opt", "also", "biases of queries, keys and values, attention's output, the FFN"),
    ("opt", "FFN", "ReLU, without a gate; zeros are skipped"),
    ("bamboo", "FFN", "ReLU of gate and up"),
    ("granite", "also", "embeddings times 3, residual sums times 0.6, logits times 0.5"),
]


def inspected(name: str, tmp_path: Path, *options: str) -> Any:
    path = convert(BY_NAME[name].folder, tmp_path / "m.gguf", "f32").path
    result = CliRunner().invoke(app, ["inspect", str(path), *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)["model"] if options else result.output


@pytest.mark.parametrize("name", [family for family in BY_NAME if family != "phi3-longrope-short"])
def test_family_and_features(name: str, tmp_path: Path) -> None:
    report = inspected(name, tmp_path, "--json")
    known = next((arch for prefix, arch in ARCHITECTURES.items() if name.startswith(prefix)), name)
    assert report["family"] == known
    for family, feature, text in FEATURES:
        if family == name:
            assert text in report["features"][feature]


def test_memory(tmp_path: Path) -> None:
    path = convert(BY_NAME["qwen2"].folder, tmp_path / "m.gguf", "f32").path
    text = CliRunner().invoke(app, ["inspect", str(path)]).output
    memory = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)["model"]["memory"]
    with Engine(path) as engine:
        assert memory["n_ctx"] == engine.n_ctx
        assert memory["weights"] == engine.weight_bytes
        c = engine.config
        assert memory["kv_cache_per_token"] == c.n_layer * c.n_head_kv * 2 * c.head_dim_k * 2 + 4 * c.rope_dim
        values = [array for array in engine._executor.tape.buffers.values() if isinstance(array, np.ndarray)]
        assert 0.3 < sum(array.nbytes for array in values) / memory["working"] < 4  # an estimate
    cache = memory["kv_cache_per_token"] * memory["n_ctx"]
    assert memory["total"] == memory["weights"] + cache + memory["working"]
    assert f"memory         {human_bytes(memory['total'])}: weights" in text


def test_what_cannot_be_run_is_still_shown(tmp_path: Path) -> None:
    path = convert(BY_NAME["qwen2"].folder, tmp_path / "m.gguf", "f32").path
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0mamba", 1))
    text = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert "not supported: architecture 'mamba' is not supported; supported: arcee, " in text
    assert "token_embd.weight" in text
