"""Text to measure a model on: files or a default, as token ids in windows, with a held-out end."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..formats.errors import ParameterError
from ..formats.tokenizer import Tokenizer

N_CTX = 512  # tokens in a window
FEW_TOKENS = 10_000
DEFAULT_NAME = "pydoc_data.topics"
_CHARS_PER_TOKEN = 16  # more than any usual text has, so that a limited reading is long enough


@dataclass(frozen=True)
class Corpus:
    """Token ids (int32) of a text; bos begins each window of it, unless that is None."""

    name: str
    ids: np.ndarray
    bos: int | None

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, n_ctx: int = N_CTX, start: int = 0) -> Iterator[np.ndarray]:
        """All tokens from `start` on, in windows of n_ctx that do not overlap; the last may be shorter."""
        for begin in range(start, len(self.ids), n_ctx):
            window = self.ids[begin : begin + n_ctx].copy()
            if self.bos is not None:
                window[0] = self.bos
            yield window

    def split(self, held_out: int) -> tuple[Corpus, Corpus]:
        """(all but the last `held_out` tokens, those)."""
        cut = len(self.ids) - held_out
        return replace(self, ids=self.ids[:cut]), replace(self, ids=self.ids[cut:])

    @property
    def digest(self) -> str:
        """A hex digest that tells one corpus from another."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes() + repr(self.bos).encode()).hexdigest()


def load(paths: Sequence[Path], tokenizer: Tokenizer, limit: int | None = None, few: int = FEW_TOKENS) -> Corpus:
    """The text files, or without any Python's own help topics, as at most `limit` tokens.

    Warns below `few` tokens. ParameterError: no text in them, or a file that cannot be read.
    """
    name = ", ".join(path.name for path in paths) or DEFAULT_NAME
    text = _read(paths, limit) if paths else _default_text()
    if not text.strip():
        raise ParameterError(f"{name}: got an empty text, wanted some thousand words")
    ids = np.asarray(tokenizer.encode(text, add_bos=False), np.int32)[:limit]
    if len(ids) < 2:
        raise ParameterError(f"{name}: got {len(ids)} token, wanted some thousand")
    if len(ids) < few and (limit is None or limit >= few):
        warnings.warn(f"{name}: only {len(ids)} tokens; what is found on so few is rough", stacklevel=2)
    return Corpus(name, ids, tokenizer.bos_id if tokenizer.add_bos else None)


def _read(paths: Sequence[Path], limit: int | None) -> str:
    parts: list[str] = []
    left = -1 if limit is None else limit * _CHARS_PER_TOKEN
    for path in paths:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                parts.append(file.read(left))
            if "\ufffd" in parts[-1]:
                warnings.warn(f"{path}: not all of it is UTF-8; what is not was read as U+FFFD", stacklevel=3)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ParameterError(f"{path}: cannot be read: {reason}; wanted a UTF-8 text file") from None
        if left >= 0:
            left -= len(parts[-1])
            if left <= 0:
                break
    return "\n\n".join(parts)


def _default_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))
