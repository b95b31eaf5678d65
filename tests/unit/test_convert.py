"""`hotcold convert` from Hugging Face: names, values and keys of every family, types, bad input, nothing half-written.

What the tensors and keys mean is proven by tests/models/test_families.py: the engine gives transformers' logits.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import copied, floats, read, write
from families import FOLDER
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader
from typer.testing import CliRunner

from hotcold.formats import checkpoint_tensors
from hotcold.formats.architectures import ARCHITECTURES
from hotcold.formats.checkpoint import HFCheckpoint
from hotcold.formats.errors import HotcoldError, ParameterError, StorageError
from hotcold.formats.gguf import GGUFFile
from hotcold.solver.convert import convert
from hotcold.tools.cli import app

NAMES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
LLAMA = FOLDER / "llama"
PLUS_ONE = ("gemma2", "gemma2-27b", "gemma3", "nemotron")
IDLE = (".inv_freq", ".attn.bias", ".attention.bias", ".masked_bias")


def fields(path: Path) -> dict[str, Any]:
    """Metadata as gguf's own reader sees it."""
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors as float32 in NumPy's order, by gguf's own reader."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """files(family) -> the family in F32."""
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else convert(FOLDER / name, path, "f32").path

    return make


# ---- every family -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_fields(files: Callable[[str], Path], name: str) -> None:
    """gguf's map from Hugging Face's names to GGUF's says the same as our table."""
    found, arch = tensors(files(name)), fields(files(name))["general.architecture"]
    known = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        assert arch in ("opt", "bamboo")  # PowerInfer's
        return
    names = gguf.get_tensor_name_map(known[arch], fields(files(name))[f"{arch}.block_count"])
    wanted = set()
    for source in read(FOLDER / name):
        if source.endswith(IDLE) or (source == "lm_head.weight" and name == "falcon-40b"):
            continue
        stem, kind = re.sub(r"(experts|norms)\.\d+\.", r"\1.", source).rsplit(".", 1)
        wanted.add(f"{names.get_name(stem.removesuffix('.norms'))}.{kind}")
    assert {text for text in found if not text.startswith("rope_")} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_lost(files: Callable[[str], Path], name: str) -> None:
    """The values of all tensors together are those of the checkpoint, one for one."""
    ours, source = tensors(files(name)), read(FOLDER / name)
    stored = {
        text: floats(*pair)
        for text, pair in source.items()
        if not text.endswith(IDLE) and not (text == "lm_head.weight" and name == "falcon-40b")
    }
    if name == "opt":
        positions = "model.decoder.embed_positions.weight"
        stored[positions] = stored[positions][2:]
    if name in PLUS_ONE:
        stored = {text: a + np.float32(1) if text.endswith("norm.weight") else a for text, a in stored.items()}
    made = [values.ravel() for text, values in ours.items() if not text.startswith("rope_")]
    theirs = np.sort(np.concatenate([values.ravel() for values in stored.values()]))
    assert np.array_equal(np.sort(np.concatenate(made)), theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / name / "config.transformers5.json").exists()])
