"""Write tests/families: tiny Hugging Face models of every family, with the logits that transformers gives.

    python tests/make_families.py [NAME ...]        # needs torch and transformers; the tests do not

Weights are random, and such that a forgotten bias, norm or setting shows: each is taken out in turn, and the
script says how far the logits move. Files get the names and types that published checkpoints have on disk.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_configs import EOS, IM_END, N_VOCAB, SPECS, Config, Spec
from safetensors.torch import load_file, save_file
from tiny import CHATML, byte_characters

FOLDER = Path(__file__).parent / "families"
MERGES = (
    "h e,Ġ t,Ġt he,i n,Ġ a,e r,o n,a n,Ġ s,r e,Ġ h,Ġh e,l l,Ġ w,o r,l o,ll o,he llo,Ġhe llo,Ġw or,l d,"
    "Ġwor ld,in g,e n,Ġ c,a t,Ġc at,e d,Ġ o"
).split(",")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEEN = 5e-3  # the least relative change by which a fixture must show a mistake
_PLAIN_UP, _PLAIN_DOWN = ("c_fc", "h_to_4h"), ("mlp.c_proj", "4h_to_h")
State = dict[str, torch.Tensor]


# ---- model and weights ------------------------------------------------------------------------------------------


class _DoubleReLU(torch.nn.Module):
    """Bamboo's feed-forward: ReLU on the gate and on the up projection."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * torch.relu(self.up_proj(x)))


def build(config: Config, state: State | None = None) -> Any:
    """The transformers model of a config.json, in float32 with eager attention, with these weights if given."""
    kind = "mistral" if config["model_type"] == "bamboo" else config["model_type"]
    words = copy.deepcopy({**config, "model_type": kind})  # from_dict writes into what it is given
    settings = transformers.AutoConfig.for_model(kind).__class__.from_dict(words)
    settings._attn_implementation = "eager"
    settings.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
    if config["model_type"] == "bamboo":
        for layer in model.model.layers:
            layer.mlp = _DoubleReLU(layer.mlp)
    if state is not None:
        model.load_state_dict(state, strict=False)  # a changed config may want fewer
    return model


def draw(name: str, shape: Sequence[int], spec: Spec) -> np.ndarray:
    """Random weights for a tensor, from its name alone, so that they do not depend on the order of drawing."""
    rng = np.random.default_rng([zlib.crc32(spec.name.encode()), zlib.crc32(name.encode())])
    kind = spec.config["model_type"]
    up, down = (any(part in name for part in parts) for parts in (_PLAIN_UP, _PLAIN_DOWN))
    if name.endswith("bias"):
        return rng.normal(-2.5 if spec.gelu_tail and up else 0.0, 0.3, shape)
    if len(shape) == 1:
        offset = 1.0 if kind.startswith("gemma") or kind == "nemotron" else 0.0  # these add one to what they store
        return rng.uniform(0.5, 1.5, shape) - offset
    if any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
        return rng.normal(0, 0.5, shape)
    fan_in = shape[0] if kind == "gpt2" else shape[-1]
    gain = 2.0 if name.endswith("gate.weight") else 1.0  # a router's choices should be clear ones
    if spec.gelu_tail and (up or down):
        gain = 0.5 if up else 20.0
    return rng.normal(0, gain * fan_in**-0.5, shape)


def logits_of(model: Any, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """float32 (n_tokens, n_vocab) for each prompt, computed alone and without a cache."""
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy().copy()
            for ids in prompts
        ]


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """max |a - b| / max |b| over all prompts."""
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(a, b, strict=True))


