"""JSON schemas before llguidance gets them: costs that its own limits leave open, and objects without extra members."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from math import prod
from typing import Any, TypeGuard

from ..formats.errors import ParameterError

_DEEPEST = 64
_MOST_STATES = 10_000  # a multipleOf is an automaton of as many states as its digits say
MOST_NULLABLE = 1000  # parts of a regular expression that may be empty: time and memory grow with their square
_MOST_WAYS = 250_000  # references times alternatives
_MOST_PATTERNS = 6  # that may have to hold of one string: the time to join them doubles with each
_CHOICES = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf"}
_NEUTRAL = {
    "type", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$defs",
    "definitions", "$schema", "$id", "discriminator", "x-guidance",
}  # fmt: skip
_BOUNDS = ("minimum", "exclusiveMinimum", "exclusiveMaximum", "maximum")
_EXACT = 2**53
# where the schemas within a schema are
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")


def prepared(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A narrower schema: what it allows, the one given allows; ParameterError where it would take too long to compile.

    A small model goes on inventing members for as long as it may. So an object that lists its properties and does not
    speak of others gets no others, as in OpenAI's strict mode. Bounds of numbers are such as llguidance keeps.
    """
    narrowed: dict[str, Any] = _narrowed(schema, name, close=not _checked(schema, name))
    return narrowed


def check_pattern(regex: str, name: str) -> None:
    """ParameterError for a regular expression with too many parts that may be empty."""
    count = nullable(regex)
    if count > MOST_NULLABLE:
        raise ParameterError(f"{name}: got a pattern with {count} optional parts, wanted at most {MOST_NULLABLE}")


def nullable(regex: str) -> int:
    """How many parts of a regular expression may be empty, at most."""
    return sum(map(regex.count, ("?", "*", "{0", "{,", "||", "(|", "|)")))


def _checked(schema: Mapping[str, Any], name: str) -> bool:
    """Whether several parts of the schema may have to hold of one value."""
    patterns, joined, multiples = 0, False, [1]
    references = alternatives = 1
    todo: list[tuple[Any, int]] = [(schema, 0)]
    while todo:
        node, depth = todo.pop()
        if depth > _DEEPEST:
            raise ParameterError(f"{name}: got a schema nested over {_DEEPEST} deep, wanted less")
        if isinstance(node, Mapping):
            members = node.get("patternProperties")
            for pattern in (node.get("pattern"), *(members if isinstance(members, Mapping) else ())):
                if isinstance(pattern, str):
                    check_pattern(pattern, name)
            patterns += sum(isinstance(node.get(key), str) for key in ("pattern", "format"))
            patterns += len(members) if isinstance(members, Mapping) else 0
            joined = joined or _joins(node)
            references += "$ref" in node
            alternatives += sum(len(node[key]) for key in ("anyOf", "oneOf") if isinstance(node.get(key), list))
            if "multipleOf" in node and not isinstance(node["multipleOf"], Mapping):
                multiples.append(_states(node["multipleOf"], name))
        items = node.values() if isinstance(node, Mapping) else node
        todo += ((item, depth + 1) for item in items if isinstance(item, (Mapping, list)))
    if references * alternatives > _MOST_WAYS:
        wanted = f"at most {_MOST_WAYS} of them multiplied"
        raise ParameterError(f"{name}: got {references} references and {alternatives} alternatives, wanted {wanted}")
    if joined and patterns > _MOST_PATTERNS:
        raise ParameterError(
            f"{name}: got {patterns} patterns and formats in a schema that joins parts (allOf, patternProperties, or "
            f"more beside $ref or anyOf), wanted at most {_MOST_PATTERNS}"
        )
    worst = prod(multiples) if joined else max(multiples)
    if worst > _MOST_STATES:
        raise ParameterError(f"{name}: multipleOf: got {worst}, wanted at most {_MOST_STATES} (without its zeros)")
    return joined


def _joins(node: Mapping[str, Any]) -> bool:
    every = node.get("allOf")
    if "patternProperties" in node or (isinstance(every, list) and len(every) > 1):
        return True
    return bool(_CHOICES & set(node)) and len(set(node) - _NEUTRAL) > 1


def _states(value: object, name: str) -> int:
    try:
        number = Decimal(str(value)).normalize()
        digits = int("".join(map(str, number.as_tuple().digits)))
    except (InvalidOperation, ValueError):
        raise ParameterError(f"{name}: multipleOf: got {value!r:.40}, wanted a positive number") from None
    if isinstance(value, bool) or digits == 0 or number < 0:
        raise ParameterError(f"{name}: multipleOf: got {value!r:.40}, wanted a positive number")
    return digits


def _narrowed(node: Any, name: str, close: bool) -> Any:
    if not isinstance(node, Mapping):
        return node  # true and false are schemas, too
    found = dict(node)
    for key in _MAPS:
        if isinstance(found.get(key), Mapping):
            found[key] = {member: _narrowed(item, name, close) for member, item in found[key].items()}
    for key in _LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_narrowed(item, name, close) for item in found[key]]
    for key in _SINGLE:
        if key in found:
            found[key] = _narrowed(found[key], name, close)
    for side in (1, -1):
        _narrow_bounds(found, side, name)
    properties, required = found.get("properties"), found.get("required", [])
    lists_all = (
        isinstance(properties, Mapping)
        and isinstance(required, list)
        and all(isinstance(member, str) and member in properties for member in required)
    )
    if close and lists_all and not {"additionalProperties", "unevaluatedProperties", "minProperties"} & set(found):
        found["additionalProperties"] = False
    return found


def _narrow_bounds(found: dict[str, Any], side: int, name: str) -> None:
    """Lower (side 1) or upper (-1) bounds that llguidance keeps: it counts in doubles, and takes 0 for more than 0
    where everything allowed begins with "0.".
    """
    inclusive, exclusive, *far = _BOUNDS[::side]
    for key in (inclusive, exclusive):
        if _is_number(found.get(key)):
            if side * found[key] > _EXACT:
                raise ParameterError(f"{name}: {key}: got {found[key]!r:.60}, wanted numbers up to 2**53 in size")
            found[key] = side * max(side * found[key], -_EXACT)
    bound: object = found.get(exclusive)
    others = [side * found[key] for key in far if _is_number(found.get(key))]
    if _is_number(bound) and bound == int(bound) and others and 0 < min(others) - side * bound < 1:
        nearby = bound + side * (min(others) - side * bound) / 2**20
        if nearby == bound:
            raise ParameterError(f"{name}: {exclusive}: got {bound!r}, wanted more room to the other bound")
        del found[exclusive]
        found[inclusive] = side * max(side * found.get(inclusive, nearby), side * nearby)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
