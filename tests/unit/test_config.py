"""ModelConfig: what files say, what they leave out, and what they may not say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BY_NAME
from tiny import RopeOptions, make_tiny_model

from hotcold.formats.architectures import ARCHITECTURES, lookup
from hotcold.formats.config import ModelConfig, RopeScaling
from hotcold.formats.errors import FormatError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.gguf_header import TensorInfo
from hotcold.formats.types import GGMLType
from hotcold.solver.convert import convert


@pytest.fixture
def file(tiny_model: Any) -> Iterator[GGUFFile]:
    """An open llama file of 2 layers, whose metadata and tensors a test may change in memory."""
    with GGUFFile(tiny_model()) as opened:
        yield opened


def config_of(path: Path) -> ModelConfig:
    with GGUFFile(path) as file:
        return ModelConfig.from_gguf(file)


def add_tensor(file: GGUFFile, name: str, *shape: int) -> None:
    file.tensors[name] = TensorInfo(name, shape, GGMLType.F32, 0, 4 * math.prod(shape))


LLAMA_TENSORS = {f"attn_{name}.weight" for name in ("norm", "q", "k", "v", "output")}
LLAMA_TENSORS |= {f"ffn_{name}.weight" for name in ("norm", "gate", "up", "down")}
LLAMA_TENSORS |= {"token_embd.weight", "output_norm.weight", "output.weight"}


def test_llama(tiny_model: Any) -> None:
    config = config_of(tiny_model(name="Tiny", sliding_window=12))
    assert config == ModelConfig(
        arch="llama",
        name="Tiny",
        n_vocab=300,
        n_ctx_train=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_head_kv=2,
        head_dim_k=16,
        head_dim_v=16,
        n_ff=96,
        norm="rms",
        norm_eps=float(np.float32(1e-5)),
        rope_dim=16,
        rope_base=10000.0,
        rope_style="norm",
        rope_scaling=RopeScaling("none", 1.0, 256),
        windows=(12, 12),
        attn_scale=0.25,
        activation="silu",
        activation_floors=(0.0, 0.0),
        tensors=frozenset(LLAMA_TENSORS),
    )
    assert config.has("ffn_gate.weight") and not config.has("attn_q.bias") and not config.tied_output


def test_qwen2(tiny_model: Any) -> None:
    config = config_of(tiny_model(arch="qwen2", tied=True, rope_base=1e6))
    assert (config.arch, config.rope_style, config.has("attn_q.bias"), config.tied_output) == (
        "qwen2",
        "neox",
        True,
        True,
    )
    assert config.rope_base == 1e6 and config.windows == (0, 0)


def test_head_size_of_its_own(tiny_model: Any) -> None:
    config = config_of(tiny_model(head_dim=32, rope_dim=16))
    assert (config.head_dim_k, config.head_dim_v, config.rope_dim) == (32, 32, 16)
    assert config.attn_scale == pytest.approx(32**-0.5)


def test_defaults_of_what_a_file_leaves_out(file: GGUFFile) -> None:
    for key in ("rope.freq_base", "rope.dimension_count", "vocab_size"):
        del file.metadata[f"llama.{key}"]
    del file.metadata["general.name"]
    config = ModelConfig.from_gguf(file)
    assert (config.rope_base, config.rope_dim, config.name) == (10000.0, 16, file.path.stem)
    del file.metadata["llama.attention.head_count_kv"]
    with pytest.raises(FormatError, match=r"attn_k.weight'.*got shape \(64, 32\), wanted shape \(64, 64\)"):
        ModelConfig.from_gguf(file)


@pytest.mark.parametrize(
    "rope, wanted",
    [
        (RopeOptions("linear", 4.0), RopeScaling("linear", 4.0, 256)),
        (RopeOptions("linear", 1.0), RopeScaling("none", 1.0, 256)),
        (RopeOptions("linear", 0.0), RopeScaling("none", 1.0, 256)),
        (RopeOptions("none", freqs=True), RopeScaling("none", 1.0, 256)),
        (RopeOptions("yarn", 8.0, 32), RopeScaling("yarn", 8.0, 32, ext_factor=1.0)),
        (
            RopeOptions(
                "yarn",
                2.0,
                64,
                attn_factor=0.5,
                extra={
                    "yarn_ext_factor": 0.25,
                    "yarn_beta_fast": 16,
                    "yarn_beta_slow": 2,
                },
            ),
            RopeScaling("yarn", 2.0, 64, 0.25, 0.5, 16.0, 2.0),
        ),
    ],
)
def test_rope_scaling(tiny_model: Any, rope: RopeOptions, wanted: RopeScaling) -> None:
    assert config_of(tiny_model(rope=rope)).rope_scaling == wanted


def test_rope_scaling_of_old_files_and_of_type_none(file: GGUFFile) -> None:
    file.metadata["llama.rope.scale_linear"] = 2.0
    assert ModelConfig.from_gguf(file).rope_scaling == RopeScaling("linear", 2.0, 256)
    file.metadata["llama.rope.scaling.factor"] = 4.0  # the new key counts
    assert ModelConfig.from_gguf(file).rope_scaling.factor == 4.0
    file.metadata["llama.rope.scaling.type"] = "none"
    assert ModelConfig.from_gguf(file).rope_scaling == RopeScaling("none", 1.0, 256)


def test_sampling_defaults(tiny_model: Any) -> None:
    metadata = {"temp": 0.5, "top_k": 20, "sequence": "top_k;temperature"}
    config = config_of(tiny_model(metadata={f"general.sampling.{key}": value for key, value in metadata.items()}))
    assert config.sampling == {"temp": 0.5, "top_k": 20}


def test_one_value_for_each_layer(file: GGUFFile) -> None:
    keys = ("attention.head_count_kv", "attention.head_count", "feed_forward_length")
    plain = ModelConfig.from_gguf(file)
    for key in keys:
        value = file.metadata[f"llama.{key}"]
        file.metadata[f"llama.{key}"] = np.array([value, value], np.int32)
    assert ModelConfig.from_gguf(file) == plain
    file.metadata["llama.feed_forward_length"] = np.array([96, 64], np.uint32)
    with pytest.raises(UnsupportedError, match="'llama.feed_forward_length' differs between layers"):
        ModelConfig.from_gguf(file)
    file.metadata["llama.feed_forward_length"] = np.array([96], np.uint32)
    with pytest.raises(FormatError, match="got 1 values, wanted one for each of 2 layers"):
        ModelConfig.from_gguf(file)


def test_optional_biases(tiny_model: Any) -> None:
    assert config_of(tiny_model(biases=True)).has("attn_q.bias")
    with GGUFFile(tiny_model(biases=True)) as file:
        for layer in range(2):
            add_tensor(file, f"blk.{layer}.attn_output.bias", 64)
        assert ModelConfig.from_gguf(file).has("attn_output.bias")
        del file.tensors["blk.1.attn_output.bias"]
        with pytest.raises(FormatError, match="'blk.1.attn_output.bias': got no such tensor"):
            ModelConfig.from_gguf(file)
        for layer in range(2):
            file.tensors.pop(f"blk.{layer}.attn_output.bias", None)
            del file.tensors[f"blk.{layer}.attn_k.bias"]
        with pytest.raises(UnsupportedError, match="'attn_q.bias' without 'attn_k.bias' is not supported"):
            ModelConfig.from_gguf(file)


def test_biases_only_in_later_layers(file: GGUFFile) -> None:
    add_tensor(file, "blk.1.attn_q.bias", 64)
    with pytest.raises(UnsupportedError, match="'blk.1.attn_q.bias' is not one that llama models"):
        ModelConfig.from_gguf(file)


A = "llama.attention."
FORMAT_ERRORS: list[tuple[str, Any, str]] = [
    ("general.architecture", None, "got no such key, wanted the name of an architecture"),
    ("general.architecture", 7, "got int 7, wanted str"),
    ("general.name", 1.0, "got float 1.0, wanted str"),
    ("llama.block_count", None, "got no such key, wanted an integer"),
    ("llama.block_count", 0, "got 0, wanted an integer from 1 to 2147483647"),
    ("llama.block_count", 2**31, "got 2147483648"),
    ("llama.block_count", 2**31 - 1, "got 2147483647, wanted at most 2, as there are 21 tensors"),
    ("llama.block_count", 1, "'blk.1.attn_norm.weight' is not one"),
    ("llama.block_count", np.array([2], np.int32), "got [1 values], wanted an integer"),
    ("llama.context_length", -5, "got -5, wanted an integer from 1"),
    ("llama.embedding_length", True, "got True, wanted an integer"),
    (
        "llama.embedding_length",
        128,
        "tensor 'token_embd.weight': got shape (64, 300), wanted shape (128, 300)",
    ),
    ("llama.feed_forward_length", 95, "'blk.0.ffn_gate.weight': got shape (64, 96), wanted shape (64, 95)"),
    ("llama.feed_forward_length", 96.0, "got 96.0, wanted an integer"),
    (A + "head_count", 6, "got 6, wanted a divisor of embedding_length = 64"),
    (A + "head_count", 128, "got 128, wanted a divisor of embedding_length = 64"),
    (A + "head_count_kv", 3, "got 3, wanted a divisor of head_count = 4"),
    (A + "head_count_kv", 0, "got 0, wanted an integer from 1"),
    (
        A + "key_length",
        8,
        "'llama.rope.dimension_count': got 16, wanted an even number up to the head size 8",
    ),
    (A + "value_length", 8, "'blk.0.attn_v.weight': got shape (64, 32), wanted shape (64, 16)"),
    (A + "layer_norm_rms_epsilon", None, "got no such key, wanted a number"),
    (A + "layer_norm_rms_epsilon", math.nan, "got nan, wanted a number from 0 to 1"),
    (A + "layer_norm_rms_epsilon", -1e-5, "wanted a number from 0 to 1"),
    (A + "scale", math.inf, "got inf"),
    (A + "sliding_window", -1, "got -1, wanted an integer from 0"),
    (A + "causal", 1, "got int 1, wanted bool"),
    ("llama.rope.dimension_count", 15, "got 15, wanted an even number"),
    ("llama.rope.dimension_count", 18, "got 18, wanted an even number up to the head size 16"),
    ("llama.rope.freq_base", 0.0, "got 0.0, wanted a number from 2"),
    ("llama.rope.scaling.type", 1, "got int 1, wanted str"),
    ("llama.rope.scaling.factor", -1.0, "got -1.0"),
    ("llama.rope.scaling.factor", 1e-30, "got 1e-30, wanted 0 (none)"),
    ("general.sampling.temp", math.nan, "got nan, wanted a finite number"),
    ("general.sampling.top_k", np.array([1]), "got [1 values], wanted a finite number"),
    ("tokenizer.ggml.tokens", ["a"] * 299, "got 299 tokens, wanted 300, the rows of token_embd.weight"),
    ("tokenizer.ggml.tokens", np.zeros(300), "got ndarray [300 values], wanted list"),
]


@pytest.mark.parametrize("key, value, message", FORMAT_ERRORS)
def test_bad_metadata(file: GGUFFile, key: str, value: Any, message: str) -> None:
    if value is None:
        del file.metadata[key]
    else:
        file.metadata[key] = value
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        ModelConfig.from_gguf(file)
    text = str(caught.value)
    assert text.startswith(f"{file.path}: ") and message in text and "\n" not in text


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("general.architecture", "mamba", "architecture 'mamba' is not supported"),
    ("general.architecture", "\x1b[2J" * 99, "is not supported; supported"),
    ("general.type", "mmproj", "a file of type 'mmproj' is not a model"),
    ("split.count", 3, "one of 3 parts of a split model"),
    ("llama.attention.max_alibi_bias", 8.0, "llama.attention.max_alibi_bias is not supported"),
    ("llama.attention.clamp_kqv", 8.0, "llama.attention.clamp_kqv is not supported"),
    (A + "causal", False, "non-causal"),
    ("llama.rope.scaling.type", "ntk", "'ntk' is not supported; supported: none, linear, yarn, longrope"),
]


@pytest.mark.parametrize("key, value, message", UNSUPPORTED)
def test_unsupported_metadata(file: GGUFFile, key: str, value: Any, message: str) -> None:
    file.metadata[key] = value
    with pytest.raises(UnsupportedError) as caught:
        ModelConfig.from_gguf(file)
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_unsupported_combinations(file: GGUFFile) -> None:
    file.metadata |= {"llama.rope.scaling.type": "yarn"}
    file.metadata["llama.rope.scaling.yarn_log_multiplier"] = 0.1
    with pytest.raises(UnsupportedError, match="yarn_log_multiplier"):
        ModelConfig.from_gguf(file)


def test_every_tensor_is_checked(file: GGUFFile) -> None:
    for name, info in dict(file.tensors).items():
        optional = name == "output.weight"
        del file.tensors[name]
        if optional:
            assert ModelConfig.from_gguf(file).tied_output
        else:
            with pytest.raises(FormatError, match="token_embd|got no such tensor|wanted at most 1"):
                ModelConfig.from_gguf(file)
        for wrong in ((info.shape[0] + 1, *info.shape[1:]), (*info.shape, 1), info.shape + info.shape):
            file.tensors[name] = replace(info, shape=wrong)
            with pytest.raises(FormatError, match=name if len(wrong) > 1 else "shape"):
                ModelConfig.from_gguf(file)
        file.tensors[name] = info
    ModelConfig.from_gguf(file)


def test_rope_freqs_are_checked_and_unknown_tensors_refused(file: GGUFFile) -> None:
    add_tensor(file, "rope_freqs.weight", 7)
    with pytest.raises(FormatError, match=r"'rope_freqs.weight': got shape \(7,\), wanted shape \(8,\)"):
        ModelConfig.from_gguf(file)
    add_tensor(file, "rope_freqs.weight", 8)
    ModelConfig.from_gguf(file)
    add_tensor(file, "blk.0.ffn_gate_inp.weight", 64, 4)
    with pytest.raises(UnsupportedError, match="'blk.0.ffn_gate_inp.weight' is not one that llama models"):
        ModelConfig.from_gguf(file)


def test_windows_of_only_some_layers(file: GGUFFile) -> None:
    key = A + "sliding_window_pattern"
    file.metadata[A + "sliding_window"] = 8
    for said, windows in ((2, (8, 0)), (1, (0, 0)), (0, (8, 8)), (np.array([False, True]), (0, 8))):
        file.metadata[key] = said
        assert ModelConfig.from_gguf(file).windows == windows, said
    file.metadata[key] = np.array([True])
    with pytest.raises(FormatError, match="got 1 values, wanted one for each of 2 layers"):
        ModelConfig.from_gguf(file)


def test_a_family_has_its_own_window_without_being_told() -> None:
    row = ARCHITECTURES["gemma2"]
    assert (row.window, row.window_every) == (4096, 2)


def test_factors_without_a_type_are_longrope(tmp_path: Path) -> None:
    """As llama.cpp's converter writes Phi-3."""
    path = convert(BY_NAME["phi3-longrope"].folder, tmp_path / "m.gguf", "f32").path
    with GGUFFile(path) as file:
        wanted = ModelConfig.from_gguf(file)
        assert wanted.rope_scaling.kind == file.metadata.pop("phi3.rope.scaling.type") == "longrope"
        assert ModelConfig.from_gguf(file) == wanted
        file.metadata["phi3.rope.scaling.type"] = "linear"
        with pytest.raises(UnsupportedError, match="rope factors with a scaling of type 'linear'"):
            ModelConfig.from_gguf(file)


