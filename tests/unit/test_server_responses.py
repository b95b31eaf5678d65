"""/v1/responses: the request as a chat request, a completion and its chunks as the response and its events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hotcold.runtime.server import responses
from hotcold.runtime.server.failures import APIError

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}


def test_a_text_becomes_a_message() -> None:
    assert responses.chat_request({"input": "hi", "instructions": "be brief"}) == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    }


def test_items_become_turns() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "[]"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "[]"}},
    ]
    assert responses.chat_request({"input": items})["messages"] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "ok"},
    ]


def test_what_is_said_and_called_at_once_is_one_turn() -> None:
    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}

    items = [
        {"role": "user", "content": "a"}, call(1),
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"role": "assistant", "content": "wait"}, call(2), call(3),
    ]  # fmt: skip
    found = responses.chat_request({"input": items})["messages"]
    assert [(turn["role"], turn["content"]) for turn in found] == [
        ("user", "a"), ("assistant", None), ("tool", "1"), ("assistant", "wait")
    ]  # fmt: skip
    assert [[one["id"] for one in turn.get("tool_calls", [])] for turn in found] == [[], ["c1"], [], ["c2", "c3"]]


def test_options_are_translated() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    found = responses.chat_request(
        {"input": "x", "max_output_tokens": 7, "temperature": 0, "tools": [TOOL], "text": {"format": form},
         "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False}
    )  # fmt: skip
    del found["messages"]
    assert found == {
        "max_completion_tokens": 7, "temperature": 0, "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"type": "item_reference", "id": "x"}], "input[0].type"),
        ([{"role": "user"}], "input[0].content"),
        ([{"content": "x"}], "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]"),
        ([{"type": "function_call", "call_id": "x", "name": "f"}], "input[0].arguments"),
        ([{"type": "reasoning"}], "input"),
    ],
)
def test_what_is_not_supported_is_named(items: list[Any], param: str) -> None:
    with pytest.raises(APIError) as caught:
        responses.chat_request({"input": items})
    assert (caught.value.status, caught.value.param) == (400, param)


def completion(message: dict[str, Any], finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": USAGE}


def stream(given: dict[str, Any], deltas: list[dict[str, Any]], finish: str = "stop") -> list[dict[str, Any]]:
    """What the events say, checked for their numbers and names."""

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        for delta in deltas:
            yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
        yield {"choices": [], "usage": USAGE}

    async def collect() -> list[bytes]:
        return [one async for one in responses.Response(given, "m", 9).events(chunks())]

    found = []
    for number, raw in enumerate(asyncio.run(collect())):
        name, data = raw.decode().rstrip("\n").split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}" and found[-1]["sequence_number"] == number
    return found


def test_a_text_as_a_response() -> None:
    given = {"input": "x", "metadata": {"a": "b"}}
    whole = responses.Response(given, "m", 9).whole(completion({"role": "assistant", "content": "hello"}))
    assert (whole["object"], whole["status"], whole["model"], whole["created_at"]) == ("response", "completed", "m", 9)
    assert whole["metadata"] == {"a": "b"} and whole["store"] is False and whole["error"] is None
    (item,) = whole["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}]
    assert whole["usage"]["input_tokens"] == 3 and whole["usage"]["input_tokens_details"]["cached_tokens"] == 1
    assert whole["usage"]["output_tokens"] == 2 and whole["usage"]["total_tokens"] == 5


def test_an_answer_without_text_still_has_a_message() -> None:
    whole = responses.Response({"input": "x"}, "m", 9).whole(completion({"content": ""}, "length"))
    assert [part["text"] for part in whole["output"][0]["content"]] == [""]
    assert whole["status"] == whole["output"][0]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_of_text() -> None:
    events = stream({"input": "x"}, [{"role": "assistant"}, {"content": "hel"}, {"content": "lo"}])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == [] and events[3]["part"]["text"] == ""
    assert [event["delta"] for event in events[4:6]] == ["hel", "lo"] and events[6]["text"] == "hello"
    ids = {event.get("item_id") or event["item"]["id"] for event in events[2:9]}
    assert len(ids) == 1 and all(event["output_index"] == 0 for event in events[2:9])
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]


def test_a_stream_of_calls_equals_the_whole() -> None:
    deltas = [
        {"role": "assistant", "content": "first"},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    events = stream({"input": "x", "tools": [TOOL]}, deltas, "tool_calls")
    streamed = events[-1]["response"]
    whole = responses.Response({"input": "x", "tools": [TOOL]}, "m", 9).whole(
        completion({"content": "first", "tool_calls": calls}, "tool_calls")
    )

    def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in item.items() if name != "id"} for item in items]

    assert plain(streamed["output"]) == plain(whole["output"])
    assert [item["type"] for item in whole["output"]] == ["message", "function_call", "function_call"]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["arguments"], event["output_index"]) for event in done] == [('{"a":1}', 1), ("{}", 2)]
    assert streamed["status"] == "completed" and streamed["usage"] == whole["usage"]
