"""Guessing what comes next from what stood there before: speculation without a second model.

Saxena 2023, "Prompt Lookup Decoding": the tokens that followed the last occurrence of the text's end are evaluated
together with the token that was chosen; those that are chosen too cost no step of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (3, 2)  # of the ends that are looked up, the longest first


class PromptLookup:
    """The last place of each short run of tokens in one growing text."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._known = 0

    def guess(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to n tokens that may follow ids, which go on from those of the last call."""
        for end in range(self._known, len(ids)):  # the end itself is learnt once something follows it
            for length in LENGTHS:
                if end >= length:
                    self._places[tuple(ids[end - length : end])] = end
        self._known = len(ids)
        for length in LENGTHS:
            if len(ids) >= length and (at := self._places.get(tuple(ids[-length:]))) is not None:
                return list(ids[at : at + n])
        return []
