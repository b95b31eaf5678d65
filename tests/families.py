"""The tiny Hugging Face models of tests/families and the logits that transformers gives for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "families"


@dataclass(frozen=True)
class Family:
    """A checkpoint folder, and prompts with the float32 logits of their every position."""

    name: str
    folder: Path
    expected: str = "expected.npz"
    n_ctx: int = 64  # the context size at which the logits hold (it chooses between LongRoPE's two factor lists)

    @cached_property
    def _pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        with np.load(self.folder / self.expected) as arrays:
            return [(arrays[f"ids{i}"], arrays[f"logits{i}"]) for i in range(len(arrays.files) // 2)]

    @property
    def prompt(self) -> np.ndarray:
        """Token ids int32 (n_tokens,) of the long prompt."""
        return self._pairs[0][0]

    @property
    def logits(self) -> np.ndarray:
        """float32 (n_tokens, n_vocab): the prompt's logits."""
        return self._pairs[0][1]

    @property
    def batch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Three further prompts of different lengths, each with its logits, computed alone."""
        return self._pairs[1:]


FAMILIES = [Family(folder.name, folder) for folder in sorted(FOLDER.iterdir()) if (folder / "expected.npz").exists()]
# The same checkpoint in a context no longer than the one it was first trained for.
FAMILIES.append(Family("phi3-longrope-short", FOLDER / "phi3-longrope", "expected_short.npz", 16))
BY_NAME = {family.name: family for family in FAMILIES}


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    """max |logits - expected| / max |expected|."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
