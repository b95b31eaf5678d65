"""What `hotcold relufy` asks for, and refuses before hours of work."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError, StorageError, TrainingError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.section_file import check_place
from ..formats.section_layout import sidecar_path
from . import relu_file
from .corpus import Corpus
from .neurons import RELUS
from .work import Work

WINDOW = 256  # tokens; attention stays as it is, so longer ones would only cost time
HELD_OUT = 16  # windows that are never trained on
MIN_WINDOWS = 64
TRAINED = ("silu", "gelu")
WHOLE_LR, LOW_RANK_LR = 3e-4, 1e-3


@dataclass(frozen=True)
class Recipe:
    """What to make; kept work is only taken up for the same one.

    fit_tokens: of each sweep through the layers; chat, own: shares of conversations and of documents that the model
    writes itself; batch_size: tokens of a step of all layers together; low_rank: rank of the updates, 0 trains whole
    matrices.
    """

    fit_tokens: int = 32768
    sweeps: int = 1
    chat: float = 0.25
    own: float = 0.25
    batch_size: int = 2048
    low_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        least = MIN_WINDOWS * WINDOW
        lows = {"fit_tokens": least, "sweeps": 1, "batch_size": WINDOW, "low_rank": 0, "seed": 0}
        for name, low in lows.items():
            if (got := getattr(self, name)) < low:
                raise ParameterError(f"{name}: got {got}, wanted at least {low}")
        if self.seed >= 1 << 31:
            raise ParameterError(f"seed: got {self.seed}, wanted less than {1 << 31}")
        for name in ("chat", "own"):
            if not 0.0 <= (got_share := getattr(self, name)) <= 0.9:
                raise ParameterError(f"{name}: got {got_share}, wanted 0 to 0.9")
        if self.chat + self.own > 0.9:
            raise ParameterError(f"chat and own: got {self.chat + self.own:g} together, wanted at most 0.9")
        _whole_windows("batch_size", self.batch_size)


@dataclass(frozen=True)
class Effort:
    """How far to go; may change when kept work is taken up.

    density: mean share of active neurons to reach; minutes: for everything, or tokens: of all layers together (0 leaves
    that out); lr: the highest of that training; ubatch_size: tokens in memory at once; checkpointing: compute blocks
    twice instead of keeping what they make.
    """

    density: float = 0.3
    minutes: float | None = 90.0
    tokens: int | None = None
    lr: float = WHOLE_LR
    ubatch_size: int = 2048
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if not 0.01 <= self.density <= 1.0:
            raise ParameterError(f"density: got {self.density}, wanted 0.01 to 1")
        if (self.minutes is None) == (self.tokens is None):
            raise ParameterError("minutes, tokens: got both or neither, wanted one of them")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ParameterError(f"minutes: got {self.minutes}, wanted more than 0")
        if self.tokens is not None and self.tokens < 0:
            raise ParameterError(f"tokens: got {self.tokens}, wanted at least 0")
        if not 0 < self.lr < 1:
            raise ParameterError(f"lr: got {self.lr}, wanted more than 0 and less than 1")
        _whole_windows("ubatch_size", self.ubatch_size)


def _whole_windows(name: str, tokens: int) -> None:
    if tokens < WINDOW or tokens % WINDOW:
        raise ParameterError(f"{name}: got {tokens}, wanted a multiple of {WINDOW}")


def check_model(source: GGUFFile, config: ModelConfig) -> None:
    """Raise UnsupportedError, which says why, for a model whose forward pass torch_model.py does not know."""
    c = config
    other = (
        "relufy retrains models with a gated FFN in blocks of the Llama kind "
        "(RMS norms before attention and FFN, rotary positions), such as Llama, Mistral, Qwen2 and Qwen3"
    )
    thresholds = "hotcold sparsify and --sparsity threshold=D"
    if c.n_expert:
        raise UnsupportedError(
            f"{c.name!r:.60} is a mixture of experts: each of them would need a bypass about as large as it is; "
            f"its router leaves most neurons out already, and --sparsity threshold=D leaves out more"
        )
    if not c.gated:
        applies = "--sparsity exact leaves its zeros out as it is" if c.activation in RELUS else thresholds
        raise UnsupportedError(f"{c.name!r:.60} has an FFN without a gate: {other}; what applies here: {applies}")
    kinds = {
        "an FFN whose gate and up projections are one tensor": "blk.0.ffn_gate.weight" in source.rows,
        "a bypass beside its neurons already": c.has("ffn_bypass.weight"),
        "floors of its activations": any(c.activation_floors),
        "an FFN with biases": any(c.has(f"ffn_{part}.bias") for part in relu_file.PARTS),
        "layer norms": c.norm != "rms",
        "attention and FFN side by side": c.parallel,
        "norms after attention and FFN": c.has("post_attention_norm.weight") or c.has("post_ffw_norm.weight"),
        "norms of all queries at once": c.whole_head_norms,
        "no rotary positions": c.rope_dim == 0,
        "rotary positions that are not the same in all layers and contexts": (
            c.local_base > 0 or c.rope_scaling.kind == "longrope"
        ),
        "scaled embeddings, residuals or logits": (c.embd_scale, c.residual_scale, c.logit_scale) != (1.0, 1.0, 1.0),
        "soft caps": c.attn_softcap > 0 or c.logit_softcap > 0,
        "attention projections in one tensor": "blk.0.attn_q.weight" in source.rows,
    }
    for what, there in kinds.items():
        if there:
            raise UnsupportedError(f"{c.name!r:.60} has {what}: {other}; what applies here: {thresholds}")


def check_out(out: Path, inputs: Iterable[Path]) -> None:
    """Raise StorageError for a file that cannot be written, or that is one of those read."""
    check_place(out)
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise StorageError(f"{out}: the file to read, which would be replaced; name another one to write")
    if (side := sidecar_path(out)).exists():
        raise StorageError(f"{side}: the section of an earlier {out.name}; delete it, or name another file to write")


def check(config: ModelConfig, corpus: Corpus | None, recipe: Recipe, effort: Effort) -> None:
    """Raise what can be raised before hours of work."""
    if config.activation not in TRAINED:
        wanted = " or ".join(TRAINED)
        got = f"{config.activation}{' already' * (config.activation in RELUS)}"
        raise UnsupportedError(f"{config.name}: its activation is {got}, wanted {wanted}")
    least = (MIN_WINDOWS + HELD_OUT) * WINDOW
    if corpus is not None and len(corpus) < least:
        raise ParameterError(f"{corpus.name}: got {len(corpus)} tokens, wanted at least {least}, better 300000")
    if recipe.low_rank > (most := config.n_embd // 2):
        raise ParameterError(f"low_rank: got {recipe.low_rank}, wanted at most {most}, half the width of the model")
    if effort.tokens and effort.tokens < recipe.batch_size:
        raise ParameterError(f"tokens: got {effort.tokens}, wanted 0 or at least {recipe.batch_size}, one step")


@contextmanager
def memory(what: str, fits: str) -> Iterator[None]:
    """Tell memory that is out, of PyTorch in all its forms, as a TrainingError that names settings that fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out and "allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory with {what}; what was kept last is whole: run the same command with {fits}"
        ) from None


def require_torch(n_threads: int | None = None) -> None:
    """Set the number of PyTorch's threads (None: its own choice); UnsupportedError without PyTorch."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError("training needs PyTorch: pip install 'hotcold[train]'") from None
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc keep what is freed: a training step's gigabytes would be given back and cleared anew each time."""
    with suppress(AttributeError, OSError, TypeError):  # no such function where the C library is another
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most that it takes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def work_folder(out: Path, source: GGUFFile, corpus: Corpus | None, recipe: Recipe) -> Work:
    """Where the work on OUT is kept, for this model, text and recipe."""
    model = hashlib.sha256()
    with open(source.path, "rb") as file:
        while block := file.read(1 << 24):
            model.update(block)
    return Work(
        out, "relufy", {"model": model.hexdigest(), "text": corpus.digest if corpus else "self", **asdict(recipe)}
    )
