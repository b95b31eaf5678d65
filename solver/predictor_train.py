"""From a recording to predictors for all layers: rank search, training, rounding, cut-offs, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from ..formats.types import GGMLType
from . import predictor, transpose
from .predictor import Prices, Trained, choose_cuts
from .predictor_torch import FFN, Layer, device, prepare, train
from .profile import statistics

_SEARCHED = 2048  # tokens on which ranks are compared
_MARGIN = 0.15  # of what may be missed: the cut-offs aim higher, as other text is never quite like theirs


@dataclass(frozen=True)
class Plan:
    """What is wanted: shares of active neurons and of their output to be found, how long to train, how to store.

    limits: thresholds float32 [n_layer] of |act(gate)| for models whose neurons are never exactly zero.
    """

    kind: str = "relu"
    recall: float = 0.95
    energy: float = 0.999
    epochs: float = 2.0
    stored: GGMLType = GGMLType.Q8_0
    limits: np.ndarray | None = None


@dataclass(frozen=True)
class Split:
    """How many recorded tokens, in this order, are trained on, set the cut-offs, and judge the result."""

    trained: int
    cuts: int
    judged: int


def train_all(
    file: GGUFFile,
    config: ModelConfig,
    inputs: np.ndarray,
    split: Split,
    plan: Plan,
    progress: Callable[[int, str], object] = lambda layer, what: None,
) -> Iterator[Trained]:
    """Yield a predictor for each layer in turn; inputs: float16 [n_layer, n_tok, n_embd], see Recording."""
    parameters = sum(math.prod(info.shape) for info in file.tensors.values())
    left = predictor.SIZE_SHARE * parameters
    each = config.n_embd + config.n_ff  # weights of one rank
    prices = _prices(file, config, plan.stored)
    for n in range(config.n_layer):
        limit = max(predictor.STEP, int(left / (config.n_layer - n) / each))
        result = _Trainer(file, config, n, inputs[n], split, plan).run(limit, prices, partial(progress, n))
        left -= result.rank * each
        yield result


def _prices(file: GGUFFile, config: ModelConfig, stored: GGMLType) -> Prices:
    rank = (config.n_embd + config.n_ff) * stored.type_size / stored.block_size
    rows = sum(file.tensors[f"blk.0.ffn_{part}.weight"].row_size for part in ("gate", "up"))
    down_t = transpose.down_t_type(file, config)
    return Prices(rank, rows + config.n_embd * down_t.type_size / down_t.block_size)


class _Trainer:
    def __init__(
        self, file: GGUFFile, config: ModelConfig, n: int, inputs: np.ndarray, split: Split, plan: Plan
    ) -> None:
        self.n_embd, self.n_ff, self.plan = config.n_embd, config.n_ff, plan
        gate, up, down = (
            torch.from_numpy(file.dequantized(f"blk.{n}.ffn_{part}.weight")).to(device())
            for part in ("gate", "up", "down")
        )
        limit = None if plan.limits is None else float(plan.limits[n])
        self.ffn = FFN(gate, up, down.norm(dim=0), config.activation, limit)
        ends = np.cumsum([split.trained, split.cuts, split.judged])
        self.trained = inputs[: ends[0]]
        self.cuts, self.judged = (self._truth(inputs[a:b]) for a, b in ((ends[0], ends[1]), (ends[1], ends[2])))

    def _truth(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs float32, active, energy) of held-out tokens."""
        x = inputs.astype(np.float32)
        active, energy = self.ffn.see(torch.from_numpy(x).to(device()))
        return x, active.cpu().numpy(), energy.cpu().numpy()

    def run(self, limit: int, prices: Prices, progress: Callable[[str], object]) -> Trained:
        plan = self.plan
        progress("targets")
        layer = prepare(self.ffn, self.trained)
        if plan.kind == "dejavu":
            rank = min(predictor.DEJAVU_RANK, self.n_embd) // predictor.STEP * predictor.STEP
        else:
            progress("rank")
            stats = statistics(self.cuts[1].mean(axis=0))
            rank = predictor.search_rank(
                predictor.first_rank(stats, self.n_embd), limit, lambda rank: self._cost(layer, rank, prices)
            )
        total = plan.epochs * len(self.trained)

        def trained(tokens: int) -> None:
            progress(f"rank {rank}, {min(1, tokens / total):.0%} trained")

        a, b, bias = train(layer, rank, plan.kind, plan.epochs, trained)
        progress("cut-offs")
        a_bytes, b_bytes = (transpose.encoded(m, plan.stored) for m in (a, b))
        weights = predictor.Weights(
            plan.kind,
            transpose.decoded(a_bytes, a.shape, plan.stored),
            transpose.decoded(b_bytes, b.shape, plan.stored),
        )
        cut = -bias if plan.kind == "dejavu" else self._cut(weights.scores(self.cuts[0]), *self.cuts[1:])
        quality = predictor.quality(weights.scores(self.judged[0]), cut, *self.judged[1:])
        return Trained(rank, a_bytes, b_bytes, cut, quality)

    def _cut(self, scores: np.ndarray, active: np.ndarray, energy: np.ndarray) -> np.ndarray:
        recall, strong = (share + _MARGIN * (1 - share) for share in (self.plan.recall, self.plan.energy))
        return choose_cuts(scores, active, energy, recall, strong)

    def _cost(self, layer: Layer, rank: int, prices: Prices) -> float:
        """Bytes that a token reads with the linear start of this rank: training changes all ranks much alike."""
        a, b, _ = (m.cpu().numpy() for m in layer.start(rank, self.plan.kind))
        x, active, energy = (part[:_SEARCHED] for part in self.cuts)
        scores = predictor.Weights(self.plan.kind, a, b).scores(x)
        cut = self._cut(scores, active, energy)
        return prices.of(rank, float((scores >= cut).mean()), self.n_ff)
