"""The first stage of relufy: what each layer's ReLU neurons leave out is fitted in closed form, layer after layer.

Ridge regression of the residual that is missing after a layer on the layer's normed input and on its active neurons:
the first gives the bypass, the second a change of ffn_down. No step size, no epochs, seconds a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.errors import TrainingError
from .student import Ffn, Student

BYPASS_RIDGE = 1e-3  # of the mean square of the inputs
DOWN_RIDGE = 1.0  # of the mean square of the neurons
CHUNK = 4096  # rows
LEAST = 1e-30  # ridge, where all inputs or all neurons are zero
TRIES = 30  # of a larger ridge


class Fitting:
    """The residual streams of teacher and student, walked up together; each layer is fitted on the student's own.

    windows int64 [n, n_tokens]; the streams are float32 [n * n_tokens, n_embd].
    """

    def __init__(self, student: Student, windows: Tensor) -> None:
        self.model, self.layer, self.shape = student.teacher, 0, windows.shape
        self.teacher = torch.cat([self.model.embed(ids) for ids in windows.to(self.model.device).split(64)])
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
        for s in self.student.flatten(0, 1).split(CHUNK):
            s += ffn(self._norm(s))[0]
        self.layer += 1

    @torch.no_grad()
    def fit(self, ffn: Ffn) -> float:
        """Fit the bypass, and ffn_down where it is trained whole; returns the error left.

        The error is the share of what was missing, squared, that still is; tokens count by 1 / the size of their
        residual, since a few have one a hundred times as large as all others. TrainingError where it is no number.
        """
        missing, given = self.teacher.flatten(0, 1), self.student.flatten(0, 1)
        n, moments, targets, size = self.model.config.n_embd, *(torch.zeros((), device=given.device) for _ in range(3))
        for wanted, s in zip(missing.split(CHUNK), given.split(CHUNK), strict=True):
            x = self._norm(s)
            out, weight = ffn(x)[0], 1 / (wanted.square().mean(1, keepdim=True).sqrt() + 1e-3)
            columns = [x.float()]
            if ffn.base is None:
                columns += [torch.ones_like(weight), ffn.neurons(x)[0].float()]
            a, b = torch.cat(columns, 1) * weight, (wanted - s - out) * weight
            moments, targets, size = moments + a.T @ a, targets + a.T @ b, size + b.square().sum()
        power = moments.diagonal()
        ridge = torch.full_like(power, float(power[:n].mean()) * BYPASS_RIDGE)
        if ffn.base is None:
            ridge[n + 1 :] = power[n + 1 :].mean() * DOWN_RIDGE
        if not bool(torch.isfinite(moments).all() & torch.isfinite(targets).all()):
            raise TrainingError(f"layer {self.layer}: its values are no numbers; is the model whole?")
        ridge.clamp_min_(LEAST)
        for _ in range(TRIES):
            factor, info = torch.linalg.cholesky_ex((moments + torch.diag(ridge)).double())
            if not bool(info):
                break
            ridge *= 10  # rounding made it indefinite
        else:
            raise TrainingError(f"layer {self.layer}: its inputs cannot be told apart; is the model whole?")
        change = self._add(ffn, torch.cholesky_solve(targets.double(), factor), factor)
        left = size - (2 * (change * targets).sum() - (change * (moments.double() @ change)).sum())
        return float(left / size.clamp_min(LEAST))

    def _add(self, ffn: Ffn, found: Tensor, factor: Tensor) -> Tensor:
        """Put what was found into the layer; returns what of it there was room for."""
        n = self.model.config.n_embd
        if ffn.base is None:
            ffn.own["bypass"] += found[:n].T
            ffn.own["bypass_bias"] += found[n]
            ffn.own["down"] += found[n + 1 :].T
            return found
        # Reduced-rank regression: of all maps of this rank, the one that predicts best on these inputs.
        before = ffn.matrix("bypass").T.double()
        root = factor.T
        left, values, right = torch.linalg.svd(root @ (before + found), full_matrices=False)
        rank = len(ffn.own["bypass.a"])
        size = values[:rank].sqrt()
        inputs = torch.linalg.solve_triangular(root, left[:, :rank], upper=True)
        ffn.own["bypass.a"].copy_((inputs * size).T)
        ffn.own["bypass.b"].copy_(right[:rank].T * size)
        return ffn.matrix("bypass").T.double() - before

    def _norm(self, x: Tensor) -> Tensor:
        return self.model.norm(f"blk.{self.layer}.ffn_norm", x)
