"""Messages of several lines: what stands between triple quotes."""

from __future__ import annotations

FENCE = '"""'


def unfenced(line: str) -> str:
    """The message in a line: without the triple quotes around it, and `//x` for a message `/x`."""
    if line.startswith("//"):
        return line[1:]
    if line.startswith(FENCE):
        return line[len(FENCE) :].removesuffix(FENCE).strip("\n")
    return line


def fence_open(text: str) -> bool:
    """Whether the text being typed still waits for its closing triple quotes."""
    text = text.lstrip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.rstrip().endswith(FENCE))
