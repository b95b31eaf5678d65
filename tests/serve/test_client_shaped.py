"""The official openai client: JSON objects and schemas, pydantic models, tools whole and streamed.

The tiny model talks nonsense, so what has a shape has it from the constraint alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

ASK: list[Any] = [{"role": "user", "content": "the cat and the hat"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "warm": {"type": "boolean"},
        "days": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["unit", "warm", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {
            "name": "flip",
            "parameters": {
                "type": "object",
                "properties": {"side": {"enum": ["heads", "tails"]}},
                "required": ["side"],
                "additionalProperties": False,
            },
        },
    },
]
BY_NAME = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


class Weather(BaseModel):
    """What parse() turns into a schema and back."""

    unit: Literal["C", "F"]
    warm: bool


def json_schema(schema: dict[str, Any], name: str = "weather") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


@pytest.mark.parametrize("seed", range(5))
def test_json_schema(client: openai.OpenAI, model: str, seed: int) -> None:
    found = client.chat.completions.create(
        model=model, messages=ASK, response_format=json_schema(SCHEMA), max_tokens=200, temperature=1.5, seed=seed
    )
    assert found.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(found.choices[0].message.content or ""), SCHEMA)


def test_json_schema_of_several_choices(client: openai.OpenAI, model: str) -> None:
    """Each choice has a matcher of its own."""
    found = client.chat.completions.create(
        model=model, messages=ASK, response_format=json_schema(SCHEMA), max_tokens=200, temperature=2, seed=1, n=4
    )
    texts = [choice.message.content or "" for choice in found.choices]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_json_schema_streamed(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=ASK, response_format=json_schema(SCHEMA), max_tokens=200, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object(client: openai.OpenAI, model: str) -> None:
    """Whatever comes is the beginning of a JSON object, and one where it ended by itself."""
    found = client.chat.completions.create(
        model=model, messages=ASK, response_format={"type": "json_object"}, max_tokens=60, temperature=1, seed=2
    )
    text = found.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_parse_into_a_pydantic_model(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.parse(
        model=model, messages=ASK, response_format=Weather, max_tokens=100, temperature=1, seed=4
    )
    assert isinstance(found.choices[0].message.parsed, Weather)


def test_parse_asynchronously(async_client: Callable[[], Any], model: str) -> None:
    async def run() -> Any:
        async with async_client() as opened:
            return await opened.chat.completions.parse(
                model=model, messages=ASK, response_format=Weather, max_tokens=100, temperature=0
            )

    assert isinstance(asyncio.run(run()).choices[0].message.parsed, Weather)


def test_schema_stream_helper(client: openai.OpenAI, model: str) -> None:
    """The client's helper parses what it accumulated."""
    with client.chat.completions.stream(
        model=model, messages=ASK, response_format=Weather, max_tokens=100, temperature=0
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "flip"}}], ids=["required", "named"]
)
def test_tool_choice(client: openai.OpenAI, model: str, choice: Any, seed: int) -> None:
    found = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice=choice, max_tokens=250, temperature=1, seed=seed,
        parallel_tool_calls=False,
    )  # fmt: skip
    ChatCompletion.model_validate(found.to_dict())
    (only,) = found.choices
    calls = only.message.tool_calls
    assert calls and only.message.content in (None, "")
    # OpenAI gives "stop" after a tool that was named
    assert only.finish_reason in (("tool_calls",) if choice == "required" else ("tool_calls", "stop"))
    for call in calls:
        assert call.type == "function" and call.id
        jsonschema.validate(json.loads(call.function.arguments), BY_NAME[call.function.name])
    if choice != "required":
        assert [call.function.name for call in calls] == ["flip"]
    assert len(calls) == 1


def test_several_calls(client: openai.OpenAI, model: str) -> None:
    """A model that goes on calling has each call with an id of its own, until it ends or is cut off."""
    found = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=1000, temperature=1, seed=1
    )
    calls = found.choices[0].message.tool_calls or []
    whole = calls if found.choices[0].finish_reason == "tool_calls" else calls[:-1]
    assert len(whole) > 1 and len({call.id for call in calls}) == len(calls)
    for call in whole:
        jsonschema.validate(json.loads(call.function.arguments), BY_NAME[call.function.name])


@pytest.mark.parametrize("name", ["flip", "get_weather"])
def test_tool_deltas(client: openai.OpenAI, model: str, name: str) -> None:
    """The first delta of a call has its id, type and name, the others only more of its arguments."""
    options: dict[str, Any] = {
        "model": model, "messages": ASK, "tools": TOOLS, "max_tokens": 250, "temperature": 0,
        "tool_choice": {"type": "function", "function": {"name": name}},
    }  # fmt: skip
    deltas, reasons, content = [], [], ""
    for chunk in client.chat.completions.create(stream=True, **options):
        deltas += chunk.choices[0].delta.tool_calls or []
        content += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert content == "" and len(deltas) > 1
    first, *others = deltas
    assert first.index == 0 and first.id and first.type == "function"
    assert first.function is not None and first.function.name == name
    for delta in others:
        assert delta.index == 0 and delta.id is None and delta.function is not None and delta.function.name is None
    arguments = "".join((delta.function.arguments or "") if delta.function else "" for delta in deltas)
    jsonschema.validate(json.loads(arguments), BY_NAME[name])
    assert reasons[-1] in ("tool_calls", "stop") and set(reasons[:-1]) == {None}
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert whole and whole[0].function.arguments == arguments


def test_tool_stream_helper(client: openai.OpenAI, model: str) -> None:
    """The client's helper accumulates the deltas into calls."""
    with client.chat.completions.stream(
        model=model, messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=250, temperature=0,
        parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds and message.tool_calls
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), BY_NAME[call.function.name])


def test_tool_choice_none(client: openai.OpenAI, model: str) -> None:
    """No call, whatever the model says."""
    found = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice="none", max_tokens=12, temperature=0
    )
    assert not found.choices[0].message.tool_calls


def test_a_conversation_with_tools(client: openai.OpenAI, model: str) -> None:
    """Calls and their results go back in, as agents send them."""
    call = {"id": "call_1", "type": "function", "function": {"name": "flip", "arguments": '{"side": "heads"}'}}
    messages: list[Any] = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "heads it is"},
    ]
    found = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=8)
    assert found.choices[0].message.role == "assistant"
