"""Training of ReLU FFNs against the model that they replace: layer by layer, then all of them together (PyTorch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.errors import TrainingError
from .torch_model import TorchModel

PARTS = ("gate", "up", "down")
LAYER_LR, MODEL_LR = 1e-3, 1.5e-4
LAYER_PRESSURE = 1.0  # relative error per excess of density
LAYER_BATCH = 1024  # token positions
MODEL_BATCH = 2048
WARM_UP = 10  # steps
HEAD_ROWS = 512  # rows whose logits are in memory at a time
FORWARD_ROWS = 8192
SOFTNESS = 0.5  # of the step that stands for `gate > 0` in gradients, in RMS of the gate
PRESSURE = 150.0  # nats per squared excess of density
Progress = Callable[[int, int], None]


@dataclass
class Ffn:
    """A layer's gate and up [n_ff, n_embd] and down [n_embd, n_ff], float32; h = relu(gate x) * (up x)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, model: TorchModel, layer: int) -> Ffn:
        """A trainable copy of the model's own."""
        return cls(*(model.weights[f"blk.{layer}.ffn_{part}.weight"].float().clone() for part in PARTS))

    def tensors(self) -> list[Tensor]:
        return [self.gate, self.up, self.down]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output, raw gate) of normed inputs x, in x's type."""
        gate = F.linear(x, self.gate.to(x.dtype))
        hidden = F.relu(gate) * F.linear(x, self.up.to(x.dtype))
        return F.linear(hidden, self.down.to(x.dtype)), gate


