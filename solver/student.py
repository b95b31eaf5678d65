"""A student of a model: the same decoder with ReLU FFNs, and a linear bypass beside each layer's neurons (PyTorch).

What SiLU lets through of closed gates is small for each neuron, but nearly a linear function of the input for all of
them together; one matrix a layer takes its place, so that the neurons are left with what is sparse.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..formats.lora import Factors
from .torch_model import TorchModel

PARTS = ("gate", "up", "down", "bypass")
CUT = 0.15  # of a layer's open gates, the least, that its floor comes to close: they add next to nothing
SAMPLE = 100_000  # gates
SOFTNESS = 0.5  # of the step that stands for `gate > floor` in gradients, in RMS of the gate


class Ffn:
    """A layer's own part: down h + bypass x + bias, where h = relu(gate x) * (up x) from the floor on and else 0.

    own: what is trained, float32: gate and up [n_ff, n_embd], down [n_embd, n_ff], bypass [n_embd, n_embd] and
    bypass_bias [n_embd]; or with a base (its matrices by part), `PART.a` [rank, n_in] and `PART.b` [n_out, rank] for
    each part, whose products are added to the base's.
    """

    def __init__(self, own: dict[str, Tensor], base: dict[str, Tensor] | None = None, floor: float = 0.0) -> None:
        self.own, self.base, self.floor = own, base, floor

    @classmethod
    def whole(cls, model: TorchModel, layer: int) -> Ffn:
        """All matrices, from the model's own."""
        own = {part: value.float().clone() for part, value in _matrices(model, layer).items()}
        n = model.config.n_embd
        own |= {"bypass": torch.zeros(n, n, device=model.device), "bypass_bias": torch.zeros(n, device=model.device)}
        return cls(own)

    @classmethod
    def low_rank(cls, model: TorchModel, layer: int, rank: int, seed: int) -> Ffn:
        """Updates of this rank (the bypass: `bypass_rank`), zero at first. Source: LoRA (Hu et al. 2021)."""
        n, base, own = model.config.n_embd, _matrices(model, layer), dict[str, Tensor]()
        shapes = {part: (*value.shape, rank) for part, value in base.items()} | {"bypass": (n, n, bypass_rank(n, rank))}
        generator = torch.Generator().manual_seed(seed + layer)
        for part, (n_out, n_in, r) in shapes.items():
            own[f"{part}.a"] = (torch.randn(r, n_in, generator=generator) / math.sqrt(n_in)).to(model.device)
            own[f"{part}.b"] = torch.zeros(n_out, r, device=model.device)
        return cls(own, base)

    def matrix(self, part: str) -> Tensor:
        """A matrix as it is now, in float32."""
        if self.base is None:
            return self.own[part]
        change = self.own[f"{part}.b"] @ self.own[f"{part}.a"]
        return change + self.base[part] if part in self.base else change

    def tensors(self) -> list[Tensor]:
        return list(self.own.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """What is trained, as float32 arrays by name."""
        return {name: value.detach().cpu().numpy() for name, value in self.own.items()}

    def factors(self) -> dict[str, Factors]:
        """Of low-rank FFNs, the pairs of factors by part."""
        arrays = self.arrays()
        return {part: Factors(arrays[f"{part}.a"], arrays[f"{part}.b"]) for part in PARTS}

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"own": {name: value.detach() for name, value in self.own.items()}, "floor": self.floor}

    def load(self, state: dict[str, Any]) -> None:
        """Be as one of the same shapes was."""
        self.floor = state["floor"]
        with torch.no_grad():
            for name, value in self.own.items():
                value.copy_(state["own"][name])

    def neurons(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h, raw gate) of normed inputs x, in x's type."""
        gate = F.linear(x, self.matrix("gate").to(x.dtype))
        open_gate = F.relu(gate) if self.floor == 0 else torch.where(gate >= self.floor, gate, 0)
        return open_gate * F.linear(x, self.matrix("up").to(x.dtype)), gate

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(what is added to the residual, float32; raw gate) of normed inputs x."""
        hidden, gate = self.neurons(x)
        out = F.linear(hidden, self.matrix("down").to(x.dtype)).float()
        out = out + F.linear(x, self.matrix("bypass").to(x.dtype)).float()
        return (out + self.own["bypass_bias"] if "bypass_bias" in self.own else out), gate

    def least(self, gate: Tensor) -> Tensor:
        """What a share `CUT` of the open gates do not exceed, a number."""
        some = gate.flatten()[:: max(1, gate.numel() // SAMPLE)].float()
        some = some[some > 0]
        return torch.quantile(some, CUT) if len(some) else some.new_zeros(())

    def active(self, gate: Tensor) -> Tensor:
        """Which neurons are active."""
        return gate >= self.floor if self.floor > 0 else gate > 0

    def density(self, gate: Tensor) -> Tensor:
        """The share of active neurons, a number."""
        return self.active(gate).float().mean()

    def reorder(self, order: Tensor) -> None:
        """Put the neurons into another order, which changes nothing else; a base's cannot be moved."""
        assert self.base is None
        self.own |= {"gate": self.own["gate"][order], "up": self.own["up"][order], "down": self.own["down"][:, order]}

    def soft_density(self, gate: Tensor) -> Tensor:
        """A smooth stand-in for `density`; does not change when gates and floor are scaled."""
        scale = gate.detach().float().square().mean().sqrt() * SOFTNESS
        return torch.sigmoid((gate - self.floor) / scale.to(gate.dtype)).mean().float()


