"""What a model will need of the CPU's memory, told from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from .decoder import build
from .engine import MAX_OUTPUTS, MICRO_BATCH, default_context, token_bytes
from .graph import memory_of


@dataclass(frozen=True)
class Footprint:
    """Bytes of the weights (mapped, so they may be read again from disk), of one token's keys and values, and about how
    many all values of a step take; n_ctx: the context that an engine would have here if none is asked for."""

    weights: int
    token: int
    work: int
    n_ctx: int

    @property
    def total(self) -> int:
        """With a cache for n_ctx tokens."""
        return self.weights + self.token * self.n_ctx + self.work


def footprint(file: GGUFFile, config: ModelConfig) -> Footprint:
    """The needs of a dense engine."""
    widths: dict[str, int] = {}
    for value, width in build(config).widths.items():
        rows = MAX_OUTPUTS if value == "logits" else MICRO_BATCH
        if config.n_expert and value in ("gate", "up", "h", "sums"):
            rows *= config.n_expert_used
        widths[memory_of(value)] = rows * width
    weights = sum(info.nbytes for info in file.tensors.values())
    return Footprint(weights, token_bytes(config), 4 * sum(widths.values()), default_context(config))
