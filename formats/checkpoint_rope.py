"""Rotations of a Hugging Face checkpoint -> the keys of a GGUF file, and the tensors that some scalings have in it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .architecture_terms import Architecture
from .checkpoint_settings import MAX_INT, Keys, Settings, as_number
from .checkpoint_terms import ROPE_BASE, ROTATED_PART
from .gguf_header import show

_PLAIN = ("default", "none", "")
_NO_SCALING = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}  # what may be said without a kind of scaling


class Rope:
    """What config.json says of rotations: `keys` ({arch}.*), `tensors`, and `notes` for the person."""

    def __init__(self, row: Architecture, said: Settings, head_dim: int, n_ctx: int) -> None:
        self.said, self.keys, self.n_ctx = said, Keys(), n_ctx
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self.notes: list[str] = []
        part = said.number(*ROTATED_PART)
        base = said.number(*ROPE_BASE)
        self.base = 10000.0 if base is None else base
        if self.base < 2.0:
            raise said.error(said.find(ROPE_BASE)[0], self.base, "a number from 2")
        self.dim = int(head_dim * (1.0 if part is None else part))
        if not 0 < self.dim <= head_dim or self.dim % 2:
            raise said.error(said.find(ROTATED_PART)[0], part, f"a part of {head_dim} that is an even number")
        self.keys["rope.dimension_count"] = self.dim
        self.keys["rope.freq_base"] = self.base
        if row.local_base and (local := said.number("rope_local_base_freq")) is not None:
            self.keys["rope.freq_base_swa"] = local
        scaling = said.values.get("rope_scaling")
        if scaling is None:
            return
        if not isinstance(scaling, dict):
            raise said.error("rope_scaling", show(scaling), "an object")
        self.scaling = scaling
        kind = scaling.get("rope_type") or scaling.get("type") or ""
        if not isinstance(kind, str):
            raise said.error("rope_scaling.rope_type", show(kind), "a word")
        if kind in _PLAIN:
            if not kind and (more := scaling.keys() - _NO_SCALING):
                raise said.error("rope_scaling", f"{show(min(more))} without a rope_type", "a rope_type")
            return
        made = {
            "linear": self.linear,
            "dynamic": self.dynamic,
            "yarn": self.yarn,
            "llama3": self.llama3,
            "longrope": self.longrope,
            "su": self.longrope,
        }
        if kind not in made:
            raise said.unsupported(f"rope scaling of type {show(kind)} is not supported; supported: {', '.join(made)}")
        made[kind]()

    def number(self, name: str, default: float | None = None) -> float:
        value = self.scaling.get(name)
        value = default if value is None else value
        return as_number(value, lambda wanted: self.said.error(f"rope_scaling.{name}", show(value), wanted))

    def factor(self) -> float:
        value = self.number("factor")
        if value < 1.0:
            raise self.said.error("rope_scaling.factor", value, "a number from 1")
        return value

    def original(self, default: int) -> int:
        """The context that was trained before it was stretched."""
        value = self.scaling.get("original_max_position_embeddings")
        value = self.said.integer("original_max_position_embeddings") if value is None else value
        value = default if value is None else value
        if type(value) is not int or not 1 < value <= MAX_INT:
            raise self.said.error("original_max_position_embeddings", show(value), "an integer greater than 1")
        return value

    def linear(self) -> None:
        self.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.factor()}

    def dynamic(self) -> None:
        self.notes.append(f"dynamic rope scaling, for contexts beyond {self.n_ctx} tokens, is left out")

    def yarn(self) -> None:
        factor = self.factor()
        if self.scaling.get("truncate") is False:
            raise self.said.unsupported("yarn with truncate = false is not supported")

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0

        default = mscale(1.0)
        if self.scaling.get("mscale") and self.scaling.get("mscale_all_dim"):
            below = mscale(self.number("mscale_all_dim"))
            if below <= 0.0:
                raise self.said.error("rope_scaling.mscale_all_dim", self.scaling["mscale_all_dim"], "a number from 0")
            default = mscale(self.number("mscale")) / below
        self.keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": self.original(self.n_ctx),
        }
        # Readers multiply by 1 + 0.1 ln(factor) themselves.
        extra = self.number("attention_factor", default) / mscale(1.0)
        if not math.isclose(extra, 1.0, rel_tol=1e-6):
            self.keys["rope.scaling.attn_factor"] = extra
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if (value := self.number(name, usual) or usual) != usual:
                self.keys[f"rope.scaling.yarn_{name}"] = value

    def llama3(self) -> None:
        factor, low, high = self.factor(), self.number("low_freq_factor"), self.number("high_freq_factor")
        if not 0.0 < low < high:
            raise self.said.error("rope_scaling.low_freq_factor", low, f"more than 0 and less than {high}")
        original = self.original(self.n_ctx)
        waves = 2.0 * np.pi * self.base ** (np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        between = (original / waves - low) / (high - low)
        mixed = 1.0 / ((1.0 - between) / factor + between)
        factors = np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, mixed))
        self.tensors["rope_freqs.weight"] = factors.astype(np.float32)

    def longrope(self) -> None:
        original = self.original(self.n_ctx)
        for name in ("long", "short"):
            values = self.scaling.get(f"{name}_factor")
            if not isinstance(values, list) or len(values) != self.dim // 2:
                wanted = f"{self.dim // 2} numbers, one for each rotation"
                raise self.said.error(f"rope_scaling.{name}_factor", show(values), wanted)
            error = self.said.error(f"rope_scaling.{name}_factor", show(values), "numbers greater than 0")
            numbers = [as_number(value, lambda _: error) for value in values]  # noqa: B023
            if min(numbers) <= 0.0:
                raise error
            self.tensors[f"rope_factors_{name}.weight"] = np.array(numbers, np.float32)
        factor = self.number("factor", self.n_ctx / original)
        usual = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
        self.keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": self.number("attention_factor", usual),
        }
