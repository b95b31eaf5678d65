"""How much GPU memory a placement may take, as a user says it: 8GiB, 70%, auto, or bytes."""

from __future__ import annotations

import math
import re

from ..formats.errors import ParameterError

WANTED = "bytes, a size such as 8GiB or 7500MB, a share of the free memory such as 70%, or auto"
AUTO = 0.92  # of what is free: the rest is for the display and for others who come later
STEP = 64 << 20  # shares of the free memory are rounded down to this, so that they do not change with every start
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_FORM = re.compile(r"(?P<number>[0-9]+(\.[0-9]*)?|\.[0-9]+) ?(?P<unit>%|[a-z]*)", re.ASCII)


def parse(text: str | int) -> tuple[str, float]:
    """("bytes", n), ("share", of the free memory, above 0 to 1) or ("auto", AUTO); ParameterError for anything else."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise _error(text)
    if isinstance(text, int):
        return "bytes", _whole(text, text)
    wanted = text.strip().lower()
    if wanted == "auto":
        return "auto", AUTO
    match = _FORM.fullmatch(wanted)
    if match is None or len(wanted) > 40:
        raise _error(text)
    number, unit = float(match["number"]), match["unit"]
    if unit == "%":
        if not 0 < number <= 100:
            raise _error(text)
        return "share", number / 100
    if unit not in _UNITS or (unit in ("", "b") and "." in match["number"]):
        raise _error(text)
    return "bytes", _whole(text, number * _UNITS[unit])


def resolve(text: str | int, free: int | None, device: str = "the GPU") -> int:
    """The bytes that a budget means where `free` bytes are free (None: nobody knows).

    Raises ParameterError for malformed ones, for more than is free, and for shares of what nobody knows.
    """
    kind, value = parse(text)
    if kind == "bytes":
        if free is not None and value > free:
            raise ParameterError(
                f"vram budget: got {text} ({int(value)} bytes), wanted at most {free} bytes, "
                f"which are free on {device}; free some, or say auto"
            )
        return int(value)
    if free is None:
        raise ParameterError(
            f"vram budget: got {text}, but nobody says how much memory is free; "
            f"give it in bytes, such as 8GiB, or a --hardware file with gpu_free"
        )
    share = int(free * value)
    return share // STEP * STEP if share >= STEP else share


def _whole(text: object, number: float) -> int:
    if not (math.isfinite(number) and 1 <= number < 2**62):
        raise _error(text)
    return int(number)


def _error(text: object) -> ParameterError:
    return ParameterError(f"vram budget: got {text!r:.60}, wanted {WANTED}")
