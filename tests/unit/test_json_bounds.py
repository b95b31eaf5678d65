"""Bounds of numbers in JSON schemas: what a constraint lets through is valid, by jsonschema's judgement."""

from __future__ import annotations

import json
from typing import Any

import fakes
import jsonschema
import numpy as np
import pytest

from hotcold.formats.errors import ParameterError
from hotcold.runtime.grammar import constraint

TOKENIZER: Any = fakes.FakeTokenizer()
NUMBERS = (
    "0 -0 0.0 0.00 -0.0 1 1.0 -1 -1.0 2 2.0 10 10.0 11 3 0.5 -0.5 0.1 0.2 0.11 0.01 -0.01 0.001 0.002 0.0005 -0.001"
    " 1.5 1.51 1.505 1.01 1.005 1.001 -1.01 -1.005 2.00005 2.0001 10.01 10.05 0.99 0.995 0.999 1.99 9007199254740992"
    " 9007199254740993 -9007199254740993 9223372036854775807 9223372036854775808 0.0000000005"
).split()


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether an answer may be this text and end there."""
    found = constraint(TOKENIZER, schema=schema)
    assert found is not None
    for token in [*text.encode(), fakes.END]:
        scores = np.zeros(fakes.N_VOCAB, np.float32)
        found.apply(scores)
        if scores[token] == -np.inf:
            return False
        found.accept(token)
    return True


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0}, {"exclusiveMaximum": 0}, {"exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        {"exclusiveMinimum": 0, "maximum": 0.001}, {"exclusiveMinimum": -0.5, "exclusiveMaximum": 0},
        {"minimum": -0.01, "exclusiveMaximum": 0}, {"exclusiveMinimum": 1, "exclusiveMaximum": 1.01},
        {"exclusiveMinimum": -1.01, "exclusiveMaximum": -1}, {"exclusiveMinimum": 10, "exclusiveMaximum": 10.05},
        {"exclusiveMinimum": 0, "minimum": 0, "maximum": 0.5}, {"exclusiveMinimum": 0.99, "exclusiveMaximum": 1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"minimum": -1e300, "maximum": 1e300}, {"minimum": 2**53 - 1}, {"maximum": -(2**53) + 1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}, {"exclusiveMinimum": 0, "maximum": 1}, {},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_taken_is_valid(kind: str, bounds: dict[str, float]) -> None:
    schema = {"type": kind, **bounds}
    valid = {
        text for text in NUMBERS if not list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text)))
    }
    try:
        taken = {text for text in NUMBERS if takes(schema, text)}
    except ParameterError:
        assert kind == "integer" and not valid  # these bounds hold none
        return
    assert taken <= valid
    if kind == "number":
        assert taken or not valid


def test_bounds_within() -> None:
    """Members, items and branches, and parts that are joined."""
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    assert not takes({"type": "object", "properties": {"a": number}, "required": ["a"]}, '{"a": 0}')
    assert takes({"type": "object", "properties": {"a": number}, "required": ["a"]}, '{"a": 0.25}')
    assert not takes({"type": "array", "items": number, "minItems": 1}, "[0]")
    assert not takes({"anyOf": [number, {"type": "null"}]}, "0")
    assert not takes({"allOf": [{"type": "number"}, number]}, "0")


@pytest.mark.parametrize("bounds", [{"minimum": 2**53 + 1}, {"maximum": -(10**30)}, {"exclusiveMinimum": 1e300}])
def test_numbers_past_doubles_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match=r"2\*\*53"):
        constraint(TOKENIZER, schema={"type": "integer", **bounds})