def bypass_rank(n_embd: int, rank: int) -> int:
    """Of the bypass of low-rank FFNs: what is missing there has more directions than the updates."""
    return min(n_embd // 2, 4 * rank)


class Outcome(NamedTuple):
    """Normed final residual [n_windows, n_tokens, n_embd]; by layer with another FFN: soft density, density, least."""

    normed: Tensor
    soft: Tensor
    density: Tensor
    least: Tensor


class Student:
    """A teacher whose first len(ffns) layers have other FFNs.

    saving: keep little for the backward pass, and compute each block twice instead (gradient checkpointing).
    """

    def __init__(self, teacher: TorchModel, ffns: list[Ffn], saving: bool = False) -> None:
        self.teacher, self.ffns, self.saving = teacher, ffns, saving

    def block(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(residual after the layer, soft density, density, `least`) of the residual x before it."""
        teacher = self.teacher
        x = x + teacher.attention(layer, x)
        if layer >= len(self.ffns):
            none = torch.zeros((), device=x.device)
            return x + teacher.ffn(layer, x), none, none, none
        ffn = self.ffns[layer]
        y, gate = ffn(teacher.norm(f"blk.{layer}.ffn_norm", x))
        density = ffn.density(gate.detach())
        if not torch.is_grad_enabled():
            return x + y, density, density, density
        return x + y, ffn.soft_density(gate), density, ffn.least(gate.detach())

    def forward(self, ids: Tensor) -> Outcome:
        """The whole decoder on ids int64 [n_windows, n_tokens]."""
        x, found = self.teacher.embed(ids), []
        for layer in range(self.teacher.config.n_layer):
            if self.saving and torch.is_grad_enabled():
                x, *numbers = checkpoint(self.block, layer, x, use_reentrant=False)
            else:
                x, *numbers = self.block(layer, x)
            found.append(torch.stack(numbers))
        by_kind = torch.stack(found[: len(self.ffns)]).T if self.ffns else x.new_zeros(3, 0)
        return Outcome(self.teacher.norm("output_norm", x), *by_kind)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> tuple[float, list[float]]:
        """(perplexity, density per student layer) on windows of ids int64 [n, n_tokens]."""
        nll, shares = [], []
        for ids in windows.split(4):
            ids = ids.to(self.teacher.device)
            outcome = self.forward(ids)
            nll.append(torch.from_numpy(self.teacher.nll(outcome.normed, ids)))
            shares.append(outcome.density.cpu().double() * len(ids) / len(windows))
        return math.exp(float(torch.cat(nll).mean())), torch.stack(shares).sum(0).tolist()

    @torch.no_grad()
    def put_hot_first(self, windows: Tensor) -> None:
        """Sort each layer's neurons by how often they are active on these windows: rows read together lie together."""
        counts = [torch.zeros(ffn.own["gate"].shape[0], device=self.teacher.device) for ffn in self.ffns]
        for ids in windows.split(4):
            x = self.teacher.embed(ids.to(self.teacher.device))
            for layer, ffn in enumerate(self.ffns):
                x = x + self.teacher.attention(layer, x)
                y, gate = ffn(self.teacher.norm(f"blk.{layer}.ffn_norm", x))
                counts[layer] += ffn.active(gate).flatten(0, 1).float().sum(0)
                x = x + y
        for ffn, count in zip(self.ffns, counts, strict=True):
            ffn.reorder(count.argsort(descending=True, stable=True))


def _matrices(model: TorchModel, layer: int) -> dict[str, Tensor]:
    return {part: model.weights[f"blk.{layer}.ffn_{part}.weight"] for part in PARTS[:3]}
