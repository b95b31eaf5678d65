"""Training of predictors (PyTorch, the extra `train`): one layer at a time, on inputs recorded from real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .torch_model import ACTIVATIONS, fastest_dtype

BATCH = 1024
RATE = 2e-3  # in units of the typical weight, see train
_SLOPE = 3.0  # of the logits at the start: certainty per standard deviation of the gate
_SHIFT = 3.0  # standard deviations by which the middle is lifted, so that relu passes it whole at the start
_RIDGE = 1e-4
_STRONGEST = 8.0  # how many times the weight of an average active neuron a strong one may have

_ACTIVATIONS = ACTIVATIONS | {"drelu": F.relu}


@dataclass(frozen=True)
class FFN:
    """A layer's weights: gate and up [n_ff, n_embd]; down_norms [n_ff], the lengths of ffn_down's columns.

    Without a gate, up is in its place and None. limit: the threshold of |act(gate)| above which a neuron is active;
    None: where it is not zero. gate_bias, up_bias: [n_ff]. post: what a norm makes of the output (neurons.post_norm),
    or 0. floor: below it, an activated gate is 0.
    """

    gate: Tensor
    up: Tensor | None
    down_norms: Tensor
    activation: str
    limit: float | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    post: float = 0.0
    floor: float = 0.0

    def see(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """(active bool, energy float32) [n_tok, n_ff] for normed inputs [n_tok, n_embd] and residuals' squares [n_tok].

        Energy is a neuron's squared output over that of the token's residual after the layer, taking outputs as
        orthogonal: a few tokens have values so large that without this no other would count beside them.
        """
        gate = _projected(x, self.gate, self.gate_bias)
        value = _ACTIVATIONS[self.activation](gate)
        if self.floor:
            value = value.where(value.abs() >= self.floor, 0.0)
        if self.limit is not None:
            active = value.abs() > self.limit
        else:
            active = value > 0 if self.floor else gate > 0  # a small gate's square may be zero
        if self.up is not None:
            up = _projected(x, self.up, self.up_bias)
            value = value * (F.relu(up) if self.activation == "drelu" else up)
        energy = (value * self.down_norms).square_()
        total = energy.sum(1, keepdim=True)
        if self.post:
            energy, total = energy * (self.post / total.clamp_min(1e-30)), total.new_tensor(self.post)
        return active, energy / (size[:, None] + total).clamp_min(1e-30)

    def to(self, dtype: torch.dtype) -> FFN:
        """The same with matrices of another type."""
        return replace(self, gate=self.gate.to(dtype), up=None if self.up is None else self.up.to(dtype))


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = (x @ weight.T).float()
    return product if bias is None else product + bias


@dataclass(frozen=True)
class Layer:
    """What the predictors of a layer start from and are trained on.

    inputs: float16 [n_tok, n_embd]; target: float16 [n_tok, n_ff], the weight of a neuron's loss, negative where it is
    not active. The rest is the linear predictor of full rank, its directions ordered by what they explain: a
    [n_embd, n_embd], b [n_ff, n_embd], bias [n_ff]; lift [n_embd] is added along `one` [n_embd], for which one . x is
    nearly 1 for every input.
    """

    inputs: Tensor
    target: Tensor
    dtype: torch.dtype
    a: Tensor
    b: Tensor
    bias: Tensor
    means: Tensor
    one: Tensor

    def start(self, rank: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, bias): the best linear map of this rank from inputs to gates, in units of their standard deviations.

        In front of relu the middle is lifted until hardly any of it is negative; so the nonlinear predictor starts out
        as the linear one, without spending two rows on each direction.
        """
        a, b, bias = self.a[:rank], self.b[:, :rank], self.bias - self.b[:, :rank] @ self.means[:rank]
        if kind == "relu":
            lift = _SHIFT - self.means[:rank]
            a, bias = a + torch.outer(lift, self.one), bias - b @ lift
        return a.clone(), b.clone(), bias


