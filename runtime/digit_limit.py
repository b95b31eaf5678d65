"""Numbers in JSON come to an end: a small model that may go on with digits often does so forever."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_DIGITS = 20  # in a row; a double needs 17
MOST_IN_TEXT = 40  # within quotation marks, where a time may have any number behind its second


class DigitLimit:
    """Follows the bytes of a JSON text, and takes digits back where many came in a row and something else may come.

    tokens: the bytes of each token; digits: which of them begin with a digit, where that is known.
    """

    def __init__(self, tokens: Sequence[bytes], digits: NDArray[np.bool_] | None = None) -> None:
        self._tokens = tokens
        self._digits = np.array([data[:1].isdigit() for data in tokens]) if digits is None else digits
        self._string = self._escaped = False
        self._run = 0

    def apply(self, allowed: NDArray[np.bool_]) -> None:
        """Rule out tokens that begin with a digit, unless the grammar wants one of them."""
        if self._run >= (MOST_IN_TEXT if self._string else MOST_DIGITS):
            digits = self._digits[: len(allowed)]
            if (allowed & ~digits).any():
                allowed &= ~digits

    def accept(self, token: int) -> None:
        """Go on after a token."""
        for byte in self._tokens[token]:
            if self._escaped:
                self._escaped = False
            elif byte == 0x22:  # a quotation mark
                self._string = not self._string
            elif self._string:
                self._escaped = byte == 0x5C  # a backslash
            self._run = self._run + 1 if 0x30 <= byte <= 0x39 else 0

    def copy(self) -> DigitLimit:
        """Another one in the same state."""
        found = DigitLimit(self._tokens, self._digits)
        found._string, found._escaped, found._run = self._string, self._escaped, self._run
        return found
