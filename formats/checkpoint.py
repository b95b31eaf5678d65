"""A Hugging Face checkpoint folder as what a GGUF file of it has: keys and tensors, nothing written yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .architecture_terms import Architecture
from .architectures import ARCHITECTURES
from .checkpoint_card import general_keys
from .checkpoint_keys import architecture_keys
from .checkpoint_settings import Settings
from .checkpoint_tensors import Plan, Source, own_type, sizes_of
from .checkpoint_terms import NO_TEXT, WRAPPED
from .errors import FormatError, ModelNotFoundError, UnsupportedError
from .gguf_header import show
from .hf_tokenizer import tokenizer_fields
from .hf_vocabulary import read_json
from .safetensors import Weight, Weights


class HFCheckpoint:
    """An open checkpoint: `keys` and `sources` (tensors, in order) of the file to be; `notes` for the person.

    Raises ModelNotFoundError, FormatError and UnsupportedError, each naming what is wrong and where.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder}: no such folder")
        path = folder / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(f"{folder}: there is no config.json: it is no Hugging Face checkpoint")
        self.folder, config = folder, read_json(path)
        self.row, wrapped = _row(path, config)
        name = config["architectures"][0]
        _refuse_quantised(path, config)
        if wrapped:
            config = _text_settings(path, config)
        said = Settings(path, config, {**self.row.hf.defaults, **self.row.hf.class_defaults.get(name, {})})
        n_vocab = said.integer("vocab_size")
        if n_vocab is None:
            raise said.error("vocab_size", "nothing", "the number of tokens")
        own, made, self.notes = architecture_keys(self.row, name, said)
        tied = said.flag("tie_word_embeddings", True) if "tie_word_embeddings" in said.values else None
        self.weights = Weights(folder)
        if wrapped:
            self.weights.tensors = _text_weights(self.weights.tensors)
            self.notes.append("the model is one for text and pictures; only its text part is converted")
        try:
            sizes = sizes_of(own, n_vocab)
            n_layer, rope_dim = own["block_count"], own.get("rope.dimension_count", 0)
            self.sources = Plan(self.row, self.weights, sizes, n_layer, rope_dim, tied, made).sources
            self.keys: dict[str, Any] = general_keys(folder, count(self.sources))
            self.keys |= {f"{self.row.name}.{key}": value for key, value in own.items()}
            self.keys[f"{self.row.name}.vocab_size"] = n_vocab
            self.keys |= tokenizer_fields(folder, n_vocab, config)
        except BaseException:
            self.close()
            raise

    @property
    def own_type(self) -> str:
        """The type that most weights are stored in: F32, F16 or BF16 (F32 for F64)."""
        return own_type(self.sources).replace("F64", "F32")

    def close(self) -> None:
        """Let the weights go."""
        self.weights.close()

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _row(path: Path, config: dict[str, Any]) -> tuple[Architecture, bool]:
    """The row of a checkpoint's class, and whether it is only the text part of that."""
    said = config.get("architectures")
    if not isinstance(said, list) or not said or not isinstance(said[0], str):
        raise FormatError(path, "setting 'architectures'", show(said), "the name of the model's class")
    classes = {name: (row, False) for row in ARCHITECTURES.values() for name in row.hf.classes}
    classes |= {name: (row, True) for row in ARCHITECTURES.values() for name in row.hf.wrapped}
    if said[0] not in classes:
        supported = ", ".join(sorted(classes))
        raise UnsupportedError(f"{path}: the architecture {show(said[0])} is not supported; supported: {supported}")
    return classes[said[0]]


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    for name in ("quantization_config", "quantization"):  # the second is MLX's
        if config.get(name):
            what = f"a quantised checkpoint ({name}) cannot be converted; take the original one"
            raise UnsupportedError(f"{path}: {what}")


def _text_settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text part; ids of tokens are often said outside of it only."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise FormatError(path, "setting 'text_config'", show(text), "the settings of the text part")
    return {**{name: value for name, value in config.items() if name.endswith("_token_id")}, **text}


def _text_weights(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The text part's tensors, by the names that they have in a model of text alone."""
    found = {}
    for name, weight in tensors.items():
        prefix = next((prefix for prefix in WRAPPED if name.startswith(prefix)), "")
        if not name.startswith(NO_TEXT):
            found[WRAPPED.get(prefix, "") + name.removeprefix(prefix)] = weight
    return found


def count(sources: list[Source]) -> tuple[int, int, int, int]:
    """Weights: all, those outside experts, those of one expert in every layer; and how many experts there are."""
    total = shared = one = n_expert = 0
    for source in sources:
        size = math.prod(source.shape)
        total += size
        if "_exps." in source.name:
            n_expert = source.shape[-1]
            one += size // n_expert
        else:
            shared += size
    return total, shared, one, n_expert
