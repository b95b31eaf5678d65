"""From a recording to predictors for all layers: rank search, training, rounding, cut-offs, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from ..formats.types import GGMLType
from . import predictor, transpose
from .neurons import post_norm, projections
from .predictor import Choices, Prices, Trained, Truth, Weights, settle
from .predictor_torch import FFN, Layer, device, prepare, train
from .profile import statistics
from .recording import Recording

_SEARCHED = 2048  # tokens on which ranks are compared
_MARGIN = 0.15  # of what may be missed: the cut-offs aim higher, as other text is never quite like theirs


@dataclass(frozen=True)
class Plan:
    """What is wanted: shares of active neurons and of their output to be found, how long to train, how to store.

    limits: thresholds float32 [n_layer] of |act(gate)| for models whose neurons are never exactly zero.
    Energy decides what predictors cost. On a ReLU SmolLM2 (34 % active, ranks around 200) 0.998, 0.9995, 0.9999 and
    0.99998 predicted 44, 55, 62 and 68 % of the neurons and changed perplexity by +1.9, +0.5, +0.1 and -0.1 %.
    """

    kind: str = "relu"
    recall: float = 0.95
    energy: float = 0.99995
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
    recorded: Recording,
    split: Split,
    plan: Plan,
    progress: Callable[[int, str], object] = lambda layer, what: None,
) -> list[Trained]:
    """A predictor for each layer; progress is called with a layer's number and what is going on there."""
    parameters = sum(math.prod(info.shape) for info in file.tensors.values())
    left = predictor.SIZE_SHARE * parameters
    each = config.n_embd + config.n_ff  # weights of one rank
    prices = _prices(file, config, plan.stored)
    drafts = []
    for n in range(config.n_layer):
        limit = max(predictor.STEP, int(left / (config.n_layer - n) / each))
        layer = _Layer(file, config, n, recorded, split, plan)
        drafts.append(layer.draft(limit, prices, partial(progress, n)))
        left -= drafts[-1].rank * each
    price = settle([draft.choices for draft in drafts], *_aims(plan))
    result = []
    for n, draft in enumerate(drafts):
        progress(n, "judging")
        result.append(_Layer(file, config, n, recorded, split, plan).judged(draft, price))
    return result


def _prices(file: GGUFFile, config: ModelConfig, stored: GGMLType) -> Prices:
    rank = (config.n_embd + config.n_ff) * stored.type_size / stored.block_size
    rows = sum(file.info(f"blk.0.{part}.weight").row_size for part in projections(config))
    down_t = transpose.down_t_type(file, config)
    return Prices(rank, rows + config.n_embd * down_t.type_size / down_t.block_size)


def _aims(plan: Plan) -> tuple[float, float]:
    """The shares that the cut-offs aim at on the tokens that they are chosen on."""
    return plan.recall + _MARGIN * (1 - plan.recall), plan.energy + _MARGIN * (1 - plan.energy)


@dataclass(frozen=True)
class _Draft:
    """A trained predictor as stored, its cut-offs still open: one choice for each price."""

    rank: int
    a: np.ndarray
    b: np.ndarray
    choices: Choices
    bias: np.ndarray


class _Layer:
    def __init__(
        self, file: GGUFFile, config: ModelConfig, n: int, recorded: Recording, split: Split, plan: Plan
    ) -> None:
        self.n_embd, self.n_ff, self.plan = config.n_embd, config.n_ff, plan

        def tensor(name: str) -> torch.Tensor | None:
            found = f"blk.{n}.{name}"
            return torch.from_numpy(file.dequantized(found)).to(device()) if config.has(name) else None

        gate, down = tensor(f"{projections(config)[0]}.weight"), tensor("ffn_down.weight")
        assert gate is not None and down is not None
        self.ffn = FFN(
            gate,
            tensor("ffn_up.weight") if config.gated else None,
            down.norm(dim=0),
            config.activation,
            None if plan.limits is None else float(plan.limits[n]),
            tensor(f"{projections(config)[0]}.bias"),
            tensor("ffn_up.bias") if config.gated else None,
            post_norm(file, config, n),
            config.activation_floors[n],
        )
        self.inputs, self.sizes = recorded.inputs[n], recorded.sizes[n]
        ends = [0, *np.cumsum([split.trained, split.cuts, split.judged]).tolist()]
        self.parts = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]

    def truth(self, part: slice) -> tuple[np.ndarray, Truth]:
        """(inputs float32, what the neurons really do)."""
        x = self.inputs[part].astype(np.float32)
        active, energy = self.ffn.see(*(torch.from_numpy(value).to(device()) for value in (x, self.sizes[part])))
        return x, Truth(active.cpu().numpy(), energy.cpu().numpy())

    def draft(self, limit: int, prices: Prices, progress: Callable[[str], object]) -> _Draft:
        plan, trained = self.plan, self.parts[0]
        progress("targets")
        layer = prepare(self.ffn, self.inputs[trained], self.sizes[trained])
        x, truth = self.truth(self.parts[1])
        if plan.kind == "dejavu":
            rank = min(predictor.DEJAVU_RANK, self.n_embd) // predictor.STEP * predictor.STEP
        else:
            progress("rank")
            some = Truth(truth.active[:_SEARCHED], truth.energy[:_SEARCHED])
            first = predictor.first_rank(statistics(truth.active.mean(axis=0)), self.n_embd)
            cost = partial(self._cost, layer, prices, x[:_SEARCHED], some)
            rank = predictor.search_rank(first, limit, cost)
        total = plan.epochs * trained.stop

        def told(tokens: int) -> None:
            progress(f"rank {rank}, {min(1, tokens / total):.0%} trained")

        a, b, bias = train(layer, rank, plan.kind, plan.epochs, told)
        progress("cut-offs")
        a, b = transpose.encoded(a, plan.stored), transpose.encoded(b, plan.stored)
        return _Draft(rank, a, b, predictor.choices(self._weights(rank, a, b).scores(x), truth), bias)

    def judged(self, draft: _Draft, price: int) -> Trained:
        cut = -draft.bias if self.plan.kind == "dejavu" else draft.choices.by_price[price].cut
        x, truth = self.truth(self.parts[2])
        scores = self._weights(draft.rank, draft.a, draft.b).scores(x)
        return Trained(draft.rank, draft.a, draft.b, cut, predictor.quality(scores, cut, truth))

    def _weights(self, rank: int, a: np.ndarray, b: np.ndarray) -> Weights:
        shapes = (rank, self.n_embd), (self.n_ff, rank)
        stored = self.plan.stored
        return Weights(self.plan.kind, *(transpose.decoded(m, s, stored) for m, s in zip((a, b), shapes, strict=True)))

    def _cost(self, layer: Layer, prices: Prices, x: np.ndarray, truth: Truth, rank: int) -> float:
        """Bytes that a token reads with the linear start of this rank: training changes all ranks much alike."""
        a, b, _ = (m.cpu().numpy() for m in layer.start(rank, self.plan.kind))
        found = predictor.choices(Weights(self.plan.kind, a, b).scores(x), truth)
        chosen = found.by_price[settle([found], *_aims(self.plan))]
        return prices.of(rank, chosen.predicted / truth.active.size, self.n_ff)