def test_new_words_say_the_same(files: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """config.json as transformers 5 writes it; the padding token is then that of the class."""
    folder = copied(FOLDER / name, tmp_path / name)
    (folder / "config.transformers5.json").replace(folder / "config.json")
    path = convert(folder, tmp_path / "new.gguf", "f32").path
    padding = "tokenizer.ggml.padding_token_id"
    assert {**fields(path), padding: 0} == {**fields(files(name)), padding: 0}
    ours, theirs = tensors(path), tensors(files(name))
    assert list(ours) == list(theirs) and all(np.array_equal(ours[text], theirs[text]) for text in ours)


def test_every_row_has_its_classes() -> None:
    classes = [name for row in ARCHITECTURES.values() for name in row.hf.classes]
    assert len(classes) == len(set(classes)) and all(row.hf.classes for row in ARCHITECTURES.values())


# ---- layouts, by hand -------------------------------------------------------------------------------------------


def stored(family: str, name: str) -> np.ndarray:
    return floats(*read(FOLDER / family)[name])


def test_pairs_become_neighbours(files: Callable[[str], Path]) -> None:
    """llama: dimensions i and i + 8 of a head of 16 are rotated together, and lie together."""
    source = stored("llama", "model.layers.1.self_attn.k_proj.weight")
    made = tensors(files("llama"))["blk.1.attn_k.weight"]
    for head in range(2):
        for i in range(8):
            assert np.array_equal(made[16 * head + 2 * i], source[16 * head + i])
            assert np.array_equal(made[16 * head + 2 * i + 1], source[16 * head + 8 + i])


@pytest.mark.parametrize(("family", "stem", "kinds"), [
    ("gptneox", "gpt_neox.layers.0.attention.query_key_value", ("weight", "bias")),
    ("falcon-7b", "transformer.h.0.self_attention.query_key_value", ("weight",)),
    ("falcon-40b", "transformer.h.0.self_attention.query_key_value", ("weight",)),
])  # fmt: skip
def test_fused_rows_are_sorted(files: Callable[[str], Path], family: str, stem: str, kinds: tuple[str, ...]) -> None:
    n_kv = {"gptneox": 4, "falcon-7b": 1, "falcon-40b": 2}[family]
    per, n_dim = 4 // n_kv, 16
    for kind in kinds:
        source, made = stored(family, f"{stem}.{kind}"), tensors(files(family))[f"blk.0.attn_qkv.{kind}"]
        row = 0
        for group in range(n_kv):  # as the checkpoint has them
            for part in range(per + 2):
                head = group * per + part if part < per else 4 + group + n_kv * (part - per)
                assert np.array_equal(made[head * n_dim : (head + 1) * n_dim], source[row : row + n_dim])
                row += n_dim


def test_other_layouts(files: Callable[[str], Path]) -> None:
    gpt2, opt, stablelm = tensors(files("gpt2")), tensors(files("opt")), tensors(files("stablelm-12b"))
    assert np.array_equal(gpt2["blk.0.ffn_up.weight"], stored("gpt2", "h.0.mlp.c_fc.weight").T)
    assert np.array_equal(gpt2["blk.1.attn_qkv.weight"], stored("gpt2", "h.1.attn.c_attn.weight").T)
    assert np.array_equal(opt["position_embd.weight"], stored("opt", "model.decoder.embed_positions.weight")[2:])
    norm = "model.layers.0.self_attn.q_layernorm.norms.2.weight"
    assert np.array_equal(stablelm["blk.0.attn_q_norm.weight"][2], stored("stablelm-12b", norm))
    gemma, expert = tensors(files("gemma2")), tensors(files("mixtral"))["blk.1.ffn_up_exps.weight"]
    assert np.array_equal(gemma["output_norm.weight"], stored("gemma2", "model.norm.weight") + 1)
    w3 = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert expert.shape == (4, 32, 64) and np.array_equal(expert[3], stored("mixtral", w3))


def test_names_without_their_prefix(files: Callable[[str], Path], tmp_path: Path) -> None:
    """As opt-125m has them, which is no different model for that."""
    folder = copied(FOLDER / "opt", tmp_path / "opt")
    write(folder / "model.safetensors", {name.removeprefix("model."): t for name, t in read(folder).items()})
    ours, theirs = tensors(convert(folder, tmp_path / "x.gguf", "f32").path), tensors(files("opt"))
    assert list(ours) == list(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_the_text_part_of_a_model_for_pictures_too(files: Callable[[str], Path], tmp_path: Path, prefix: str) -> None:
    """Gemma 3 from 4B on: settings in text_config, names as transformers 4 or 5 writes them, a tower to leave out."""
    settings = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    folder = copied(FOLDER / "gemma3", tmp_path / "both", dict.fromkeys(settings, ...))
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": settings.pop("eos_token_id")}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": settings, "vision_config": {}}))
    whole = prefix.startswith("model.")
    tensors = {prefix + (name.removeprefix("model.") if whole else name): value for name, value in read(folder).items()}
    tensors["model.vision_tower.x.weight" if whole else "vision_tower.x.weight"] = "F32", np.zeros(4, np.float32)
    write(folder / "model.safetensors", tensors)
    done = convert(folder, tmp_path / "text.gguf", "f32")
    assert any("only its text part" in note for note in done.notes)
    with GGUFFile(done.path) as got, GGUFFile(files("gemma3")) as wanted:
        for tensor in wanted.tensors:
            assert got.data(tensor).tobytes() == wanted.data(tensor).tobytes()
        for key in wanted.metadata.keys() | got.metadata.keys():
            if key.startswith(("gemma3.", "tokenizer.")):
                np.testing.assert_array_equal(got.metadata[key], wanted.metadata[key])
    (folder / "config.json").write_text(json.dumps(outer))
    with pytest.raises(HotcoldError, match="setting 'text_config': got .*, wanted the settings of the text part"):
        convert(folder, tmp_path / "none.gguf", "f32")


