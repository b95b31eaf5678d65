"""From a model file, its profile and a machine to a placement Problem: bytes and seconds of everything.

What lies on the GPU is what the decoder's graph names there, so planning and loading cannot differ. A token reads each
weight that it needs once, so a time is bytes over bandwidth, on the GPU plus its launches. Of an FFN neuron, dense
models read all rows: gate, up and down (without a gate, up and down). In `exact` and `threshold` mode the first is
read always, the others as often as the neuron is active; in `predict` mode all of them, and the neuron's row of the
predictor always. Layers without hot neurons read ffn_down as it is in the file if they are dense, all others its
neuron-major copy (ffn_down_t). A bypass is read always: by the GPU where that computes all neurons of a layer, out of
whichever memory, and else by the CPU. Of a mixture of experts, a neuron's rows are read as often as its expert is
chosen, and the router always, on each side that has experts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..formats.config import ModelConfig
from ..formats.errors import UnsupportedError
from ..formats.gguf import GGUFFile, TensorInfo
from ..formats.section import Section
from ..formats.types import GGMLType
from ..runtime import vram
from ..runtime.cuda import repack
from ..runtime.decoder import Split, build
from ..runtime.graph import Node
from ..runtime.sparsity import Plan, Sparsity, plan
from .hardware import Hardware
from .neurons import EXPERTS
from .problem import Layer, Part, Problem

GROUP = 64  # neurons; of a mixture of experts, those of one
USUAL_CONTEXT = 512  # tokens in the KV cache, for which times are predicted
_MULTIPLY = ("matmul", "ffn", "down")  # nodes with matrices
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

    @property
    def packed(self) -> float:
        """Bytes of all rows that a kernel reads."""
        return repack.packed_bytes(self.kind.name, self.n, self.k)

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
    mapped: bool = False,
) -> Costs:
    """The problem of placing a model. UnsupportedError, ParameterError.

    capacity: bytes for weights and KV cache. mapped: the GPU may compute the cold neurons too, so it has their biases.
    """
    chosen = plan(Sparsity.parse(sparsity), config, section)
    mode = "dense" if chosen is None or chosen.sparsity.kind == "dense" else chosen.sparsity.kind
    if config.n_expert:
        freq, digest, note = _choices(config, section)
    else:
        freq, digest, note = _frequencies(config, section, mode, chosen.sparsity.density if chosen else 1.0)
    maker = _Maker(model, config, section, hardware, n_ctx, threads, mode, chosen, mapped)
    layers = tuple(maker.layer(number, row) for number, row in enumerate(freq))
    head = maker.head()
    problem = Problem(
        layers,
        head,
        head.cpu * maker.cpu / maker.neuron_bytes(0),
        max(0, capacity),
        hardware.handover(4 * config.n_embd),
        maker.group,
    )
    dense = sum(layer.attention.cpu for layer in layers) + head.cpu
    dense += sum(maker.file_ffn(number) for number in range(config.n_layer)) / maker.cpu
    return Costs(problem, str(chosen.sparsity) if chosen else "dense", digest, note, dense)


def _frequencies(
    config: ModelConfig, section: Section | None, mode: str, density: float
) -> tuple[NDArray[np.float64], str, str]:
    """How often each neuron is active, [n_layer, n_ff]; the profile's digest; what the user should know."""
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
    return profile.freq.astype(np.float64), _digest(profile.freq), note


def _choices(config: ModelConfig, section: Section | None) -> tuple[NDArray[np.float64], str, str]:
    """As _frequencies, of a mixture of experts: how often each neuron's expert is chosen."""
    profile = section.profile() if section else None
    if profile is None:
        share = config.n_expert_used / config.n_expert
        note = f"no profile, so all experts count as chosen equally often ({share:.0%}); run `hotcold profile` first"
        return np.full((config.n_layer, config.n_ff), share), "", note
    heat = profile.freq.astype(np.float64).reshape(config.n_layer, config.n_expert, -1).mean(axis=2)
    note = ""
    if profile.rule != EXPERTS:
        note = (
            f"the profile was counted with the rule {profile.rule!r:.40}, but experts are placed by how often they are "
            f"chosen; run `hotcold profile` again"
        )
    return np.repeat(heat, config.expert_neurons, axis=1), _digest(profile.freq), note


