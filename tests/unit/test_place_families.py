"""Placements of every family: bytes of what is named here by hand, times of mixtures of experts, whole experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hotcold.formats.config import ModelConfig
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section import find_section
from hotcold.formats.section_file import update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import vram
from hotcold.runtime.cuda import repack
from hotcold.solver import costs, placement, profile
from hotcold.solver.hardware import Hardware
from hotcold.tools.cli import app

Make = Callable[[str], Path]
MACHINE = Hardware("test", {1: 1e9}, 1e11, 1e-6, 1e10, 2e-6, 1e-7, 2**34, 2**34, 16)
QKVO = "attn_q.weight attn_k.weight attn_v.weight attn_output.weight"
QKVO_BIASES = "attn_q.bias attn_k.bias attn_v.bias attn_output.bias"
GATED = "ffn_gate.weight ffn_up.weight"
EXPERTS = "ffn_gate_exps.weight ffn_up_exps.weight"
# Beside ffn_down and the KV cache: attention's tensors, the FFN's that are there once, and those with rows by neuron.
TENSORS = {
    "llama-rope3-bias": (f"attn_norm.weight {QKVO} {QKVO_BIASES}", "ffn_norm.weight ffn_down.bias",
                         f"{GATED} ffn_gate.bias ffn_up.bias"),
    "opt": (f"attn_norm.weight attn_norm.bias {QKVO} {QKVO_BIASES}", "ffn_norm.weight ffn_norm.bias ffn_down.bias",
            "ffn_up.weight ffn_up.bias"),
    "gpt2": (f"attn_norm.weight attn_norm.bias {QKVO} {QKVO_BIASES}", "ffn_norm.weight ffn_norm.bias ffn_down.bias",
             "ffn_up.weight ffn_up.bias"),
    "falcon-7b": (f"attn_norm.weight attn_norm.bias {QKVO}", "attn_norm.weight attn_norm.bias", "ffn_up.weight"),
    "falcon-40b": (f"attn_norm_2.weight attn_norm_2.bias {QKVO}", "attn_norm.weight attn_norm.bias", "ffn_up.weight"),
    "phi3": (f"attn_norm.weight {QKVO}", "ffn_norm.weight", GATED),
    "gemma2": (f"attn_norm.weight {QKVO} post_attention_norm.weight", "ffn_norm.weight post_ffw_norm.weight", GATED),
    "olmo2": (f"{QKVO} attn_q_norm.weight attn_k_norm.weight post_attention_norm.weight", "post_ffw_norm.weight",
              GATED),
    "mixtral": (f"attn_norm.weight {QKVO}", "ffn_norm.weight ffn_gate_inp.weight", EXPERTS),
    "olmoe": (f"attn_norm.weight {QKVO} attn_q_norm.weight attn_k_norm.weight", "ffn_norm.weight ffn_gate_inp.weight",
              EXPERTS),
}  # fmt: skip
BY_NEURON = "ffn_down.bias"  # without hot neurons only: the CPU adds it where there are cold ones


def found(path: Path, sparsity: str = "auto") -> costs.Costs:
    with GGUFFile(path) as model:
        config = ModelConfig.from_gguf(model)
        section = find_section(model, config)
        try:
            return costs.costs(model, config, section, MACHINE, capacity=10**7, n_ctx=64, threads=1, sparsity=sparsity)
        finally:
            if section is not None:
                section.close()


def driver_bytes(nbytes: int) -> int:
    unit = 2**21 if nbytes > 2**20 else 512
    return (nbytes + unit - 1) // unit * unit


def loaded(n: int, k: int) -> int:
    """Bytes of an actual packed F32 matrix."""
    arrays = repack.pack("F32", np.zeros((n, 4 * k), np.uint8), k)
    return sum(driver_bytes(array.nbytes) for array in arrays)


def bytes_of(model: GGUFFile, names: str, n_hot: int | None = None) -> int:
    """Of layer 1's tensors on the GPU, whole or the rows of so many neurons."""
    total = 0
    for name in names.split():
        info = model.info(f"blk.1.{name}")
        assert info.type == GGMLType.F32
        if name.endswith("bias") or "norm" in name:
            total += driver_bytes(4 * (n_hot or int(np.prod(info.shape))))
        else:
            total += loaded(n_hot or int(np.prod(info.shape[1:])), info.shape[0])
    return total