def test_a_tied_output_is_copied_where_others_need_it(tmp_path: Path) -> None:
    folder = copied(FOLDER / "nemotron", tmp_path / "tied", {"tie_word_embeddings": True})
    found = tensors(convert(folder, tmp_path / "x.gguf", "f32").path)
    assert np.array_equal(found["output.weight"], found["token_embd.weight"])


# ---- keys -------------------------------------------------------------------------------------------------------


def keys_of(tmp_path: Path, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    folder = copied(FOLDER / family, tmp_path / family, settings)
    found = fields(convert(folder, tmp_path / "keys.gguf").path)
    arch = found["general.architecture"]
    return {key.removeprefix(f"{arch}."): value for key, value in found.items() if key.startswith(f"{arch}.")}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "relu": ("llama", {"hidden_act": "relu"}, {"hidden_activation": "relu"}),
    "gelu is by erf": ("llama", {"hidden_act": "gelu"}, {"hidden_activation": "gelu_erf"}),
    "gelu_fast is by tanh": ("gptneox", {"hidden_act": "gelu_fast"}, {"hidden_activation": "gelu_tanh"}),
    "own activation": ("gpt2", {}, {"hidden_activation": None}),
    "linear": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "yarn": (
        "llama",
        {"rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 16}},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": pytest.approx(1 / (1 + 0.1 * np.log(4.0))),
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": None,
        },
    ),
    "two magnitudes": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope.scaling.attn_factor": pytest.approx(1 / (1 + 0.1 * np.log(4.0)))},
    ),
    "default": ("llama", {"rope_scaling": {"rope_type": "default"}}, {"rope.scaling.type": None}),
    "Llama knows no window": ("llama", {"sliding_window": 4}, {"attention.sliding_window": None}),
    "Mistral's own window": ("mistral", {"sliding_window": ...}, {"attention.sliding_window": 4096}),
    "Mistral without one": ("mistral", {"sliding_window": None}, {"attention.sliding_window": None}),
    "Gemma 2's own caps": (
        "gemma2",
        {"attn_logit_softcapping": ..., "final_logit_softcapping": ...},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "no caps": ("gemma2", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 0.0}),
    "no window for Gemma 2": ("gemma2", {"sliding_window": None}, {"attention.sliding_window": 0}),
    "Granite's own scale": ("granite", {"attention_multiplier": ...}, {"attention.scale": 1.0}),
    "OLMoE's own epsilon": (
        "olmoe",
        {"rms_norm_eps": ...},
        {"attention.layer_norm_rms_epsilon": pytest.approx(1e-5)},
    ),
    "late windows": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]},
    ),
    "windows after 28 layers": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": ...},
        {"attention.sliding_window": None},
    ),
    "no window": ("qwen2", {"max_window_layers": 0}, {"attention.sliding_window": None}),
    "types of layers": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention.sliding_window_pattern": [False, True]},
    ),
    "usual types of layers": (
        "gemma2",
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": None},
    ),
    "another pattern": (
        "gemma3",
        {"sliding_window_pattern": 3},
        {"attention.sliding_window_pattern": [True, True, False, True, True, False]},
    ),
    "scale": ("gemma2", {"query_pre_attn_scalar": 64}, {"attention.scale": pytest.approx(0.125)}),
    "usual scale": ("gemma2", {}, {"attention.scale": None, "attention.key_length": 32}),
    "no soft cap": ("gemma2", {"final_logit_softcapping": None}, {"final_logit_softcapping": 0.0}),
    "weights of experts": ("qwen3moe", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
    "tenth of a head": ("stablelm", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}),
    "old name": ("stablelm", {"partial_rotary_factor": ..., "rope_pct": 0.75}, {"rope.dimension_count": 12}),
    "heads as many": ("llama-relu", {"num_key_value_heads": ...}, {"attention.head_count_kv": 4}),
}


