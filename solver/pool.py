"""Training text of several kinds, mixed by their shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Pool:
    """Windows int64 [n, n_tokens] of all kinds; `draw` gives their numbers in an endless row, by the seed.

    kinds: windows and share of each; the first has what the others leave.
    """

    def __init__(self, kinds: Sequence[tuple[Tensor, float]], seed: int) -> None:
        self.windows = torch.cat([windows for windows, _ in kinds])
        self._shares = [share for _, share in kinds[1:]]
        self._decks, first = [], 0
        for windows, _ in kinds:
            self._decks.append(_Deck(first, len(windows), seed))
            first += len(windows)

    def draw(self, place: int, count: int) -> Tensor:
        """The numbers of `count` windows from a place of the row on, each kind as often as its share says."""
        spans = [(math.floor(place * s + 1e-9), math.floor((place + count) * s + 1e-9)) for s in self._shares]
        begin, end = place - sum(a for a, _ in spans), place + count - sum(b for _, b in spans)
        drawn = [deck.draw(a, b - a) for deck, (a, b) in zip(self._decks, [(begin, end), *spans], strict=True)]
        return torch.cat(drawn)


class _Deck:
    """The numbers first ... first + n - 1, shuffled anew after each round; the same seed gives the same ones."""

    def __init__(self, first: int, n: int, seed: int) -> None:
        self.first, self.n, self.seed = first, n, seed
        self._round, self._order = -1, torch.zeros(0, dtype=torch.long)

    def draw(self, start: int, count: int) -> Tensor:
        """`count` numbers from place `start` of the endless row on."""
        return torch.tensor([self._at(place) for place in range(start, start + count)], dtype=torch.long)

    def _at(self, place: int) -> int:
        number, at = divmod(place, self.n)
        if number != self._round:
            self._round = number
            self._order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed + number))
        return self.first + int(self._order[at])