def test_windowed_layers_of_olmo_are_not_scaled(tmp_path: Path) -> None:
    path = convert(BY_NAME["olmo2"].folder, tmp_path / "m.gguf", "f32").path
    with GGUFFile(path) as file:
        assert ModelConfig.from_gguf(file).local_base == 0.0
        file.metadata |= {"olmo2.attention.sliding_window": 8, "olmo2.rope.scaling.type": "linear"}
        file.metadata["olmo2.rope.scaling.factor"] = 4.0
        config = ModelConfig.from_gguf(file)
        assert config.local_base == config.rope_base and config.rope_scaling.factor == 4.0
        assert config.windows == tuple(0 if layer % 4 == 3 else 8 for layer in range(config.n_layer))


def test_yarns_whole_factor(file: GGUFFile) -> None:
    """Where a file says it, it is what everybody computes anyway, or else nobody knows."""
    file.metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0}
    wanted = ModelConfig.from_gguf(file)
    for said in (1.0, 1.0 + 0.1 * math.log(8.0)):
        file.metadata["llama.rope.scaling.yarn_attn_factor"] = said
        assert ModelConfig.from_gguf(file) == wanted
    file.metadata["llama.rope.scaling.yarn_attn_factor"] = 0.5
    with pytest.raises(UnsupportedError, match="yarn_attn_factor = 0.5 is not supported, only the usual 1.2079"):
        ModelConfig.from_gguf(file)


