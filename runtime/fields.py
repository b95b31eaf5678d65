"""The fields of an OpenAI-shaped request, checked one by one: every wrong value is a ParameterError that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..formats.errors import ParameterError, UnsupportedError
from .sampler import check_int, reject_unknown

MOST_CHOICES = 128  # answers to one request
MOST_TOP = 100  # alternatives to one token
MOST_STOPS, _LONGEST_STOP = 64, 1024
MOST_TOOLS, LONGEST_NAME = 128, 128  # functions, and characters of the name of one
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed",
)  # fmt: skip
# Arguments of llama-cpp-python and OpenAI that are refused but at these values (None = any will do).
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "tfs_z": (1.0,), "mirostat_mode": (0,), "mirostat_tau": None, "mirostat_eta": None, "functions": (None, []),
    "function_call": (None, "none", "auto"), "user": None,
}  # fmt: skip
_INSTEAD = {"functions": "pass tools", "function_call": "pass tool_choice"}
_KNOWN = (
    *SAMPLING, *_NEUTRAL, "suffix", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "echo",
    "logprobs", "top_logprobs", "logits_processor", "stopping_criteria", "model", "special", "tools", "tool_choice",
    "parallel_tool_calls", "response_format", "n", "best_of", "schema", "regex", "grammar",
)  # fmt: skip
REFUSED = tuple(_NEUTRAL)  # known by name, so that a request for what they ask is refused and not passed over


def check_other(other: Mapping[str, Any], taken: Sequence[str]) -> None:
    """ParameterError for a keyword that no method knows, or this one does not take."""
    reject_unknown(other, _KNOWN)
    for name in other:
        if name not in _NEUTRAL and name not in taken:
            raise ParameterError(f"{name}: not an argument of this method")


class Fields:
    """A request's fields by name; None counts as not given. Names that nobody asks for are left alone."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {name: value for name, value in given.items() if value is not None}
        for name, neutral in _NEUTRAL.items():
            value = self._given.get(name)
            if value is not None and neutral is not None and value not in neutral:
                instead = _INSTEAD.get(name, "leave it out")
                raise UnsupportedError(f"{name}: got {value!r:.60}, and hotcold has no such feature; {instead}")

    def refuse(self, name: str, why: str) -> None:
        """UnsupportedError where a text is given for it; an empty one is none."""
        value = self.text(name)
        if value:
            raise UnsupportedError(f"{name}: got {value!r:.60}, and {why}")

    def any(self, name: str) -> Any:
        """The value as it is, or None."""
        return self._given.get(name)

    def required(self, name: str) -> Any:
        """The value as it is; ParameterError where it is missing."""
        if name not in self._given:
            raise ParameterError(f"{name}: got none, wanted it in every request")
        return self._given[name]

    def flag(self, name: str) -> bool:
        """A boolean, false where it is missing."""
        value = self._given.get(name, False)
        if not isinstance(value, (bool, np.bool_)):
            raise ParameterError(f"{name}: got {value!r:.60}, wanted true or false")
        return bool(value)

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        """An integer within bounds, or None."""
        value = self._given.get(name)
        return None if value is None else check_int(name, value, low, high)

    def text(self, name: str) -> str:
        """A text, empty where it is missing."""
        value = self._given.get(name, "")
        if not isinstance(value, str):
            raise ParameterError(f"{name}: got {type(value).__name__}, wanted a text")
        return value

    def limit(self, *names: str, default: int | None) -> int | None:
        """How many tokens an answer may have: the first of these names that is given; -1 = as many as fit (None)."""
        for name in names:
            value = self.integer(name, -1)
            if value is not None:
                return None if value < 0 else value
        return default

    def stop(self) -> list[str]:
        """Stop strings."""
        value = self._given.get("stop", [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) and item for item in found):
            raise ParameterError(f"stop: got {value!r:.60}, wanted a non-empty text or a list of such")
        if len(found) > MOST_STOPS or any(len(item) > _LONGEST_STOP for item in found):
            wanted = f"at most {MOST_STOPS} texts of {_LONGEST_STOP} characters"
            raise ParameterError(f"stop: got {len(found)} texts, some of them long, wanted {wanted}")
        return list(found)

    def sampling(self) -> dict[str, Any]:
        """What goes to the sampler as it is, which checks it."""
        return {name: self._given[name] for name in SAMPLING if name in self._given}

    def count(self) -> int:
        """n, how many answers are wanted; best_of must be the same."""
        n = self.integer("n", 1, MOST_CHOICES) or 1
        best = self.integer("best_of", 1)
        if best is not None and best != n:
            raise UnsupportedError(f"best_of: got {best}, supported is the same as n ({n}); leave it out")
        return n

    def usage_chunk(self) -> bool:
        """stream_options.include_usage."""
        self.flag("stream")
        options = self._given.get("stream_options", {})
        if not isinstance(options, Mapping):
            raise ParameterError(f"stream_options: got {type(options).__name__}, wanted a dict")
        wanted = options.get("include_usage")
        if wanted is not None and not isinstance(wanted, bool):
            raise ParameterError(f"stream_options.include_usage: got {wanted!r:.60}, wanted true or false")
        return bool(wanted)

    def response_format(self) -> tuple[Any, bool]:
        """response_format as (JSON schema or None, whether JSON is wanted)."""
        given = self._given.get("response_format")
        if given is None:
            return None, False
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind == "text":
            return None, False
        if kind == "json_object":  # with a schema, as llama-cpp-python has it
            return given.get("schema"), True
        if kind != "json_schema":
            wanted = "a dict with type text, json_object or json_schema"
            raise ParameterError(f"response_format: got {given!r:.60}, wanted {wanted}")
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            wanted = "a dict with a name and a schema"
            raise ParameterError(f"response_format.json_schema: got {inner!r:.60}, wanted {wanted}")
        return schema, True


def split_prompts(prompt: Any) -> list[Any]:
    """A completion's prompt as a list of prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise ParameterError(f"prompt: got {type(prompt).__name__}, wanted a text, token ids, or a list of such")
    items = list(prompt)
    kinds = {str if isinstance(item, str) else list if _is_list(item) else int for item in items}
    if len(kinds) > 1:
        raise ParameterError("prompt: got a list of several kinds, wanted texts, token ids, or lists of token ids")
    if not items or kinds == {int}:
        return [items]
    if len(items) > MOST_CHOICES:
        raise ParameterError(f"prompt: got {len(items)} prompts, wanted at most {MOST_CHOICES}")
    return items


def _is_list(item: object) -> bool:
    return isinstance(item, (Sequence, np.ndarray)) and not isinstance(item, (str, bytes, bytearray))