def _digest(freq: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(freq, "<f4").tobytes()).hexdigest()[:16]


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
        chosen: Plan | None,
        mapped: bool,
    ) -> None:
        self.model, self.config, self.section, self.hardware = model, config, section, hardware
        self.n_ctx, self.mode = n_ctx, mode
        self.from_file = chosen is None and not config.n_expert
        self.cpu, self.gpu = hardware.cpu_bandwidth(threads), hardware.gpu_read
        self.kv = vram.kv_bytes(config, n_ctx)
        self.group = config.expert_neurons if config.n_expert else GROUP
        predictors = section.predictors() if section and chosen and chosen.predictor else None
        ranks, n = predictors.ranks if predictors else (), config.n_layer

        def on_gpu(attention: bool, hot: int, head: bool, mapped: bool = False) -> list[Node]:
            graph = build(config, chosen, ranks, Split((attention,) * n, (hot,) * n, head, mapped))
            return [node for node in graph.nodes if node.unit == "gpu" and node.op not in ("send", "fetch")]

        self.attentions, self.heads = on_gpu(True, 0, False), on_gpu(False, 0, True)
        self.splits = on_gpu(False, min(self.group, config.n_ff), False)
        self.kept = on_gpu(False, min(self.group, config.n_ff), False, mapped)
        self.wholes = on_gpu(False, config.n_ff, False)

    def matrix(self, name: str) -> Matrix:
        """A matrix of the section, else of the model, else made at load (runtime/down_t.py)."""
        info = self.info(name)
        if info is None and name.endswith("_t.weight"):
            c, kind = self.config, self.matrix(f"{name.removesuffix('_t.weight')}.weight").kind
            if kind not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
                kind = GGMLType.F16 if c.n_embd % 32 else GGMLType.Q8_0
            return Matrix(kind, c.n_ff, c.n_embd)
        info = info or self.model.info(name)
        if info.type.name not in repack.PACKINGS:
            raise UnsupportedError(
                f"{self.model.path}: tensor {name} has type {info.type.name}, which hotcold does not compute on a GPU; "
                f"supported: {', '.join(repack.KINDS)}"
            )
        return Matrix(info.type, info.n_rows, info.shape[0])

    def info(self, name: str) -> TensorInfo | None:
        images = [self.section.image] if self.section else []
        return next((image.info(name) for image in (*images, self.model) if name in image), None)

    def matrices(self, nodes: Iterable[Node]) -> list[tuple[Matrix, str]]:
        """Those that nodes read, and whose rows: "hot", "cold" (in the host's memory), or "" for all."""
        names = [name for node in nodes if node.op in _MULTIPLY for name in (node.weight, node.up) if name]
        return [(self.matrix(base), share) for base, _, share in (name.partition("@") for name in names)]

    def stored(self, nodes: list[Node], n_hot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes that the tensors of nodes take on the GPU, by the number of hot neurons."""
        total = np.zeros_like(n_hot)
        neurons = {"hot": n_hot, "cold": self.config.n_ff - n_hot, "": np.array(self.config.n_ff)}
        for matrix, share in self.matrices(nodes):
            if share != "cold":
                total += matrix.on_gpu(n_hot if share else np.array(matrix.n))
        for node in nodes:
            for name in (node.weight if node.op == "norm" else "", node.bias, node.up_bias, node.cut):
                base, _, share = name.partition("@")
                info = self.info(base) if base else None
                if info is not None:
                    total += allocated(4 * (neurons[share] if share else np.array(math.prod(info.shape))))
            if node.op == "route":
                total += allocated(4 * (neurons[node.weight.partition("@")[2]] // self.group))
        return total

    def head(self) -> Part:
        """The output matrix and what comes before it."""
        ((matrix, _),) = self.matrices(self.heads)
        launches = len(self.heads) * self.hardware.launch
        size = int(self.stored(self.heads, np.zeros((), np.int64)))
        return Part(size, matrix.nbytes / self.cpu, matrix.packed / self.gpu + launches)

    def down(self, number: int) -> Matrix:
        """What a layer that is whole on the CPU multiplies with in dense mode: as the file has it, if it does."""
        name = f"blk.{number}.ffn_down{'_exps' if self.config.n_expert else ''}"
        return self.matrix(f"{name}.weight" if f"{name}.weight" in self.model else f"{name}_t.weight")

    def rows(self, number: int) -> list[Matrix]:
        """The matrices of which each neuron has a row: the one that decides, the other projection, ffn_down."""
        nodes = [node for node in self.splits if node.layer == number and node.op in ("ffn", "down")]
        return [matrix for matrix, _ in self.matrices(nodes)]

    def file_ffn(self, number: int) -> float:
        """Bytes of a layer's FFN in the file that a dense token reads."""
        size = sum(matrix.nbytes for matrix in (*self.rows(number)[:-1], self.down(number), *self.bypass(number)))
        if not self.config.n_expert:
            return size
        router = self.matrix(f"blk.{number}.ffn_gate_inp.weight").nbytes
        return router + size * self.config.n_expert_used / self.config.n_expert

    def bypass(self, number: int) -> list[Matrix]:
        """The layer's bypass, if it has one."""
        return [self.matrix(f"blk.{number}.ffn_bypass.weight")] if self.config.has("ffn_bypass.weight") else []

    def neuron_bytes(self, number: int) -> float:
        return sum(matrix.row for matrix in self.rows(number)) or 1.0

    def attention(self, number: int) -> tuple[Part, int]:
        """Attention of a layer with its KV cache, and its weights' bytes."""
        c = self.config
        nodes = [node for node in self.attentions if node.layer == number]
        weights = [matrix for matrix, _ in self.matrices(nodes)]
        keys = self.kv * c.head_dim_k // (c.head_dim_k + c.head_dim_v)
        size = int(self.stored(nodes, np.zeros((), np.int64)))
        size += int(allocated(np.array(keys)) + allocated(np.array(self.kv - keys)))
        tokens = min(self.n_ctx, USUAL_CONTEXT, c.windows[number] or USUAL_CONTEXT)
        read = tokens * c.n_head_kv * (c.head_dim_k + c.head_dim_v) * 2
        on_cpu = sum(matrix.nbytes for matrix in weights)
        on_gpu = sum(matrix.packed for matrix in weights)
        launches = (len(nodes) + 1) * self.hardware.launch  # attention takes two
        return Part(size, (on_cpu + read) / self.cpu, (on_gpu + read) / self.gpu + launches), on_cpu

    def layer(self, number: int, freq: NDArray[np.float64]) -> Layer:
        c, mode = self.config, self.mode
        attention, weights = self.attention(number)
        order = np.argsort(-freq, kind="stable")  # neurons of an expert stay together
        n_hot = np.append(np.arange(0, c.n_ff, self.group), c.n_ff)
        active = np.concatenate([[0.0], np.cumsum(freq[order])])[n_hot]
        n_cold, active_cold = c.n_ff - n_hot, active[-1] - active
        split, kept, whole = (
            [node for node in nodes if node.layer == number] for nodes in (self.splits, self.kept, self.wholes)
        )
        rows = self.rows(number)
        nbytes = self.stored(kept, n_hot)
        nbytes[-1] = self.stored(whole, n_hot[-1:])[0]
        split, whole = ([node for node in nodes if ".ffn_bypass." not in node.weight] for nodes in (split, whole))
        bypass = self.bypass(number)  # a node of its own
        bypass_cpu = sum(matrix.nbytes for matrix in bypass) / self.cpu
        bypass_gpu = sum(matrix.packed for matrix in bypass) / self.gpu + len(bypass) * self.hardware.launch
        others = self.matrices(node for node in split if node.op == "matmul")  # of a predictor or router
        shared = [matrix for matrix, share in others if not share]  # read as soon as one neuron is computed
        always = [matrix for matrix, share in others if share]
        first = {"dense": rows, "predict": []}.get(mode, rows[:1]) if not c.n_expert else []
        always, sometimes = always + first, rows[len(first) :]

        def reads(n: NDArray[np.int64], n_active: NDArray[np.float64], packed: bool) -> NDArray[np.float64]:
            each, seldom = (
                sum(matrix.packed_row if packed else matrix.row for matrix in group) for group in (always, sometimes)
            )
            total: NDArray[np.float64] = n * each + n_active * seldom
            return total

        cold = (reads(n_cold, active_cold, False) + sum(matrix.nbytes for matrix in shared)) / self.cpu + bypass_cpu
        launches = len(split) * self.hardware.launch
        hot = (reads(n_hot, active, True) + sum(matrix.packed for matrix in shared)) / self.gpu + launches
        hot[-1] += bypass_gpu
        mapped = reads(n_cold, active_cold, True) / self.hardware.link_bandwidth + launches + bypass_gpu
        if c.n_expert:  # the CPU reads ffn_down_exps as it is
            cold += active_cold * (self.down(number).nbytes / c.n_ff - rows[-1].row) / self.cpu
        if self.from_file:
            cold[0] = self.file_ffn(number) / self.cpu
            in_file = self.matrices(node for node in whole if node.op == "matmul")[0][0]
            hot[-1] += (in_file.packed - rows[-1].packed) / self.gpu + (len(whole) - len(split)) * self.hardware.launch
        nbytes[0], hot[0], cold[-1], mapped[-1] = 0, 0.0, 0.0, 0.0
        impact = weights / self.neuron_bytes(number)
        return Layer(attention, nbytes, cold, hot, mapped, active, impact, order.astype(np.int32))