class Student:
    """A teacher whose first len(ffns) layers have other FFNs."""

    def __init__(self, teacher: TorchModel, ffns: list[Ffn]) -> None:
        self.teacher, self.ffns = teacher, ffns

    def forward(self, x: Tensor, first: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Normed final residual and the students' raw gates, from the residual x before layer `first`."""
        teacher, gates = self.teacher, []
        for layer in range(first, teacher.config.n_layer):
            x = x + teacher.attention(layer, x)
            if layer < len(self.ffns):
                y, gate = self.ffns[layer](teacher.norm(f"blk.{layer}.ffn_norm", x))
                gates.append(gate)
                x = x + y
            else:
                x = x + teacher.ffn(layer, x)
        return teacher.norm("output_norm", x), gates

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> tuple[float, list[float]]:
        """(perplexity, density per student layer) on windows of ids int64 [n, n_tokens]."""
        nll, shares = [], []
        for ids in windows.split(4):
            normed, gates = self.forward(self.teacher.embed(ids))
            nll.append(torch.from_numpy(self.teacher.nll(normed, ids)))
            shares.append([_density(gate) * len(ids) / len(windows) for gate in gates])
        return math.exp(float(torch.cat(nll).mean())), [sum(share) for share in zip(*shares, strict=True)]


@dataclass(frozen=True)
class LayerResult:
    ffn: Ffn
    error: float  # of the last batches: squared error over that of no FFN at all
    density: float


class Sequential:
    """The residual streams of teacher and student, walked up together; each layer is trained on the student's own.

    windows int64 [n, n_tokens]; the streams are float32 [n, n_tokens, n_embd].
    """

    def __init__(self, teacher: TorchModel, windows: Tensor) -> None:
        self.model, self.layer = teacher, 0
        self.teacher = teacher.embed(windows)
        self.student = self.teacher.clone()

    @torch.no_grad()
    def attend(self) -> None:
        """The teacher's stream through the next layer, the student's through its attention only."""
        for i in range(0, len(self.teacher), 8):
            x = self.teacher[i : i + 8]
            x += self.model.attention(self.layer, x)
            x += self.model.ffn(self.layer, x)
            s = self.student[i : i + 8]
            s += self.model.attention(self.layer, s)

    @torch.no_grad()
    def pass_through(self, ffn: Ffn) -> None:
        """The student's stream through its own FFN."""
        for s in self.student.flatten(0, 1).split(FORWARD_ROWS):
            s += ffn(self.model.norm(f"blk.{self.layer}.ffn_norm", s))[0]
        self.layer += 1

    def train(self, density: float, epochs: int, seed: int, progress: Progress) -> LayerResult:
        """The layer's FFN, trained so that the student meets the teacher's residual after the layer."""
        model, layer = self.model, self.layer
        wanted, given = self.teacher.flatten(0, 1), self.student.flatten(0, 1)
        with torch.no_grad():
            weight = torch.cat([1 / (x.square().mean(1, keepdim=True).sqrt() + 1e-3) for x in wanted.split(65536)])
            pairs = zip(wanted.split(65536), given.split(65536), weight.split(65536), strict=True)
            scale = float(sum(((w - g) * k).square().sum().double() for w, g, k in pairs)) / wanted.numel()
        ffn = Ffn.of(model, layer)
        batches = _Batches(len(given), LAYER_BATCH, epochs, seed + layer)
        trainer = _Trainer(ffn.tensors(), LAYER_LR, len(batches))
        errors, densities, target = [], [], density
        for step, rows in enumerate(batches):
            x = given[rows]
            out, gate = ffn(model.norm(f"blk.{layer}.ffn_norm", x))
            loss = ((x + out - wanted[rows]) * weight[rows]).square().mean() / scale
            share = _density(gate)
            pressure = LAYER_PRESSURE * max(0.0, share - target)
            trainer.step([loss + pressure * _soft_density(gate)], [None])
            errors.append(float(loss.detach()))
            densities.append(share)
            if not math.isfinite(errors[-1]):
                raise TrainingError(f"layer {layer}: the loss is {errors[-1]} at step {step + 1}; try another --seed")
            progress(step + 1, len(batches))
        last = max(1, len(errors) // 20)
        return LayerResult(ffn, sum(errors[-last:]) / last, sum(densities[-last:]) / last)


class Together:
    """All FFNs at once, so that the student's next-token distribution meets the teacher's.

    What is left over by one layer is made good by others here, and the layers share the density between them.
    """

    def __init__(self, student: Student, windows: Tensor, density: float, seed: int) -> None:
        self.student, self.windows, self.density = student, windows, density
        self.parameters = [tensor for ffn in student.ffns for tensor in ffn.tensors()]
        self.batches = list(_Batches(len(windows), max(1, MODEL_BATCH // windows.shape[1]), 1, seed))
        self.steps, self.done, self.share, self.start = len(self.batches), 0, -1.0, -1.0
        self.trainer = _Trainer(self.parameters, MODEL_LR, self.steps)

    def step(self) -> tuple[float, float]:
        """One step; returns the divergence (nats per token) and the density of its batch."""
        teacher = self.student.teacher
        ids = self.windows[self.batches[self.done]]
        with torch.no_grad():
            wanted = teacher.forward(ids)
        normed, gates = self.student.forward(teacher.embed(ids))
        loss, gradient = _divergence(wanted.flatten(0, 1), normed.detach().flatten(0, 1), teacher.head())
        share = sum(map(_density, gates)) / len(gates)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.done + 1} of all layers; try another --seed")
        # The density wanted falls from what the layers have to the target over the first half.
        self.share = share if self.share < 0 else 0.8 * self.share + 0.2 * share
        self.start = max(self.start, self.density, share if self.done == 0 else 0.0)
        target = self.density + (self.start - self.density) * max(0.0, 1 - 2 * self.done / self.steps)
        pressure = 2 * PRESSURE * max(0.0, self.share - target)
        penalty = pressure * torch.stack([_soft_density(gate) for gate in gates]).mean()
        self.trainer.step([normed, penalty], [gradient.view_as(normed), None])
        self.done += 1
        return loss, share

    def state(self) -> dict[str, object]:
        """What `load` continues from."""
        numbers = {"done": self.done, "share": self.share, "start": self.start}
        return numbers | {"parameters": self.parameters, "optimizer": self.trainer.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        """Continue from a state of equal settings."""
        self.done, self.share, self.start = state["done"], state["share"], state["start"]
        self.trainer.done = self.done
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.trainer.optimizer.load_state_dict(state["optimizer"])


class _Trainer:
    """AdamW with a short warm-up and a cosine to zero."""

    def __init__(self, parameters: list[Tensor], lr: float, steps: int) -> None:
        for tensor in parameters:
            tensor.requires_grad_(True)
        self.lr, self.steps, self.done = lr, steps, 0
        self.optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Backward from the outputs, then one update."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.done / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.done + 1) / WARM_UP) * cosine
        torch.autograd.backward(outputs, gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


class _Batches:
    """Row numbers of batches, shuffled anew each epoch; the same seed gives the same ones."""

    def __init__(self, n_rows: int, size: int, epochs: int, seed: int) -> None:
        self.n_rows, self.size, self.epochs, self.seed = n_rows, min(size, n_rows), epochs, seed

    def __len__(self) -> int:
        return self.epochs * (self.n_rows // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(self.n_rows, generator=generator)
            yield from order[: self.n_rows // self.size * self.size].split(self.size)


def _density(gate: Tensor) -> float:
    return torch.count_nonzero(gate > 0).item() / gate.numel()


def _soft_density(gate: Tensor) -> Tensor:
    """A smooth stand-in for the share of gates > 0; does not change when gates are scaled."""
    scale = gate.detach().float().square().mean().sqrt() * SOFTNESS
    return torch.sigmoid(gate / scale.to(gate.dtype)).mean()


@torch.no_grad()
def _divergence(wanted: Tensor, given: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """Mean KL(teacher || student) in nats, and its gradient by `given`; normed residuals [n, n_embd]."""
    total, gradients = 0.0, []
    for t, s in zip(wanted.split(HEAD_ROWS), given.split(HEAD_ROWS), strict=True):
        log_t = F.linear(t, head).float().log_softmax(-1)
        log_s = F.linear(s, head).float().log_softmax(-1)
        p = log_t.exp()
        total += float((p * (log_t - log_s)).sum())
        gradients.append((log_s.exp_().sub_(p).div_(len(given))).to(given.dtype) @ head)
    return total / len(given), torch.cat(gradients)
