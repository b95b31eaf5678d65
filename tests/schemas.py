"""Random JSON schemas as users write them for small models: bounded, so that a random model comes to an end."""

from __future__ import annotations

import random
import re
from typing import Any

import jsonschema

Schema = dict[str, Any]
# jsonschema's own idea of "time" is that of an old draft, and "date-time" needs more packages
CHECKER = jsonschema.FormatChecker(["date", "ipv4", "uuid"])
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"  # RFC 3339
_MOMENT = r"\d{4}-\d\d-\d\d[T ]" + _TIME


@CHECKER.checks("time")
def is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(re.fullmatch(_TIME, value, re.I))


@CHECKER.checks("date-time")
def is_moment(value: object) -> bool:
    return not isinstance(value, str) or bool(re.fullmatch(_MOMENT, value, re.I))


_NAMES = ["name", "age", "tags", "kind", "id", "größe", "a b", "x-1", "items", "type", "pattern", 'quo"te', "\\slash"]
_WORDS = ["red", "green", "blue", "", 'a"b', "line\nbreak", "ünï", "😀", "null", "0"]
_PATTERNS = ["^[a-z]{1,6}$", "^[A-Z][a-z]{0,4}$", r"^\d{3}-\d{4}$", "^(foo|bar|baz)+$", r"^\w{2,8}@x\.com$", "ab?c"]
_FORMATS = ["date", "ipv4", "uuid", "time", "date-time"]


def make_schema(seed: int) -> Schema:
    """A JSON schema whose values are objects or arrays."""
    rng = random.Random(seed)
    names = [f"Def{i}" for i in range(rng.randint(0, 2))]
    defs: Schema = {}
    for i, name in enumerate(names):  # each may use the later ones: a model that likes it recurses forever
        defs[name] = _object(rng, 2, names[i + 1 :])
    schema = (_object if rng.random() < 0.8 else _array)(rng, 3, names)
    return {**schema, "$defs": defs} if defs else schema


def _value(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if refs and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(refs)}"}
    kinds = [_string, _string, _integer, _number, _enum, _simple]
    if depth > 0:
        kinds += [_object, _array, _any_of]
    return rng.choice(kinds)(rng, depth, refs)


def _object(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth - 1, refs) for name in names}}
    required = [name for name in names if rng.random() < 0.6]
    if required:
        schema["required"] = required
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    if rng.random() < 0.3:
        schema["title"] = "A thing"
    return schema


def _array(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    low = rng.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if rng.random() < 0.2:
        schema["prefixItems"] = [_value(rng, depth - 1, refs) for _ in range(rng.randint(1, 2))]
    schema["items"] = _value(rng, depth - 1, refs)
    return schema


def _any_of(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    return {"anyOf": [_value(rng, depth - 1, refs) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 20}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)}


def _integer(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    low = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer"}
    if rng.random() < 0.7:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.7:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 10 ** rng.randint(1, 9))
    if rng.random() < 0.15:
        schema = {"type": "integer", "minimum": 0, "maximum": 10_000, "multipleOf": rng.choice([2, 5, 7, 10, 25])}
    return schema


def _number(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    low = rng.choice([0, -1.5, 0.25, -100, 12.125])
    return {"type": "number", **rng.choice([{}, {"minimum": low}, {"minimum": low, "maximum": low + 7.5}])}


def _enum(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if rng.random() < 0.3:
        return {"const": rng.choice([*_WORDS, 5, 2.5, True, None, {"a": [1, "b"]}])}
    return {"enum": rng.sample([*_WORDS, 1, -2, 3.5, False, None], rng.randint(1, 5))}


def _simple(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"], "maxLength": 5}])