@pytest.mark.parametrize(("family", "settings", "wanted"), SETTINGS.values(), ids=SETTINGS)
def test_settings(tmp_path: Path, family: str, settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = keys_of(tmp_path, family, settings)
    assert {key: found.get(key) for key in wanted} == wanted


def test_dynamic_scaling_is_left_out_and_said(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path / "m", {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    done = convert(folder, tmp_path / "x.gguf")
    assert "dynamic rope scaling" in done.notes[0] and done.config.rope_scaling.kind == "none"


def test_llama3_factors(files: Callable[[str], Path]) -> None:
    """Long waves are slowed by 8, short ones not: contexts of 32 with 1 and 4 waves in them."""
    waves = [2 * np.pi * 10000 ** (i / 8) for i in range(8)]
    factors = tensors(files("llama-rope3-bias"))["rope_freqs.weight"]
    for wave, factor in zip(waves, factors, strict=True):
        if wave < 32 / 4:
            assert factor == 1.0
        elif wave > 32:
            assert factor == 8.0
        else:
            share = (32 / wave - 1) / (4 - 1)
            assert factor == pytest.approx(1 / (share + (1 - share) / 8), rel=1e-6)


# ---- the model's card and name ----------------------------------------------------------------------------------

CARD = """---
license: "apache-2.0"
language:
- en
- "de"
tags:
  - chat
  - other
base_model: someone/else
---
# A model
"""


def test_card_and_name(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path / "Tiny-Llama-Instruct-v1.2")
    (folder / "README.md").write_text(CARD)
    done = convert(folder, tmp_path)
    assert done.path == tmp_path / "Tiny-Llama-80K-Instruct-v1.2-BF16.gguf"
    found = fields(done.path)
    general = {key[8:]: value for key, value in found.items() if key.startswith("general.")}
    assert general.pop("sampling.temp") == pytest.approx(0.6) and general.pop("sampling.top_p") == pytest.approx(0.9)
    assert general == {
        "architecture": "llama",
        "type": "model",
        "name": "Tiny Llama Instruct v1.2",
        "basename": "Tiny-Llama",
        "finetune": "Instruct",
        "version": "v1.2",
        "size_label": "80K",
        "license": "apache-2.0",
        "languages": ["en", "de"],
        "tags": ["chat", "other"],
        "file_type": 32,
        "quantization_version": 2,
    }


@pytest.mark.parametrize("card", ["", "---\nlicense: x\n", "text\n---\nlicense: x\n---\n", "---\n: :\n- a\n[\n---\n"])
def test_odd_cards_are_no_matter(tmp_path: Path, card: str) -> None:
    folder = copied(LLAMA, tmp_path / "m")
    (folder / "README.md").write_bytes(card.encode() + b"\xff")
    assert "general.license" not in fields(convert(folder, tmp_path / "x.gguf").path)


def test_name_in_the_hub_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--Nice-1B-Chat" / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    done = convert(copied(LLAMA, folder), tmp_path, "f16")
    assert done.path.name == "Nice-80K-1b-Chat-F16.gguf" and done.config.name == "Nice 1B Chat"


def test_sampling(tmp_path: Path) -> None:
    found = fields(convert(FOLDER / "qwen2", tmp_path / "x.gguf").path)
    assert found["general.sampling.top_k"] == 20 and found["general.sampling.penalty_repeat"] == pytest.approx(1.05)


# ---- types ------------------------------------------------------------------------------------------------------


def test_own_type_is_kept_bit_for_bit(tmp_path: Path) -> None:
    for family, kind in (("qwen3", "BF16"), ("opt", "F16"), ("olmo2", "F32")):
        done = convert(FOLDER / family, tmp_path / family)
        assert done.mix.name == kind
        found = {tensor.name: tensor for tensor in GGUFReader(done.path).tensors}
        assert found["token_embd.weight"].tensor_type == QType[kind]
        assert found["output_norm.weight"].tensor_type == QType.F32
        name = {"opt": "model.decoder.embed_tokens.weight"}.get(family, "model.embed_tokens.weight")
        raw = read(FOLDER / family)[name][1]
        assert found["token_embd.weight"].data.tobytes() == raw.tobytes()


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "Q4_0"])
def test_types(tmp_path: Path, files: Callable[[str], Path], kind: str) -> None:
    """Against gguf's own encoders; what is no matrix stays in F32."""
    done = convert(FOLDER / "mixtral", tmp_path / "x.gguf", kind)
    exact = tensors(files("mixtral"))
    for tensor in GGUFReader(done.path).tensors:
        plain = exact[tensor.name].ndim < 2 or "ffn_gate_inp" in tensor.name
        if plain:
            assert tensor.tensor_type == QType.F32
        elif tensor.name != "output.weight":
            assert tensor.tensor_type == QType[kind.upper()]
        error = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - exact[tensor.name]).max()
        own = exact[tensor.name]
        wanted = np.abs(gguf.dequantize(gguf.quantize(own, tensor.tensor_type), tensor.tensor_type) - own).max()
        assert error <= wanted * 1.3 + 1e-9