def device() -> torch.device:
    """The GPU where PyTorch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(ffn: FFN, inputs: np.ndarray, sizes: np.ndarray) -> Layer:
    """Targets and start, from float16 inputs [n_tok, n_embd] and the residuals' squares float32 [n_tok].

    The weights of `ffn` (float32) say on which device.
    """
    where = ffn.gate.device
    dtype = fastest_dtype(where)
    quick = ffn.to(dtype)
    x16, size = (torch.from_numpy(np.ascontiguousarray(part)).to(where) for part in (inputs, sizes))
    target = torch.empty(len(x16), len(ffn.gate), dtype=torch.float16, device=where)
    total = torch.zeros(x16.shape[1], dtype=torch.float64, device=where)
    square = torch.zeros(x16.shape[1], x16.shape[1], dtype=torch.float64, device=where)
    usual: Tensor | None = None
    for begin in range(0, len(x16), BATCH):
        x = x16[begin : begin + BATCH].float()
        total += x.sum(0)
        square += x.T @ x
        active, energy = quick.see(x.to(dtype), size[begin : begin + BATCH])
        if usual is None:  # the first batch tells well enough
            usual = energy[active].mean().clamp_min(1e-30) if active.any() else energy.new_tensor(1.0)
        weight = (energy / usual).clamp_max_(_STRONGEST**2).sqrt_().mul_(0.5).add_(0.5)
        target[begin : begin + BATCH] = torch.where(active, weight, -1.0)
    mean = total / len(x16)
    moment = square / len(x16)
    moment += _RIDGE * moment.diagonal().mean() * torch.eye(len(mean), device=where)
    covariance = moment - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp_min(float(values.max()) * 1e-9).sqrt()
    gate = ffn.gate.double()
    spread = ((gate @ covariance) * gate).sum(1).clamp_min(1e-12).sqrt()
    mapped = gate / spread[:, None] @ (vectors * roots)
    main = torch.linalg.eigh(mapped.T @ mapped)[1].flip(1)
    a = main.T @ (vectors / roots).T
    usually = gate @ mean if ffn.gate_bias is None else gate @ mean + ffn.gate_bias
    return Layer(
        x16,
        target,
        dtype,
        a.float(),
        (mapped @ main * _SLOPE).float(),
        (usually / spread * _SLOPE).float(),
        (a @ mean).float(),
        torch.linalg.solve(moment, mean).float(),
    )


def train(
    layer: Layer, rank: int, kind: str, epochs: float, progress: Callable[[int], object] = lambda tokens: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a [rank, n_embd], b [n_ff, rank], bias [n_ff]) float32, by weighted cross-entropy from Layer.start.

    progress is called with the tokens gone through so far.
    """
    a, b, bias = layer.start(rank, kind)
    n_tok, where, dtype = len(layer.inputs), layer.inputs.device, layer.dtype
    steps = max(1, round(epochs * n_tok / BATCH))
    groups = [  # rows of a are as large as the inputs make them: the rate goes with their size
        {"params": [a], "lr": 4 * RATE * float(a.square().mean().sqrt())},
        {"params": [b], "lr": 4 * RATE * float(b.square().mean().sqrt())},
        {"params": [bias], "lr": 4 * RATE},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.randperm(n_tok, generator=torch.Generator().manual_seed(rank))
    for step in range(steps):
        picked = order[torch.arange(step * BATCH, (step + 1) * BATCH) % n_tok].to(where)
        x, target = layer.inputs[picked].to(dtype), layer.target[picked].float()
        raw = x @ a.to(dtype).T
        middle = raw.relu() if kind == "relu" else raw
        logits = (middle @ b.to(dtype).T).float() + bias
        # d loss / d logit = weight * (probability - label): no need for autograd, or for the loss itself
        slope = logits.sigmoid_().sub_((target > 0).float()).mul_(target.abs_()).div_(BATCH)
        bias.grad = slope.sum(0)
        slope = slope.to(dtype)
        back = slope @ b.to(dtype)
        back = back * (raw > 0) if kind == "relu" else back
        a.grad, b.grad = (back.T @ x).float(), (slope.T @ middle).float()
        optimiser.step()
        schedule.step()
        progress((step + 1) * BATCH)
    return a.cpu().numpy(), b.cpu().numpy(), bias.cpu().numpy()
