"""The section of a model: its neurons' activation profile, thresholds, predictors, transposed ffn_down, and placement.

A section is a GGUF image of its own (general.type "sparsity"), beside its model or at the model's end:
section_layout.py says how it lies there, section_file.py writes it. Every part is optional, and there for all layers.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .errors import FormatError, ModelNotFoundError, SectionError, StorageError, UnsupportedError
from .gguf import GGUFFile, show
from .powerinfer import PowerInferImage
from .section_layout import (
    Footer,
    TornError,
    checksum,
    data_end,
    own_end,
    read_footer,
    sidecar_path,
    start_after,
    tensor_hash,
)
from .section_parts import PARTS, PLACEMENT_KEY, check, part_of

FORMAT_VERSION = 1
SMALL = 2**20  # bytes of a tensor up to which every load checks its checksum


@dataclass(frozen=True)
class Profile:
    """How often each neuron is active: freq float32 [n_layer, n_ff], the share of `tokens` tokens of `dataset`."""

    freq: NDArray[np.float32]
    tokens: int
    dataset: str
    rule: str  # "exact" or "threshold=D"; "experts" where a neuron counts when its expert is chosen


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of |act(gate)|: densities float32 [D], descending; values float32 [D, n_layer]."""

    densities: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Predictors:
    """What the predictors are: kind "relu" (b . relu(a . x)) or "dejavu" (b . a . x), and each layer's rank.

    input: x is "ffn_norm", the FFN's normed input, or "residual", the same before the norm.
    """

    kind: str
    input: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """What of a model lies on the GPU: by layer its hot neurons and its attention with the KV cache, and the output.

    hot: by layer, sorted int32 ids of neurons. n_ctx: tokens that the KV cache holds. budget: bytes of GPU memory that
    all of it may take. group: neurons that are placed together. cold: who computes the others, "cpu", or the GPU out of
    "mapped" host memory. objective, hardware, sparsity, profile: what it was solved for; profile is a digest of the
    frequencies, or "".
    """

    hot: tuple[NDArray[np.int32], ...]
    attention: tuple[bool, ...]
    head: bool
    n_ctx: int
    budget: int
    group: int
    cold: str
    objective: str
    hardware: str
    sparsity: str = "dense"
    profile: str = ""

    @property
    def empty(self) -> bool:
        """Whether all is left to the CPU."""
        return not (self.head or any(self.attention) or any(map(len, self.hot)))