EXPERT_KEYS = {"llama.expert_count": 4, "llama.expert_used_count": 2}
BAD_EXPERTS: list[tuple[dict[str, Any], str]] = [
    ({}, "ok"),
    ({"llama.expert_used_count": 5}, "got 5, wanted at most expert_count = 4"),
    ({"llama.expert_used_count": 0}, "got 0, wanted an integer from 1"),
    ({"llama.expert_count": 3}, "got shape (64, 4), wanted shape (64, 3)"),
    ({"llama.expert_count": 0}, "got 0, wanted the number of the experts whose tensors there are"),
    ({"llama.expert_count": 2**31 - 1}, "got 24, wanted at most 1"),
    ({"llama.expert_gating_func": 2}, "not weighted by a plain softmax"),
    ({"llama.expert_weights_scale": 2.5}, "not weighted by a plain softmax"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_EXPERTS)
def test_experts(file: GGUFFile, keys: dict[str, Any], message: str) -> None:
    for layer in range(2):
        for name in ("gate", "up", "down"):
            del file.tensors[f"blk.{layer}.ffn_{name}.weight"]
            add_tensor(file, f"blk.{layer}.ffn_{name}_exps.weight", *((24, 64) if name == "down" else (64, 24)), 4)
        add_tensor(file, f"blk.{layer}.ffn_gate_inp.weight", 64, 4)
    file.metadata |= {"llama.feed_forward_length": 24, **EXPERT_KEYS, **keys}
    if message == "ok":
        config = ModelConfig.from_gguf(file)
        assert (config.n_expert, config.n_expert_used, config.n_ff, config.expert_neurons) == (4, 2, 96, 24)
        return
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        ModelConfig.from_gguf(file)
    assert message in str(caught.value)


def test_experts_without_their_tensors(file: GGUFFile) -> None:
    file.metadata |= EXPERT_KEYS
    with pytest.raises(FormatError, match="expert_count': got 4, wanted 0, as there are no tensors of experts"):
        ModelConfig.from_gguf(file)


def test_architectures() -> None:
    for name, row in ARCHITECTURES.items():
        assert lookup(name) is row and row.name == name
        seen: set[str] = set(row.required)
        for group in (*row.optional, row.ffn[0]):
            assert group and not seen & set(group), name
            seen |= set(group)


@pytest.mark.parametrize(
    ("said", "activation"),
    [("relu", "relu"), ("gelu_pytorch_tanh", "gelu"), ("relu_squared", "relu2"), ("swish", "silu")],
)
def test_a_file_may_name_its_activation(tmp_path: Path, said: str, activation: str) -> None:
    path = make_tiny_model(tmp_path / "m.gguf", metadata={"llama.hidden_activation": said})
    with GGUFFile(path) as file:
        assert ModelConfig.from_gguf(file).activation == activation


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m.gguf", metadata={"llama.hidden_activation": "mish"})
    with GGUFFile(path) as file, pytest.raises(UnsupportedError, match="hidden_activation = 'mish' is not supported"):
        ModelConfig.from_gguf(file)