def test_mixes_and_what_does_not_fit(tmp_path: Path) -> None:
    done = convert(LLAMA, tmp_path / "x.gguf", "q4_k_m")
    found = fields(done.path)
    assert found["general.file_type"] == 15
    assert "have rows that the type's blocks do not divide" in done.notes[0] and "Q4_K -> Q5_0" in done.notes[0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(done.path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q5_0" and kinds["blk.0.attn_norm.weight"] == "F32"


def test_pieces_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(FOLDER / "mixtral", tmp_path / "a.gguf", "q8_0").path.read_bytes()
    monkeypatch.setattr(checkpoint_tensors, "_PIECE", 1000)
    seen: list[tuple[int, int]] = []
    done = convert(FOLDER / "mixtral", tmp_path / "b.gguf", "q8_0", lambda _, at, of: seen.append((at, of)))
    assert done.path.read_bytes() == whole
    assert len(seen) > 100 and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


# ---- bad input --------------------------------------------------------------------------------------------------


def changed(tensor: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    """A tensor of model.safetensors with other values, or none at all."""

    def make(folder: Path) -> None:
        all_tensors = read(folder)
        dtype, array = all_tensors.pop(tensor, ("BF16", np.zeros((3, 3), np.uint16)))
        if change is not None:
            all_tensors[tensor] = dtype, change(array.copy())
        write(folder / "model.safetensors", all_tensors)

    return make


def with_value(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[5] = bits
        return array

    return change


def settings(**values: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return make


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def eight_bit(folder: Path) -> None:
    name, all_tensors = "model.layers.0.mlp.up_proj.weight", read(folder)
    all_tensors[name] = "F8_E4M3", np.zeros(all_tensors[name][1].shape, np.uint8)
    write(folder / "model.safetensors", all_tensors)


Q, UP, NORM = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"))
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "no config.json"),
    "config is no JSON": (text("config.json", "{"), "config.json: JSON"),
    "config is a list": (text("config.json", "[]"), "config.json: JSON: got a list"),
    "config is deep": (text("config.json", "[" * 100_000), "config.json: JSON"),
    "no architectures": (settings(architectures=...), "'architectures'"),
    "odd architectures": (settings(architectures=[3]), "'architectures'"),
    "unknown architecture": (settings(architectures=["Big\nForCausalLM"]), "supported: ArceeForCausalLM, "),
    "no layers": (settings(num_hidden_layers=...), "'num_hidden_layers'"),
    "layers as text": (settings(num_hidden_layers="2"), "an integer"),
    "too many layers": (settings(num_hidden_layers=2_000_000_000), "those of 2000000000 blocks"),
    "one more layer": (settings(num_hidden_layers=3), "'model.layers.2."),
    "one layer less": (settings(num_hidden_layers=1), "'model.layers.1."),
    "wider": (settings(hidden_size=128), "(288, 64), wanted shape (288, 128)"),
    "wider FFN": (settings(intermediate_size=100), "shape (100, 64), as the settings in config.json say"),
    "more words": (settings(vocab_size=300), "(288, 64), wanted shape (300, 64)"),
    "no words": (settings(vocab_size=...), "'vocab_size'"),
    "heads that do not divide": (settings(num_attention_heads=6), "a divisor of 64"),
    "key heads that do not divide": (settings(num_key_value_heads=3), "a divisor of the 4 heads"),
    "enormous heads": (settings(head_dim=2**31 - 2), "at most 65536"),
    "odd heads": (settings(head_dim=15), "even number"),
    "no epsilon": (settings(rms_norm_eps=...), "'rms_norm_eps'"),
    "epsilon as NaN": (settings(rms_norm_eps=float("nan")), "'rms_norm_eps'"),
    "unknown activation": (settings(hidden_act="mish"), "the activation 'mish' is not supported"),
    "fatrelu without its threshold": (settings(hidden_act="fatrelu"), "'hidden_act_param': got 'nothing'"),
    "unknown scaling": (settings(rope_scaling={"rope_type": "new"}), "rope scaling of type 'new'"),
    "scaling of a list": (settings(rope_scaling={"rope_type": [1]}), "rope_scaling.rope_type"),
    "scaling without factor": (settings(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor"),
    "scaling by text": (settings(rope_scaling="linear"), "'rope_scaling'"),
    "llama3 the wrong way": (
        settings(rope_scaling={"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}),
        "low_freq_factor",
    ),
    "longrope of another size": (
        settings(rope_scaling={"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}),
        "8 numbers",
    ),
    "no base": (settings(rope_theta=0), "'rope_theta'"),
    "what the engine has not": (
        settings(rope_scaling={"rope_type": "linear", "factor": 1e9}),
        "config.json: key 'llama.rope.scaling.factor': got 1000000000.0",
    ),
    "quantised": (settings(quantization_config={"quant_method": "gptq"}), "a quantised checkpoint"),
    "quantised by MLX": (settings(quantization={"bits": 4}), "a quantised checkpoint (quantization)"),
    "scaling without a type": (settings(rope_scaling={"factor": 8.0}), "'factor' without a rope_type"),
    "magnitude of zero": (
        settings(rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": -10 / np.log(4.0)}),
        "rope_scaling.mscale_all_dim",
    ),
    "pointer of Git LFS": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "`git lfs pull` fetches them",
    ),
    "half a character": (text("generation_config.json", '{"x": "\\ud800"}'), "generation_config.json: JSON"),
    "tied as text": (settings(tie_word_embeddings="yes"), "true or false"),
    "output is missing": (settings(tie_word_embeddings=False), "'lm_head.weight': got no such tensor"),
    "no weights": (without("model.safetensors"), "no weights there"),
    "pickled": (pickled, "any code"),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 150_000), "download it again"),
    "missing": (changed(UP, None), f"'{UP}': got no such tensor"),
    "another shape": (changed(Q, lambda a: a[:-1]), f"'{Q}': got shape (63, 64), wanted shape (64, 64)"),
    "transposed": (changed(UP, np.transpose), f"'{UP}': got shape (64, 96)"),
    "one more": (changed("model.layers.0.mlp.extra.weight", lambda a: a), "'model.layers.0.mlp.extra.weight' is not"),
    "NaN": (changed(UP, with_value(0x7FC0)), f"'{UP}': got weights that are NaN or infinite"),
    "NaN in a norm": (changed(NORM, with_value(0x7FC0)), f"'{NORM}': got weights that are NaN"),
    "infinity in a permuted one": (changed(Q, with_value(0xFF80)), f"'{Q}': got weights that are NaN or infinite"),
    "eight bits": (eight_bit, "of type F8_E4M3; take the original checkpoint"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer"),
    "sampling": (text("generation_config.json", '{"temperature": "hot"}'), "'temperature'"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_bad_input(tmp_path: Path, spoil: Callable[[Path], None], said: str, kind: str) -> None:
    folder = copied(LLAMA, tmp_path / "model")
    spoil(folder)
    with pytest.raises(HotcoldError) as caught:
        convert(folder, tmp_path / "out.gguf", kind)
    line = str(caught.value)
    assert said in line and str(folder) in line and line.isprintable() and len(line) < 900
    assert os.listdir(tmp_path) == ["model"]


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "post-norms": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
    "alibi": ("falcon-7b", {"alibi": True}, "alibi = True is not supported"),
    "serial falcon": ("falcon-7b", {"parallel_attn": False}, "parallel_attn"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    "some layers dense": ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "factors": (
        "stablelm",
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}},
        "needs rope_freqs.weight is not supported for stablelm",
    ),
    "layer types": ("gemma2", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
}


@pytest.mark.parametrize(("family", "values", "said"), OTHERS.values(), ids=OTHERS)
def test_settings_that_change_the_model(tmp_path: Path, family: str, values: dict[str, Any], said: str) -> None:
    folder = copied(FOLDER / family, tmp_path / "model", values)
    with pytest.raises(HotcoldError, match=said.replace("(", r"\(")):
        convert(folder, tmp_path / "out.gguf")


def test_weights_beyond_f16(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path / "model")
    changed(UP, with_value(0x4780))(folder)  # 65536
    for kind in ("f16", "q8_0"):  # q8_0 has scales in F16, and 65536 / 127 fits
        if kind == "f16":
            with pytest.raises(HotcoldError, match="ones that F16 can hold"):
                convert(folder, tmp_path / "out.gguf", kind)
        else:
            convert(folder, tmp_path / "out.gguf", kind)


def test_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="'q9_9', wanted one of F32, F16"):
        convert(LLAMA, tmp_path / "out.gguf", "q9_9")


def test_odd_values_are_one_line_each(tmp_path: Path) -> None:
    """Every setting of three families, with values of the wrong kind or size."""
    odd = [None, -1, 0, 3, 1e308, 1e-320, "x", [], {}, [[1]], True, float("nan"), float("inf"), 2**63, "\n\x1b[0m"]
    outcomes = set()
    for family in ("llama-rope3-bias", "gemma3", "phi3-longrope"):
        folder = copied(FOLDER / family, tmp_path / family)
        plain = json.loads((folder / "config.json").read_text())
        for name in [name for name in plain if name not in ("torch_dtype", "transformers_version")]:
            for value in odd:
                (folder / "config.json").write_text(json.dumps({**plain, name: value}))
                try:
                    HFCheckpoint(folder).close()
                    outcomes.add("read")
                except HotcoldError as error:
                    assert str(error).isprintable()
                    outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---- all or nothing ---------------------------------------------------------------------------------------------


def test_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(LLAMA, out, None, interrupt)
    assert os.listdir(tmp_path) == ["out.gguf"] and out.read_bytes() == b"old"


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="out.gguf: No space left on device; name a file"):
        convert(LLAMA, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        convert(LLAMA, tmp_path / "none" / "out.gguf")
    (tmp_path / "hotcold-out.gguf").write_bytes(b"a section")
    with pytest.raises(StorageError, match="the section of an earlier out.gguf"):
        convert(LLAMA, tmp_path / "out.gguf")


# ---- the command ------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    monkeypatch.chdir(tmp_path)
    result = invoke("convert", LLAMA, "--type", "q8_0")
    assert (result.exit_code, result.stdout) == (0, "Llama-80K-Q8_0.gguf\n")
    assert "llama, Q8_0, " in result.stderr
    with GGUFFile(tmp_path / "Llama-80K-Q8_0.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].type.name == "Q8_0"
    for arguments, said in (
        ((tmp_path / "none.gguf", "x.gguf"), "no such file"),
        ((tmp_path, "x.gguf"), "no config.json"),
        ((LLAMA, "x.gguf", "--type", "x"), "wanted one of"),
    ):
        result = invoke("convert", *arguments)
        assert result.exit_code == 1 and result.stdout == "" and said in result.stderr
        assert len(result.stderr.splitlines()) == 1