class Section:
    """A section, open and checked against its model's sizes."""

    image: GGUFFile
    path: Path
    attached: bool

    def __init__(self, image: GGUFFile, attached: bool, config: ModelConfig, footer: Footer | None = None) -> None:
        self.image, self.path, self.attached = image, image.path, attached
        self.footer = footer
        self.n_layer, self.n_ff = config.n_layer, config.n_ff
        layout = {info.name: (info.shape, info.type) for info in image.tensors.values()}
        check(image.path, image.metadata, layout, config)

    def parts(self) -> list[str]:
        """Which of profile, thresholds, predictors, down_t and placement it has."""
        found = {part_of(name) for name in self.image.tensors}
        if PLACEMENT_KEY in self.image.metadata:  # it may have no tensors
            found.add("placement")
        return [part for part in PARTS if part in found]

    def profile(self) -> Profile | None:
        """The activation profile; SectionError for frequencies outside 0 to 1."""
        if not self._has("blk.0.ffn_act_freq"):
            return None
        freq = np.stack([self._floats(f"blk.{layer}.ffn_act_freq", 0.0, 1.0) for layer in range(self.n_layer)])
        get = self.image.get
        tokens, dataset = get("hotcold.profile.tokens", 0, int), get("hotcold.profile.dataset", "", str)
        return Profile(freq, tokens, dataset, get("hotcold.profile.rule", "exact", str))

    def thresholds(self) -> Thresholds | None:
        """The thresholds; SectionError for negative ones or densities that do not descend."""
        if not self._has("ffn_thresholds"):
            return None
        densities = np.array(self.image.get("hotcold.threshold.densities", kind=np.ndarray), np.float32)
        if not ((0 <= densities).all() and (densities <= 1).all() and (np.diff(densities) < 0).all()):
            got = show(str(densities.tolist()))
            raise SectionError(f"{self.path}: hotcold.threshold.densities: got {got}, wanted 1 to 0, descending")
        values = self._floats("ffn_thresholds", 0.0, np.inf).reshape(len(densities), self.n_layer)
        return Thresholds(densities, values)

    def predictors(self) -> Predictors | None:
        """What the predictors are; their weights and cuts are tensors of the image."""
        if not self._has("blk.0.ffn_pred_a.weight"):
            return None
        get, tensors = self.image.get, self.image.tensors
        ranks = tuple(tensors[f"blk.{layer}.ffn_pred_a.weight"].shape[1] for layer in range(self.n_layer))
        return Predictors(get("hotcold.predictor.kind", kind=str), get("hotcold.predictor.input", kind=str), ranks)

    def cut(self, layer: int) -> NDArray[np.float32]:
        """The scores from which a layer's neurons count as active: float32 [n_ff], infinite ones allowed."""
        return self._floats(f"blk.{layer}.ffn_pred_cut", -np.inf, np.inf)

    def has_down_t(self) -> bool:
        """Whether there is a neuron-major copy of ffn_down."""
        return self._has("blk.0.ffn_down_t.weight")

    def placement(self) -> Placement | None:
        """What a GPU is to hold; SectionError for neurons out of order or out of range."""
        if PLACEMENT_KEY not in self.image.metadata:
            return None
        hot = tuple(self._neurons(f"blk.{layer}.ffn_hot_idx") for layer in range(self.n_layer))

        def text(key: str) -> str:
            return self.image.get(f"hotcold.placement.{key}", "", str)

        def number(key: str) -> int:
            return self.image.get(f"hotcold.placement.{key}", 0, int)

        return Placement(
            hot=hot,
            attention=tuple(flag == "1" for flag in text("attention")),
            head=number("head") == 1,
            n_ctx=number("n_ctx"),
            budget=number("budget"),
            group=number("group"),
            cold=text("cold"),
            objective=text("objective"),
            hardware=text("hardware"),
            sparsity=text("sparsity"),
            profile=text("profile"),
        )

    def checked(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, uint8 (nbytes,); SectionError if its checksum is wrong."""
        if name in _damaged(self.image, self.footer, [name]):
            raise SectionError(f"{self.path}: the checksum of tensor {show(name)} is wrong: make this part again")
        return self.image.data(name)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, in the file or beside it."""
        return self.footer.size if self.footer else sum(info.nbytes for info in self.image.tensors.values())

    def damaged(self) -> list[str]:
        """Names of the tensors whose checksum is wrong; reads the whole section. Empty if it has no checksums."""
        return _damaged(self.image, self.footer, self.image.tensors)

    def close(self) -> None:
        """Let the mapping go."""
        self.image.close()

    def __enter__(self) -> Section:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has(self, name: str) -> bool:
        return name in self.image.tensors

    def _neurons(self, name: str) -> NDArray[np.int32]:
        """The neurons in a tensor, which is not there if there are none."""
        if name not in self.image.tensors:
            return np.zeros(0, np.int32)
        ids = self.image.data(name).view(np.int32).copy()  # a view would keep the file locked
        if not (0 <= ids[0] and ids[-1] < self.n_ff and (ids[1:] > ids[:-1]).all()):
            got = f"neurons from {ids.min()} to {ids.max()}"
            raise SectionError(f"{self.path}: tensor {name}: got {got}, wanted 0 to {self.n_ff - 1}, ascending")
        return ids

    def _floats(self, name: str, low: float, high: float) -> NDArray[np.float32]:
        values = self.image.data(name).view(np.float32)
        if not ((low <= values) & (values <= high)).all():  # a NaN is in no range
            raise SectionError(f"{self.path}: tensor {name}: got values outside {low:g} to {high:g}")
        return values


def find_section(model: GGUFFile, config: ModelConfig | None = None) -> Section | None:
    """The section that belongs to an open model: stored_section's, to which a PowerInfer file adds what it has itself.

    Such a file always has one, and it must not be closed before the section. Errors are those of stored_section.
    """
    section = stored_section(model, config)
    if not model.powerinfer:
        return section
    config = config or ModelConfig.from_gguf(model)
    image = PowerInferImage(model, config.n_layer, config.n_ff, section.image if section else None)
    return Section(image, section is None or section.attached, config)


def has_section(model: GGUFFile) -> bool:
    """Whether there is one inside the model or beside it, whole or damaged."""
    try:
        return sidecar_path(model.path).exists() or attached_footer(model) is not None
    except TornError:
        return True


def stored_section(model: GGUFFile, config: ModelConfig | None = None) -> Section | None:
    """The section beside a model, else the one at its end; None if there is none.

    A truncated or damaged one is warned of in one line and passed over. Raises SectionError (another model's),
    FormatError (shapes that do not fit the model), UnsupportedError. config: the model's, to save reading it again.
    """
    problems: list[str] = []
    for _ in range(2):  # a writer may move it between the two places while we look
        problems.clear()
        for path, read in ((sidecar_path(model.path), _beside), (model.path, _inside)):
            try:
                section = read(path, model, config)
            except TornError as error:
                problems.append(_torn(path, error))
                continue
            if section is not None:
                _warn(problems)
                return section
        if not problems:
            break
    _warn(problems)
    return None


def open_section(path: Path, model: GGUFFile, config: ModelConfig) -> Section:
    """The section in a file of its own; every error is raised."""
    try:
        return _read(path, model, config)
    except TornError as error:
        raise SectionError(_torn(path, error)) from None


def attached_footer(model: GGUFFile) -> Footer | None:
    """The footer of the section at the model's end, None if there is no section; TornError for remains of one."""
    with _opening(model.path) as file:
        footer = read_footer(file)
        end = file.seek(0, os.SEEK_END)
        if footer is None:
            file.seek(start_after(own_end(model)))
            if file.read(4) == b"GGUF":
                raise TornError("it has no footer")
        elif footer.offset + footer.size != end or not data_end(model) <= footer.base_size <= footer.offset:
            raise TornError(f"{footer.size} bytes from byte {footer.offset} do not end at byte {end}")
    return footer


def _torn(path: Path, error: TornError) -> str:
    return f"{path}: a truncated or damaged section ({' '.join(str(error).split())})"


def _warn(problems: list[str]) -> None:
    for problem in problems:
        warnings.warn(f"{problem}; it is ignored, and `hotcold detach` takes it away", stacklevel=4)


def _beside(path: Path, model: GGUFFile, config: ModelConfig | None) -> Section | None:
    try:
        return _read(path, model, config) if path.exists() else None
    except ModelNotFoundError:  # moved into the model meanwhile
        return None


def _inside(path: Path, model: GGUFFile, config: ModelConfig | None) -> Section | None:
    footer = attached_footer(model)
    try:
        return None if footer is None else _open(path, footer, True, model, config)
    except StorageError:
        raise TornError("another process is changing it") from None


def _read(path: Path, model: GGUFFile, config: ModelConfig | None) -> Section:
    with _opening(path) as file:
        footer, size = read_footer(file), file.seek(0, os.SEEK_END)
    if footer is not None and footer.size != size:
        raise TornError(f"got {size} bytes, wanted {footer.size}")
    return _open(path, footer, False, model, config)


@contextmanager
def _opening(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be opened: {error.strerror or error}") from None


def _open(path: Path, footer: Footer | None, attached: bool, model: GGUFFile, config: ModelConfig | None) -> Section:
    if footer is not None:  # the header is believed only after its checksum
        with _opening(path) as file:
            if checksum(file, footer.offset if attached else 0, footer.header) != footer.sums[0]:
                raise TornError("the header's checksum is wrong")
    try:
        image = GGUFFile(path, (footer.offset, footer.length) if footer and attached else None)
    except FormatError as error:
        raise TornError(f"{error.field}: got {error.got}, wanted {error.wanted}") from None
    try:
        _belongs(image, model)
        if footer is not None and len(footer.sums) != len(image.tensors) + 1:
            raise TornError(f"{len(footer.sums)} checksums for {len(image.tensors)} tensors")
        small = [info.name for info in image.tensors.values() if info.nbytes <= SMALL]
        for name in _damaged(image, footer, small):
            raise TornError(f"the checksum of {show(name)} is wrong")
        return Section(image, attached, config or ModelConfig.from_gguf(model), footer)
    except BaseException:
        image.close()
        raise


def _belongs(image: GGUFFile, model: GGUFFile) -> None:
    kind = image.get("general.type", "model", str)
    if kind != "sparsity":
        raise SectionError(f"{image.path}: got a file of type {show(kind)}, wanted a section (type 'sparsity')")
    version = image.get("hotcold.format_version", 0, int)
    if version != FORMAT_VERSION:
        raise UnsupportedError(f"{image.path}: a section of format {version} is not supported; {FORMAT_VERSION} is")
    theirs, ours = image.get("hotcold.base.tensor_hash", "", str), tensor_hash(model)
    if theirs != ours:
        raise SectionError(
            f"{image.path}: a section of another model: got tensor hash {show(theirs[:12])}..., wanted {ours[:12]}...; "
            f"`hotcold detach` takes it away"
        )


def _damaged(image: GGUFFile, footer: Footer | None, names: Iterable[str]) -> list[str]:
    if footer is None:
        return []
    sums = dict(zip(image.tensors, footer.sums[1:], strict=True))
    return [name for name in names if zlib.crc32(image.data(name).data) != sums[name]]
