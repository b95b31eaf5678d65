"""Stop strings in streamed text: what may still become one is held back, so that none ever leaks."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text stream before the stop string that completes first; the result ignores how text was split.

    Of stop strings that complete at the same character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next text, give what is certain; `stopped` turns true when a stop string is complete."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        hits = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return held[: min(hits)[1]]
        safe = len(held) - max(_overlap(held, s) for s in self._stops)
        self._held = held[safe:]
        return held[:safe]

    def finish(self) -> str:
        """The held text at the end of the stream: it did not become a stop string after all."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, stop itself excluded."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
