"""The FFN inputs of every layer on a text, in a temporary file: what predictors are trained on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import StorageError
from .corpus import N_CTX, Corpus

if TYPE_CHECKING:
    from ..runtime.engine import Engine

_SPARE = 256 << 20  # bytes of the disk that are left free
_HALF_MAX = 65504.0  # of float16


def nbytes(config: ModelConfig, tokens: int) -> int:
    """Bytes that a recording takes on disk."""
    return config.n_layer * tokens * config.n_embd * 2


class Recording:
    """inputs[layer]: float16 [n_tok, n_embd], the normed inputs of that layer's FFN, in a file that goes with close().

    sizes[layer]: float32 [n_tok], the sum of squares of the residual that it adds to.
    folder: where the temporary file is made, by default the system's. StorageError where it does not fit.
    """

    def __init__(self, config: ModelConfig, tokens: int, folder: Path | None = None) -> None:
        where, wanted = folder or Path(tempfile.gettempdir()), nbytes(config, tokens)
        free = shutil.disk_usage(where).free
        if free < wanted + _SPARE:
            raise StorageError(
                f"{where}: got {free >> 20} MiB free, wanted {(wanted + _SPARE) >> 20} MiB for {tokens} recorded "
                "tokens; take fewer (--tokens), or set TMPDIR to another disk"
            )
        self._stack = ExitStack()
        file = self._stack.enter_context(tempfile.TemporaryFile(dir=where))
        self.tokens = 0
        self.sizes = np.zeros((config.n_layer, tokens), np.float32)
        self.inputs = np.memmap(file, np.float16, "w+", shape=(config.n_layer, tokens, config.n_embd))

    def run(self, engine: Engine, corpus: Corpus, progress: Callable[[int], object] = lambda tokens: None) -> None:
        """Record a corpus after what is there already; progress is called with the tokens recorded in all."""
        done = 0

        def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
            at = slice(self.tokens + done, self.tokens + done + len(x))
            self.inputs[layer, at] = np.clip(f, -_HALF_MAX, _HALF_MAX)
            self.sizes[layer, at] = np.square(x).sum(axis=1)

        for window in corpus.windows(min(N_CTX, engine.n_ctx)):
            sequence = engine.new_sequence()
            try:
                engine.observe(sequence, window, see)
            finally:
                sequence.close()
            done += len(window)
            progress(self.tokens + done)
        self.tokens += done

    def close(self) -> None:
        """Give the disk space back."""
        del self.inputs
        self._stack.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
