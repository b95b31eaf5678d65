"""config.json of a Hugging Face checkpoint: typed look-ups; what is missing or odd is one clear error.

transformers 5 words rotations differently (`rope_parameters`, by kind of layer where there are two); they are read as
if they were in the older words (`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import FormatError, UnsupportedError
from .gguf_header import show

MAX_INT = 2**31 - 1
Keys = dict[str, Any]


class Settings:
    """config.json: typed look-ups by any of several names; what is null counts as missing.

    defaults: what is meant where a setting has none of its names in the file.
    """

    def __init__(self, path: Path, values: Keys, defaults: Mapping[str, Any]) -> None:
        self.path, self.values, self.defaults = path, _in_old_words(values), defaults

    def error(self, name: str, got: object, wanted: object) -> FormatError:
        return FormatError(self.path, f"setting {show(name)}", show(got) if isinstance(got, str) else got, wanted)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {what}")

    def find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The first of these settings that is there, and its value (None: there is none)."""
        for values in (self.values, self.defaults):
            if any(name in values for name in names):
                return next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))
        return names[0], None

    def integer(self, *names: str, low: int = 1) -> int | None:
        name, value = self.find(names)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= MAX_INT:
            raise self.error(name, show(value), f"an integer from {low} to {MAX_INT}")
        return value

    def number(self, *names: str) -> float | None:
        name, value = self.find(names)
        if value is None:
            return None
        return as_number(value, lambda wanted: self.error(name, show(value), wanted))

    def text(self, *names: str) -> str | None:
        name, value = self.find(names)
        if value is not None and not isinstance(value, str):
            raise self.error(name, show(value), "a word")
        return value

    def flag(self, name: str, default: bool) -> bool:
        _, value = self.find((name,))
        if value is not None and not isinstance(value, bool):
            raise self.error(name, show(value), "true or false")
        return default if value is None else value


def as_number(value: Any, error: Callable[[str], FormatError]) -> float:
    """A finite number, as float."""
    if type(value) not in (int, float) or abs(value) > 1e30 or value != value:
        raise error("a number")
    return float(value)


def _in_old_words(values: Keys) -> Keys:
    said = values.get("rope_parameters")
    if not isinstance(said, dict):
        return values
    found = dict(values)
    local = said.get("sliding_attention")
    if isinstance(said.get("full_attention"), dict):
        said = said["full_attention"]
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if said.get(name) is not None:
            found[name] = said[name]
    found["rope_scaling"] = said
    return found
