"""What a teacher expects after each token of its training text: its likeliest tokens, kept once computed."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.errors import StorageError
from .pool import Pool
from .torch_model import TorchModel

TOP = 64  # tokens; of 135M models they hold nine tenths of the probability
HEAD_BYTES = 16 << 20  # of logits in memory at a time; from 32 MiB on, glibc gives each piece back and asks anew
BYTES = 6  # of a top token: its id and its probability
LEAST = 1e-4  # the rest's probability is never taken to be less


@dataclass(frozen=True)
class Expected:
    """ids int64 [rows, TOP] and their probabilities float32 [rows, TOP]; the rest's is what is missing to 1."""

    ids: Tensor
    p: Tensor


class Teaching:
    """The windows of a pool and, by window, what the teacher expects; kept in `folder` as it is asked.

    StorageError where the folder has no room: BYTES for each token and top token.
    """

    def __init__(self, teacher: TorchModel, pool: Pool, folder: Path) -> None:
        self.teacher, self.pool = teacher, pool
        self.top = min(TOP, teacher.config.n_vocab)
        shape = (*pool.windows.shape, self.top)
        try:
            self._ids = _array(folder / "top-ids.bin", np.int32, shape)
            self._p = _array(folder / "top-p.bin", np.float16, shape)
            self._sums = _array(folder / "top-sums.bin", np.uint32, shape[:1])
        except OSError as exc:
            need = f"what the teacher expects of the text takes {BYTES * math.prod(shape) >> 20} MiB there"
            raise StorageError(f"{folder}: cannot be written: {exc.strerror or exc}; {need}") from exc

    def __call__(self, which: Tensor) -> tuple[Tensor, Expected]:
        """(ids of these windows, what the teacher expects at all their places), on the teacher's device."""
        device = self.teacher.device
        # A power cut may leave a mark on the disk and not what it stands for; so the mark is a sum over that.
        new = [i for i in which.tolist() if self._sums[i] != self._sum(i)]
        if new:
            ids, p = top_tokens(self.teacher, self.pool.windows[new].to(device), self.top)
            shape = (len(new), -1, self.top)
            self._ids[new], self._p[new] = ids.view(shape).int().cpu().numpy(), p.view(shape).half().cpu().numpy()
            for i in new:
                self._sums[i] = self._sum(i)
        ids, p = (torch.from_numpy(np.array(kept[which.numpy()])).to(device) for kept in (self._ids, self._p))
        return self.pool.windows[which].to(device), Expected(ids.flatten(0, 1).long(), p.flatten(0, 1).float())

    def _sum(self, window: int) -> int:
        return zlib.crc32(self._p[window], zlib.crc32(self._ids[window]))


def check_room(folder: Path, n_tokens: int) -> None:
    """StorageError where the disk has no room for what a teacher expects of so many tokens."""
    need = BYTES * TOP * n_tokens
    there = sum(path.stat().st_size for path in folder.glob("top-*.bin"))
    if (free := shutil.disk_usage(folder).free + there) < need:
        got = f"got room for {free >> 20} MiB, wanted {need >> 20}"
        raise StorageError(f"{folder}: {got} for what the teacher expects of {n_tokens} tokens; bring less text")


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """A file's array, zero at first; one of another size is made anew."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    there = path.exists() and path.stat().st_size == size
    array = np.memmap(path, dtype, "r+" if there else "w+", shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full later would kill the process
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    return array


@torch.no_grad()
def top_tokens(teacher: TorchModel, ids: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) [n, top] of the likeliest tokens after each of the tokens of windows."""
    found = []
    for rows in teacher.forward(ids).flatten(0, 1).split(_head_rows(teacher.head())):
        found.append(F.linear(rows, teacher.head()).softmax(-1).topk(top, -1, sorted=False))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


@torch.no_grad()
def divergence(expected: Expected, given: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """Mean KL(teacher || student) in nats, the rest as one token, and its gradient by `given`.

    given: normed final residuals [rows, n_embd]. By the logit of a top token the gradient is q - p, by that of another
    q (1 - rest of p / rest of q).
    """
    total, gradients, n = torch.zeros((), dtype=torch.float64, device=given.device), [], len(given)
    for ids, p, rows in zip(*(v.split(_head_rows(head)) for v in (expected.ids, expected.p, given)), strict=True):
        q = F.linear(rows, head).softmax(-1)
        own = q.gather(1, ids).float()
        rest_p, rest_q = ((1 - v.sum(1, keepdim=True)).clamp_min(LEAST) for v in (p, own))
        total += (torch.xlogy(p, p / own.clamp_min(1e-12)).sum() + torch.xlogy(rest_p, rest_p / rest_q).sum()).double()
        q.mul_((1 - rest_p / rest_q).to(q.dtype)).scatter_(1, ids, (own - p).to(q.dtype))
        gradients.append(q @ head / n)
    return float(total) / n, torch.cat(gradients)


def _head_rows(head: Tensor) -> int:
    return max(16, HEAD_BYTES // (len(head) * head.element_size()))