@pytest.mark.parametrize("name", TENSORS)
def test_bytes_are_those_of_the_tensors(family_file: Make, name: str) -> None:
    problem = found(family_file(name), "dense").problem
    attention, once, by_neuron = TENSORS[name]
    layer = problem.layers[1]
    with GGUFFile(family_file(name)) as model:
        c = ModelConfig.from_gguf(model)
        kv = vram.kv_bytes(c, 64)
        assert layer.attention.nbytes == bytes_of(model, attention) + 2 * driver_bytes(kv // 2)
        group = c.expert_neurons if c.n_expert else 64
        for k, n in enumerate([*range(0, c.n_ff, group), c.n_ff]):
            kept = " ".join(tensor for tensor in once.split() if tensor != BY_NEURON or n == c.n_ff)
            wanted = bytes_of(model, kept) + bytes_of(model, by_neuron, n) if n else 0
            if n and c.n_expert:
                wanted += loaded(n, c.n_embd) + driver_bytes(4 * n // group)  # down by neurons, and which experts
            elif n:
                wanted += loaded(n, c.n_embd) if n < c.n_ff else loaded(c.n_embd, c.n_ff)
            assert layer.nbytes[k] == wanted, (k, n)
        head = [driver_bytes(4 * c.n_embd)] * (1 + c.has("output_norm.bias")) + [loaded(c.n_vocab, c.n_embd)]
    assert problem.head.nbytes == sum(head) and problem.group == group


@pytest.mark.parametrize("name", ["opt", "nemotron"])
def test_without_a_gate_up_is_read_always_and_down_seldom(family_file: Make, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(family_file(name).read_bytes())
    freq = np.random.default_rng(0).random((2, 96)).astype(np.float32)
    update_section(path, profile.contents(freq, 10, "text", "exact"))
    layer = found(path, "exact").problem.layers[1]
    assert (layer.order == np.argsort(-freq[1], kind="stable")).all()
    assert layer.cold[0] == pytest.approx(4 * 64 * (96 + freq[1].sum(dtype=np.float64)) / 1e9)


@pytest.fixture
def mixture(family_file: Make, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """OLMoE's file with a profile of its 8 experts, [2, 8]."""
    path = tmp_path / "olmoe.gguf"
    path.write_bytes(family_file("olmoe").read_bytes())
    heat = np.array([[0.5, 0.1, 0.9, 0.1, 0.4, 0.3, 0.5, 0.2], [0.0, 1.0, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25]])
    update_section(path, profile.contents(heat.astype(np.float32), 100, "text", "experts", per=32))
    return path, heat


def test_an_expert_is_read_as_often_as_it_is_chosen(mixture: tuple[Path, np.ndarray]) -> None:
    path, heat = mixture
    costs_, router, expert = found(path), 8 * 64 * 4, 3 * 32 * 64 * 4
    assert costs_.mode == "dense" and costs_.note == "" and costs_.digest
    for layer, row in zip(costs_.problem.layers, heat, strict=True):
        hottest = np.argsort(-row, kind="stable")
        assert (layer.order.reshape(8, 32) == hottest[:, None] * 32 + np.arange(32)).all()
        for k in range(9):
            hot, cold = row[hottest[:k]].sum(), row[hottest[k:]].sum()
            assert layer.cold[k] == pytest.approx((router + cold * expert) / 1e9 if k < 8 else 0)
            launches = 6e-7  # norm, router, route, ffn, down, merge
            assert layer.hot[k] == pytest.approx((router + hot * expert) / 1e11 + launches if k else 0)
            assert layer.active[k] == pytest.approx(32 * hot)
    attention = sum(layer.attention.cpu for layer in costs_.problem.layers) + costs_.problem.head.cpu
    assert costs_.dense_cpu == pytest.approx(attention + 2 * (router + 3 * expert) / 1e9)


def test_experts_are_placed_whole_and_the_hottest_first(mixture: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, heat = mixture
    pytest.importorskip("mip")
    options: dict[str, Any] = {"hardware": MACHINE, "reserve": 0, "n_threads": 1, "n_ctx": 64}
    most = placement.place(path, 10**7, **options)
    assert most.share == 1 and [layer.hot for layer in most.layers] == [256, 256]
    some = placement.place(path, most.used * 2 // 3, **options)
    assert some.placement.group == 32 and 0.3 < some.share < 1
    for ids, row in zip(some.placement.hot, heat, strict=True):
        experts = np.unique(ids // 32)
        assert (ids == (experts[:, None] * 32 + np.arange(32)).ravel()).all()
        others = np.setdiff1d(np.arange(8), experts)
        assert not len(experts) or not len(others) or row[experts].min() >= row[others].max()
    assert any(0 < len(ids) < 256 for ids in some.placement.hot)
    MACHINE.save(tmp_path / "machine.json")
    arguments = [str(path), "--hardware", tmp_path / "machine.json", "-b", "10GiB", "--dry-run", "--ctx", "64"]
    result = CliRunner().invoke(app, ["place", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    assert "hot experts" in result.stdout and "\n    1            8 " in result.stdout


def test_without_a_profile_of_experts(family_file: Make, tmp_path: Path) -> None:
    note = "no profile, so all experts count as chosen equally often (50%); run `hotcold profile` first"
    assert found(family_file("mixtral")).note == note
    path = tmp_path / "m.gguf"
    path.write_bytes(family_file("mixtral").read_bytes())
    update_section(path, profile.contents(np.ones((2, 128), np.float32), 1, "an imatrix", "threshold=0.5"))
    assert "counted with the rule 'threshold=0.5', but experts are placed by how often they are" in found(path).note
