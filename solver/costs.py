"""From a model file, its profile and a machine to a placement Problem: bytes and seconds of everything.

A token reads each weight that it needs once, so a time is bytes over bandwidth, on the GPU plus its launches. Of an FFN
neuron, dense models read gate, up and down. In `exact` and `threshold` mode the gate is read always, up and down as
often as the neuron is active; in `predict` mode all three, and the neuron's row of the predictor always. Layers without
hot neurons read ffn_down as it is in the file if they are dense, all others its neuron-major copy (ffn_down_t).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats.config import ModelConfig
from ..formats.errors import UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.section import Section
from ..formats.types import GGMLType
from ..runtime import vram
from ..runtime.cuda import repack
from ..runtime.sparsity import Sparsity, plan
from .hardware import Hardware
from .problem import Layer, Part, Problem

GROUP = 64  # neurons
USUAL_CONTEXT = 512  # tokens in the KV cache, for which times are predicted
# Kernels: norm, q, k, v, rope, attention (2), output; norm, ffn, down, merge; a predictor's two; norm, output
ATTENTION_KERNELS, FFN_KERNELS, PREDICTOR_KERNELS, HEAD_KERNELS = 8, 4, 2, 2
_SMALL, _SLOT, _PAGE = 1 << 20, 512, 2 << 20


@dataclass(frozen=True)
class Costs:
    """A problem and what it was made from.

    mode: of sparsity, as sparsity.py writes it. digest: of the profile, "" without one. note: what the user should know
    about the frequencies, or "". dense_cpu: seconds of a dense token on the CPU.
    """

    problem: Problem
    mode: str
    digest: str
    note: str
    dense_cpu: float


@dataclass(frozen=True)
class Matrix:
    """Rows of a weight matrix. n: rows; k: weights in each."""

    kind: GGMLType
    n: int
    k: int

    @property
    def nbytes(self) -> int:
        """In the file, and where the CPU reads it."""
        return self.n * self.row

    @property
    def row(self) -> int:
        """Bytes of a row in the file."""
        return self.k // self.kind.block_size * self.kind.type_size

    @property
    def packed_row(self) -> float:
        """Bytes of a row that a kernel reads."""
        return repack.packed_bytes(self.kind.name, self.n, self.k) / self.n

    def on_gpu(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes that so many of its rows take on the GPU, array by array."""
        packing = repack.PACKINGS[self.kind.name]
        weights = rows * (-(-self.k // repack.RUN) * repack.RUN)
        arrays = [weights // share * np.dtype(dtype).itemsize for dtype, share in packing.arrays]
        total: NDArray[np.int64] = sum((allocated(each) for each in arrays), np.zeros_like(rows))
        return total


def allocated(nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the driver takes for arrays of these sizes: whole pages of 2 MiB, which only small arrays share."""
    unit = np.where(nbytes > _SMALL, _PAGE, _SLOT)
    result: NDArray[np.int64] = -(-nbytes // unit) * unit
    return result


def costs(
    model: GGUFFile,
    config: ModelConfig,
    section: Section | None,
    hardware: Hardware,
    *,
    capacity: int,
    n_ctx: int,
    threads: int,
    sparsity: str,
) -> Costs:
    """The problem of placing a model. capacity: bytes for weights and KV cache. UnsupportedError, ParameterError."""
    chosen = plan(Sparsity.parse(sparsity), config, section)
    mode = "dense" if chosen is None or chosen.sparsity.kind == "dense" else chosen.sparsity.kind
    freq, digest, note = _frequencies(config, section, mode, chosen.sparsity.density if chosen else 1.0)
    maker = _Maker(model, config, section, hardware, n_ctx, threads, mode, from_file=chosen is None)
    layers = tuple(maker.layer(number, row) for number, row in enumerate(freq))
    head = maker.matrix("token_embd.weight" if config.tied_output else "output.weight")
    norm = 4 * config.n_embd
    size = int(head.on_gpu(np.array(head.n)) + allocated(np.array(norm)))
    neuron = maker.neuron_bytes(0)
    problem = Problem(
        layers,
        Part(size, head.nbytes / maker.cpu, head.n * head.packed_row / maker.gpu + HEAD_KERNELS * hardware.launch),
        head.nbytes / neuron,
        max(0, capacity),
        hardware.handover(4 * config.n_embd),
        GROUP,
    )
    dense = sum(layer.attention.cpu for layer in layers) + problem.head.cpu
    dense += sum(maker.file_ffn(number) for number in range(config.n_layer)) / maker.cpu
    return Costs(problem, str(chosen.sparsity) if chosen else "dense", digest, note, dense)


def _frequencies(
    config: ModelConfig, section: Section | None, mode: str, density: float
) -> tuple[NDArray[np.float64], str, str]:
    shape = config.n_layer, config.n_ff
    if mode == "dense":
        return np.ones(shape), "", ""
    profile = section.profile() if section else None
    if profile is None:
        level = density if mode == "threshold" else 1.0
        note = f"no profile, so all neurons count as equally active ({level:.0%}); run `hotcold profile` first"
        return np.full(shape, level), "", note
    note = ""
    counted = profile.rule.partition("=")[0]
    wanted = "threshold" if mode == "threshold" else "exact"
    if counted != wanted and mode != "predict":
        note = f"the profile was counted with the rule {profile.rule!r:.40}, but the model runs in mode {mode}"
    digest = hashlib.sha256(np.ascontiguousarray(profile.freq, "<f4").tobytes()).hexdigest()[:16]
    return profile.freq.astype(np.float64), digest, note


class _Maker:
    """Makes the layers' costs. cpu, gpu: bandwidths. from_file: dense, and with ffn_down as the file has it."""

    def __init__(
        self,
        model: GGUFFile,
        config: ModelConfig,
        section: Section | None,
        hardware: Hardware,
        n_ctx: int,
        threads: int,
        mode: str,
        from_file: bool,
    ) -> None:
        self.model, self.config, self.section, self.hardware = model, config, section, hardware
        self.n_ctx, self.mode, self.from_file = n_ctx, mode, from_file
        self.cpu, self.gpu = hardware.cpu_bandwidth(threads), hardware.gpu_read
        self.kv = vram.kv_bytes(config, n_ctx)

    def matrix(self, name: str) -> Matrix:
        """A matrix of the section, else of the model."""
        images = [self.section.image] if self.section else []
        info = next(image.tensors[name] for image in (*images, self.model) if name in image.tensors)
        if info.type.name not in repack.PACKINGS:
            raise UnsupportedError(
                f"{self.model.path}: tensor {name} has type {info.type.name}, which hotcold does not compute on a GPU; "
                f"supported: {', '.join(repack.KINDS)}"
            )
        return Matrix(info.type, info.shape[1], info.shape[0])

    def down_t(self, number: int) -> Matrix:
        """The neuron-major copy that there is or will be made (runtime/down_t.py)."""
        name = f"blk.{number}.ffn_down_t.weight"
        if (self.section and name in self.section.image.tensors) or name in self.model.tensors:
            return self.matrix(name)
        c, kind = self.config, self.matrix(f"blk.{number}.ffn_down.weight").kind
        if kind not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
            kind = GGMLType.F16 if c.n_embd % 32 else GGMLType.Q8_0
        return Matrix(kind, c.n_ff, c.n_embd)

    def file_down(self, number: int) -> Matrix:
        """What a layer that is whole on one side multiplies with in dense mode."""
        name = f"blk.{number}.ffn_down.weight"
        return self.matrix(name) if name in self.model.tensors else self.down_t(number)

    def gate_up(self, number: int) -> tuple[Matrix, Matrix]:
        return self.matrix(f"blk.{number}.ffn_gate.weight"), self.matrix(f"blk.{number}.ffn_up.weight")

    def file_ffn(self, number: int) -> int:
        """Bytes of a layer's FFN in the file."""
        return sum(matrix.nbytes for matrix in (*self.gate_up(number), self.file_down(number)))

    def neuron_bytes(self, number: int) -> float:
        return (sum(matrix.row for matrix in self.gate_up(number)) + self.down_t(number).row) or 1.0

    def attention(self, number: int) -> tuple[Part, int]:
        """Attention of a layer with its KV cache, and its weights' bytes."""
        c, blk = self.config, f"blk.{number}."
        weights = [self.matrix(f"{blk}attn_{part}.weight") for part in ("q", "k", "v", "output")]
        size = sum(int(matrix.on_gpu(np.array(matrix.n))) for matrix in weights)
        vectors = ["attn_norm.weight", *(f"attn_{part}.bias" for part in ("q", "k", "v", "output"))]
        size += sum(
            int(allocated(np.array(4 * self.model.tensors[blk + name].shape[0])))
            for name in vectors
            if blk + name in self.model.tensors
        )
        keys = self.kv * c.head_dim_k // (c.head_dim_k + c.head_dim_v)
        size += int(allocated(np.array(keys)) + allocated(np.array(self.kv - keys)))
        tokens = min(self.n_ctx, USUAL_CONTEXT, c.windows[number] or USUAL_CONTEXT)
        read = tokens * c.n_head_kv * (c.head_dim_k + c.head_dim_v) * 2
        on_cpu = sum(matrix.nbytes for matrix in weights)
        on_gpu = sum(matrix.n * matrix.packed_row for matrix in weights)
        launches = ATTENTION_KERNELS * self.hardware.launch
        return Part(size, (on_cpu + read) / self.cpu, (on_gpu + read) / self.gpu + launches), on_cpu

    def layer(self, number: int, freq: NDArray[np.float64]) -> Layer:
        c, mode = self.config, self.mode
        attention, weights = self.attention(number)
        order = np.arange(c.n_ff) if mode == "dense" else np.argsort(-freq, kind="stable")
        n_hot = np.append(np.arange(0, c.n_ff, GROUP), c.n_ff)
        active = np.concatenate([[0.0], np.cumsum(freq[order])])[n_hot]
        n_cold, active_cold = c.n_ff - n_hot, active[-1] - active
        gate, up, down = *self.gate_up(number), self.down_t(number)
        rows = [gate, up, down]
        always, sometimes = {"dense": (rows, []), "predict": ([], rows)}.get(mode, ([gate], [up, down]))
        nbytes = sum((matrix.on_gpu(n_hot) for matrix in rows), allocated(np.full(len(n_hot), 4 * c.n_embd)))
        shared: list[Matrix] = []  # what is read as soon as one neuron is computed
        kernels = FFN_KERNELS
        if mode == "predict":
            first = self.matrix(f"blk.{number}.ffn_pred_a.weight")
            second = self.matrix(f"blk.{number}.ffn_pred_b.weight")
            shared, always, kernels = [first], [second], kernels + PREDICTOR_KERNELS
            nbytes = nbytes + second.on_gpu(n_hot) + allocated(4 * n_hot) + int(first.on_gpu(np.array(first.n)))

        def reads(n: NDArray[np.int64], n_active: NDArray[np.float64], packed: bool) -> NDArray[np.float64]:
            each, seldom = (
                sum(matrix.packed_row if packed else matrix.row for matrix in group) for group in (always, sometimes)
            )
            total: NDArray[np.float64] = n * each + n_active * seldom
            return total

        fixed = sum(matrix.nbytes for matrix in shared)
        cold = (reads(n_cold, active_cold, False) + fixed) / self.cpu
        launches = kernels * self.hardware.launch
        hot = (reads(n_hot, active, True) + sum(m.n * m.packed_row for m in shared)) / self.gpu + launches
        mapped = reads(n_cold, active_cold, True) / self.hardware.link_bandwidth + launches
        if self.from_file:
            whole = self.file_down(number)
            cold[0] = self.file_ffn(number) / self.cpu
            nbytes[-1] += int(whole.on_gpu(np.array(whole.n))) - int(down.on_gpu(np.array(down.n)))
            hot[-1] += (whole.n * whole.packed_row - down.n * down.packed_row) / self.gpu
        nbytes[0], hot[0], cold[-1], mapped[-1] = 0, 0.0, 0.0, 0.0
        impact = weights / self.neuron_bytes(number)
        return Layer(attention, nbytes, cold, hot, mapped, active, impact, order.astype(np.int32))
