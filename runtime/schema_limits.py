"""What a JSON schema may ask of llguidance, whose own limits leave some costs open."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from math import prod
from typing import Any

from ..formats.errors import ParameterError

_DEEPEST = 64
_MOST_STATES = 10_000  # a multipleOf is an automaton of as many states as its digits say
_MOST_PATTERNS = 6  # that may have to hold of one string: the time to join them doubles with each
_TEXTS = ("pattern", "format")
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "$comment", "x-guidance"}


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """ParameterError for a JSON schema too deep, or whose patterns or multiples would take too long to compile."""
    patterns = 0
    joined = False
    multiples = [1]
    todo: list[tuple[Any, int]] = [(schema, 0)]
    while todo:
        node, depth = todo.pop()
        if depth > _DEEPEST:
            raise ParameterError(f"{name}: got a schema nested over {_DEEPEST} deep, wanted less")
        if isinstance(node, Mapping):
            patterns += sum(isinstance(node.get(key), str) for key in _TEXTS)
            pattern_names = node.get("patternProperties")
            patterns += len(pattern_names) if isinstance(pattern_names, Mapping) else 0
            joined = joined or _joins(node)
            if "multipleOf" in node:
                multiples.append(_states(node["multipleOf"], name))
            todo += ((item, depth + 1) for item in node.values() if isinstance(item, (Mapping, list)))
        else:
            todo += ((item, depth + 1) for item in node if isinstance(item, (Mapping, list)))
    if joined and patterns > _MOST_PATTERNS:
        raise ParameterError(
            f"{name}: got {patterns} patterns and formats in a schema that joins parts (allOf, $ref with more beside "
            f"it, patternProperties), wanted at most {_MOST_PATTERNS}"
        )
    worst = prod(multiples) if joined else max(multiples)
    if worst > _MOST_STATES:
        raise ParameterError(f"{name}: multipleOf: got {worst}, wanted at most {_MOST_STATES} (without its zeros)")


def _joins(node: Mapping[str, Any]) -> bool:
    """Whether several parts must hold of one value."""
    every = node.get("allOf")
    if (isinstance(every, list) and len(every) > 1) or "patternProperties" in node:
        return True
    beside = set(node) - _ANNOTATIONS
    # a choice with properties or a pattern beside it: each branch is joined with them
    return len(beside) > 1 and bool(beside & {"$ref", "$dynamicRef", "anyOf", "oneOf", "allOf"} - {"type"}) and not (
        beside <= {"$ref", "$defs", "definitions", "$schema", "$id"} or beside <= {"anyOf", "oneOf", "type", "$defs"}
    )


def _states(value: object, name: str) -> int:
    try:
        number = Decimal(str(value)).normalize()
        digits = int("".join(map(str, number.as_tuple().digits)))
    except (InvalidOperation, ValueError):
        raise ParameterError(f"{name}: multipleOf: got {value!r:.40}, wanted a positive number") from None
    if isinstance(value, bool) or digits == 0 or number < 0:
        raise ParameterError(f"{name}: multipleOf: got {value!r:.40}, wanted a positive number")
    return digits
