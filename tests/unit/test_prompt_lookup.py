"""Guesses from the text so far, against a search of all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotcold.runtime.prompt_lookup import LENGTHS, PromptLookup


def searched(ids: list[int], n: int) -> list[int]:
    """What followed the last occurrence of the longest end that occurred before."""
    for length in LENGTHS:
        if len(ids) >= length:
            for at in range(len(ids) - 1, length - 1, -1):
                if ids[at - length : at] == ids[-length:]:
                    return ids[at : at + n]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_guesses_are_what_followed_the_last_time(ids: list[int], ends: list[int], n: int) -> None:
    """Asked at any places of a growing text: it need not be asked at each."""
    lookup, end = PromptLookup(), 0
    for more in ends:
        end += more
        assert lookup.guess(ids[:end], n) == searched(ids[:end], n)


def test_an_example() -> None:
    lookup = PromptLookup()
    assert lookup.guess([1, 2, 3, 4], 3) == []
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 4, 9], 8) == [2, 3, 4, 9]
    assert PromptLookup().guess([], 3) == PromptLookup().guess([7], 3) == []
