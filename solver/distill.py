"""The last stages of relufy: all layers are trained together, so that the student's next tokens meet the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..formats.errors import TrainingError
from .relufy_checks import memory
from .student import Student
from .top_tokens import Teaching, divergence

WARM_UP = 10  # steps
PRESSURE = 600.0  # nats per squared excess of density
FLOOR_RATE = 0.05  # of the way to a layer's new floor, each step
SLOPE_END = 0.6  # of the training, from where on the density wanted is the last one


@dataclass(frozen=True)
class Plan:
    """How to train. density: to reach; lr: the highest; batch: windows of a step, ubatch: of those in memory at once.

    steps: how many; None: as many as `progress` allows, which says what share of the time is over.
    """

    density: float
    lr: float
    batch: int
    ubatch: int
    steps: int | None = None


class Distillation:
    """AdamW with a short warm-up and a cosine to zero, while the density wanted falls to the last one.

    Layers share the density between them. progress: where steps are not given, the share of the time that is over.
    """

    def __init__(
        self, student: Student, teaching: Teaching, plan: Plan, progress: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.student, self.teaching, self.plan, self._time = student, teaching, plan, progress
        self.parameters = [tensor.requires_grad_(True) for ffn in student.ffns for tensor in ffn.tensors()]
        self.optimizer = torch.optim.AdamW(self.parameters, plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.done, self.share, self.start, self.whole = 0, -1.0, -1.0, True

    @property
    def progress(self) -> float:
        """The share that is over, 0 to 1."""
        if self.plan.steps is None:
            return min(1.0, self._time())
        return min(1.0, self.done / self.plan.steps) if self.plan.steps else 1.0

    def target(self) -> float:
        """The density wanted now."""
        goal = self.plan.density
        return goal + max(0.0, self.start - goal) * max(0.0, 1 - self.progress / SLOPE_END)

    def step(self) -> tuple[float, float]:
        """One step; returns the divergence (nats per token) and the density of its batch.

        TrainingError, before anything is changed, where the loss is no number or memory is out.
        """
        plan, loss, share, least = self.plan, 0.0, 0.0, torch.zeros(())
        pressure = 2 * PRESSURE * max(0.0, self.share - self.target()) if self.share >= 0 else 0.0
        with self._memory():
            for which in self.teaching.pool.draw(self.done * plan.batch, plan.batch).split(plan.ubatch):
                part = len(which) / plan.batch
                ids, expected = self.teaching(which)
                normed, soft, density, lowest = self.student.forward(ids)
                rows = normed.detach().flatten(0, 1)
                nats, gradient = divergence(expected, rows, self.student.teacher.head())
                loss, share = loss + part * nats, share + part * float(density.detach().mean())
                least = least + part * lowest.detach().cpu()
                penalty = part * pressure * soft.mean()
                torch.autograd.backward([normed, penalty], [part * gradient.view_as(normed), None])
        if not math.isfinite(loss):
            self.whole = False  # these weights make it again
            raise TrainingError(
                f"the loss is {loss} at step {self.done + 1}; what was kept last is whole: "
                f"run the same command with a lower --lr (it was {plan.lr:g})"
            )
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, (self.done + 1) / WARM_UP) * cosine
        self.whole = False  # an interruption from here on leaves nothing that could be kept
        with self._memory():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.start = max(self.start, plan.density, share if self.done == 0 else 0.0)
        self.share = share if self.share < 0 else 0.8 * self.share + 0.2 * share
        self._raise_floors(least.tolist())
        self.done += 1
        self.whole = True
        return loss, share

    def _raise_floors(self, least: list[float]) -> None:
        """Let each layer's floor follow what closes its least gates, more of them until the density wanted is last."""
        share = min(1.0, self.progress / SLOPE_END)
        for ffn, wanted in zip(self.student.ffns, least, strict=True):
            ffn.floor += FLOOR_RATE * (share * wanted - ffn.floor)

    def state(self) -> dict[str, object]:
        """What `load` continues from."""
        numbers = {"done": self.done, "share": self.share, "start": self.start}
        floors = [ffn.floor for ffn in self.student.ffns]
        return numbers | {"floors": floors, "parameters": self.parameters, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        """Continue from a state of equal settings."""
        self.done, self.share, self.start = state["done"], state["share"], state["start"]
        for ffn, floor in zip(self.student.ffns, state["floors"], strict=True):
            ffn.floor = floor
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    def _memory(self) -> AbstractContextManager[None]:
        tokens = self.plan.ubatch * self.teaching.pool.windows.shape[1]
        fits = [] if self.student.saving else ["--checkpointing"]
        if self.plan.ubatch > 1:
            fits.append(f"--ubatch-size {tokens // 2}")
        fits.append("--low-rank and another file to write")
        return memory(f"{tokens} tokens at once, at step {self.done + 1}", ", or ".join(fits))