# ---- files ------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, spec: Spec) -> None:
    """A byte-level BPE of N_VOCAB tokens as tokenizer.json and tokenizer_config.json."""
    tokens = [*sorted(byte_characters()), *(merge.replace(" ", "") for merge in MERGES), *SPECIALS]
    if len(tokens) != N_VOCAB or len(set(tokens)) != N_VOCAB:
        raise SystemExit(f"the tokenizer has {len(tokens)} tokens, wanted {N_VOCAB}")
    ids = {token: i for i, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in SPECIALS],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for token, i in ids.items() if token not in SPECIALS},
            "merges": MERGES,
        },
    }
    settings: Config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[token]): {"content": token, **flags} for token in SPECIALS},
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>" if spec.config["eos_token_id"] == EOS else "<|im_end|>",
        "model_max_length": 128,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    if spec.chat_template == "config":
        settings["chat_template"] = CHATML
    elif spec.chat_template == "file":
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def on_disk(model: Any, spec: Spec) -> State:
    """The tensors as published checkpoints of the family have them: names, order of layers, type."""
    dtype = getattr(torch, spec.dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    if spec.config["model_type"] == "gpt2":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name, shape in spec.extra.items():
        if name == "lm_head.weight":
            state[name] = state["transformer.word_embeddings.weight"].clone()
        elif name.endswith("attn.bias") or name.endswith("attention.bias"):
            state[name] = torch.tril(torch.ones(shape)).to(torch.uint8 if "attention" in name else dtype)
        elif name.endswith("masked_bias"):
            state[name] = torch.tensor(-1e9).to(torch.float32)
        else:
            state[name] = 10000.0 ** -(torch.arange(shape[0]) / shape[0])
    return state


def write_weights(folder: Path, state: State, n_shards: int) -> None:
    """model.safetensors, or n_shards files and model.safetensors.index.json."""
    names = sorted(state)
    if n_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for i in range(n_shards):
        part = names[len(names) * i // n_shards : len(names) * (i + 1) // n_shards]
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def reload(folder: Path, spec: Spec) -> Any:
    """The folder as from_pretrained reads it (Bamboo, which transformers has not, by its tensors' names)."""
    if spec.config["model_type"] != "bamboo":
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return build(json.loads((folder / "config.json").read_text()), {name: t.float() for name, t in state.items()})


# ---- checks -----------------------------------------------------------------------------------------------------


@contextmanager
def half_cache(model: Any) -> Iterator[bool]:
    """Keys and values rounded to float16 before attention, where the model's code has a place for it."""
    module = sys.modules[type(model).__module__]
    plain: Callable[..., Any] | None = getattr(module, "eager_attention_forward", None)
    if plain is None:
        yield False
        return

    def rounded(layer: Any, query: Any, key: Any, value: Any, *rest: Any, **keys: Any) -> Any:
        return plain(layer, query, key.half().float(), value.half().float(), *rest, **keys)

    module.eager_attention_forward = rounded  # type: ignore[attr-defined]
    try:
        yield True
    finally:
        module.eager_attention_forward = plain  # type: ignore[attr-defined]


def attention_spread(model: Any, prompt: np.ndarray) -> float:
    """Mean over layers, heads and late positions of the largest attention weight (1 / n_keys if uniform)."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor(prompt[None].astype(np.int64)), output_attentions=True, use_cache=False)
    return float(np.mean([layer[0, :, 8:].amax(-1).mean().item() for layer in out.attentions]))


def forgotten(state: State, spec: Spec) -> Iterator[tuple[str, State]]:
    """Each bias as zero, each norm weight as doing nothing: (name, weights with it)."""
    offset = 1.0 if spec.config["model_type"].startswith("gemma") or spec.config["model_type"] == "nemotron" else 0.0
    for name, tensor in state.items():
        if name.endswith("k_proj.bias") and spec.config["model_type"] == "opt":
            continue  # without rotation it adds the same to every score of a query: the softmax takes it out
        if name.endswith("bias"):
            yield name, {**state, name: torch.zeros_like(tensor)}
        elif tensor.ndim == 1:
            yield name, {**state, name: torch.full_like(tensor, 1.0 - offset)}


def check(spec: Spec, model: Any, prompts: list[np.ndarray], expected: list[np.ndarray]) -> list[str]:
    """What a fixture would not show, as lines; prints the figures."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    problems = []
    smallest = ("", 9.0)
    for name, changed in forgotten(state, spec):
        model.load_state_dict(changed)
        moved = difference(logits_of(model, prompts), expected)
        if moved < smallest[1]:
            smallest = (name, moved)
        if moved < SEEN:
            problems.append(f"{name} left out moves the logits by {moved:.1e}")
    model.load_state_dict(state)
    lines = []
    for change in (*spec.matters, *spec.shades):
        other = build({**spec.config, **change}, state)
        moved = difference(logits_of(other, prompts), expected)
        lines.append(f"{change}: {moved:.1e}")
        if moved < SEEN and change in spec.matters:
            problems.append(f"{change} moves the logits by {moved:.1e}")
    with half_cache(model) as possible:
        half = f"{difference(logits_of(model, prompts), expected):.1e}" if possible else "?"
    print(
        f"  std {np.std(np.concatenate(expected)):.2f}, largest attention {attention_spread(model, prompts[0]):.2f},"
        f" half cache {half}, least vector {smallest[0]} {smallest[1]:.1e}"
    )
    print("  " + "; ".join(lines))
    return problems


def make(spec: Spec) -> list[str]:
    """Write one family's folder; returns what it would not show."""
    folder = FOLDER / spec.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build(spec.config)
    dtype = getattr(torch, spec.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.tensor(draw(name, parameter.shape, spec), dtype=torch.float32)
            parameter.copy_(drawn.to(dtype).float())
    config = {**spec.config, **({"torch_dtype": spec.dtype} if "torch_dtype" in spec.config else {})}
    _write_json(folder / "config.json", config)
    if config["model_type"] != "bamboo":
        today = json.loads(model.config.to_json_string(use_diff=True))
        _write_json(folder / "config.transformers5.json", {**today, "dtype": spec.dtype})
    stop = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", {**stop, "_from_model_config": True, **spec.generation})
    write_tokenizer(folder, spec)
    write_weights(folder, on_disk(model, spec), spec.n_shards)
    rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
    for file, lengths in (("expected.npz", spec.prompt_lengths), ("expected_short.npz", spec.short)):
        if not lengths:
            continue
        prompts = [rng.integers(0, EOS, n).astype(np.int32) for n in lengths]
        expected = logits_of(model, prompts)
        arrays = {f"ids{i}": ids for i, ids in enumerate(prompts)}
        arrays.update({f"logits{i}": logits for i, logits in enumerate(expected)})
        np.savez_compressed(folder / file, **arrays)  # type: ignore[arg-type]
        error = difference(logits_of(reload(folder, spec), prompts), expected)
        if error > 1e-5:
            raise SystemExit(f"{spec.name}: from_pretrained gives other logits, by {error:.1e}")
        if file == "expected.npz":
            problems = check(spec, model, prompts, expected)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"  {size / 1e3:.0f} kB, reloaded within {error:.0e}")
    return problems


def main(names: list[str]) -> None:
    """Make the named families, or all."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, end token {IM_END}")
    for spec in SPECS:
        if not names or spec.name in names:
            print(spec.name, flush=True)
            for problem in make(spec):
                print(f"  HIDDEN: {problem}")


if __name__ == "__main__":
    main(sys.argv[1:])
