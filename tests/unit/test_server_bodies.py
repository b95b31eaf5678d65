"""Bodies of requests: what is read, what is parsed, what is refused, and in which words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from hotcold.formats import errors
from hotcold.runtime.server import bodies, schemas
from hotcold.runtime.server.failures import APIError, as_api_error

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def refused(call: Any, *arguments: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        call(*arguments)
    return caught.value


def request(pieces: list[bytes], headers: dict[str, str] | None = None, ends: bool = True) -> tuple[Request, list[int]]:
    """A request whose body comes in pieces, and a list that counts what was asked for."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False} if ends else {"type": "http.disconnect"})
    taken: list[int] = []

    async def receive() -> Any:
        taken.append(1)
        return messages[len(taken) - 1]

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive), taken


# reading


def test_a_body_is_put_together() -> None:
    asked, _ = request([b"ab", b"", b"c"])
    assert asyncio.run(bodies.read(asked, 3)) == b"abc"


def test_a_body_over_the_limit_is_read_and_thrown_away_and_refused() -> None:
    asked, taken = request([b"abc"] * 5)
    error = refused(asyncio.run, bodies.read(asked, 4))
    assert (error.status, error.code, len(taken)) == (413, "request_too_large", 6)


def test_a_body_far_over_the_limit_is_not_read_to_its_end() -> None:
    asked, taken = request([b"abc"] * 100)
    assert refused(asyncio.run, bodies.read(asked, 4)).status == 413
    assert len(taken) < 20
    for headers in ({"Content-Length": "1000"}, {"Content-Length": "9", "Expect": "100-continue"}):
        asked, taken = request([b"abc"] * 100, headers)
        assert refused(asyncio.run, bodies.read(asked, 4)).status == 413
        assert taken == []


def test_a_client_that_leaves_or_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = request([b"abc"], ends=False)
    with pytest.raises(ClientDisconnect):
        asyncio.run(bodies.read(asked, 10))

    async def never() -> Any:
        await asyncio.Event().wait()

    async def drip() -> Any:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"x", "more_body": True}

    scope = {"type": "http", "method": "POST", "headers": []}
    for receive, limit in ((never, "IDLE_S"), (drip, "TOTAL_S")):
        with monkeypatch.context() as patch:
            patch.setattr(bodies, limit, 0.02)
            error = refused(asyncio.run, bodies.read(Request(scope, receive), 10**6))
            assert (error.status, error.code) == (408, "request_timeout")


# parsing


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "no valid JSON"),
        (b'{"a": 1} x', "no valid JSON"),
        (b'"text"', "is a str, wanted a JSON object"),
        (b"[]", "is a list"),
        (b'{"a": "\xff"}', "UTF-8 at byte 7"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "no JSON"),
        (b'{"a": 1e400}', "no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\uDC00": 1}', "half of a surrogate pair"),
        (b'{"a":' + b"[" * 100_000, "nests 100001 levels"),
        (b'{"a":' + b'{"a":' * 200_000, "nests 200001 levels"),
        (b'{"a": [' + b"1," * bodies.MAX_VALUES + b"1]}", "more than 1048576 values"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, said: str) -> None:
    error = refused(bodies.parse, raw)
    assert (error.status, error.code) == (400, "invalid_json")
    assert said in error.message and "\n" not in error.message


def test_a_string_that_never_ends_is_refused_in_linear_time() -> None:
    assert refused(bodies.parse, b'{"a": "' + rb"\"" * 4_000_000).status == 400


def test_escapes_surrogate_pairs_and_nul_pass() -> None:
    raw = rb'{"a": "\ud83d\ude00 \\ud800 \u0000 [[[[ \" {{{{", "b": "\\\\"}'
    assert bodies.parse(raw) == {"a": '😀 \\ud800 \0 [[[[ " {{{{', "b": "\\\\"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\,a'), inner, max_size=4),
)


def deep(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(deep, value.values()), default=0)
    return 1 + max(map(deep, value), default=0) if isinstance(value, list) else 0


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text('[]{}"\\,a'), JSON))
def test_every_object_is_read_as_it_is_and_measured(data: dict[str, Any]) -> None:
    raw = json.dumps(data).encode()
    assert bodies.parse(raw) == data
    assert bodies._measure(raw)[0] == deep(data)


# checking


def test_a_checked_body_gives_the_fields_that_are_known() -> None:
    model, given = bodies.checked(json.dumps({**CHAT, "n": 2, "service_tier": "auto"}).encode(), schemas.ChatRequest)
    assert model.n == 2 and given == {**CHAT, "n": 2}


def test_what_the_library_refuses_reaches_it() -> None:
    functions = {"functions": [{"name": "f"}], "function_call": {"name": "f"}, "mirostat_mode": 2}
    for body, schema in ((CHAT, schemas.ChatRequest), ({"prompt": "x"}, schemas.CompletionRequest)):
        asked = {**body, **functions}
        assert bodies.checked(json.dumps({**asked, "other": 1}).encode(), schema)[1] == asked


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": 5}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [CHAT["messages"][0], {"role": "user", "content": [5]}]}, "messages[1].content[0]"),
        ({"n": "5"}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 1e300}, "seed"),
        ({"n": True}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"stop": 1}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools[0].function.name"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    error = refused(bodies.checked, json.dumps({**CHAT, **change}).encode(), schemas.ChatRequest)
    assert (error.status, error.code, error.param) == (400, "invalid_value", param)
    assert error.message.startswith(f"{param}: ")


def test_a_whole_number_is_an_integer_however_it_is_written() -> None:
    raw = b'{"messages": [{"role": "user", "content": "x"}], "n": 2.0, "seed": 1e3, "temperature": 1.0, "top_p": 0.5}'
    given = bodies.checked(raw, schemas.ChatRequest)[1]
    assert {name: given[name] for name in ("n", "seed", "temperature", "top_p")} == {
        "n": 2, "seed": 1000, "temperature": 1, "top_p": 0.5
    }  # fmt: skip
    assert isinstance(given["n"], int) and isinstance(given["seed"], int)


def test_zero_is_no_false() -> None:
    for background, right in ((False, True), (None, True), (0, False), (True, False)):
        body = json.dumps({"input": "x", "background": background}).encode()
        if right:
            bodies.checked(body, schemas.ResponsesRequest)
        else:
            assert refused(bodies.checked, body, schemas.ResponsesRequest).param == "background"


@pytest.mark.parametrize("prompt", ["x", "", ["x", "y"], [1, 2], [[1], [2, 3]]])
def test_prompts_that_are_taken(prompt: Any) -> None:
    assert bodies.checked(json.dumps({"prompt": prompt}).encode(), schemas.CompletionRequest)[1] == {"prompt": prompt}


@pytest.mark.parametrize("prompt", [None, 5, {}, [], [[]], [1, "x"], ["x", 1], [-1], [1.5], [[1], "x"], [[[1]]]])
def test_prompts_that_are_refused(prompt: Any) -> None:
    error = refused(bodies.checked, json.dumps({"prompt": prompt}).encode(), schemas.CompletionRequest)
    assert error.status == 400 and (error.param or "").startswith("prompt")


# errors


def test_every_error_has_a_status() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        error = kind("f", "x", 1, 2) if kind is errors.FormatError else kind("top_k: got x")
        failed = as_api_error(error)
        clients = kind in (errors.ParameterError, errors.ContextLengthError, errors.UnsupportedError,
                           errors.TemplateError, errors.ModelNotFoundError, errors.BusyError)  # fmt: skip
        assert (failed.status < 500) is clients, kind
        assert failed.body()["error"]["message"].count("\n") == 0
    assert as_api_error(errors.ParameterError("top_k: got x")).param == "top_k"
    assert as_api_error(errors.ContextLengthError("prompt: got 9")).code == "context_length_exceeded"
    busy = as_api_error(errors.BusyError("8 running"))
    assert (busy.status, busy.headers) == (429, {"Retry-After": "1"})


def test_a_bug_is_not_told_to_clients() -> None:
    failed = as_api_error(ValueError("/secret/path"))
    assert failed.status == 500 and "secret" not in failed.message


def test_room_for_all_bodies() -> None:
    """What one gives back, another may take; past it 429, and what was taken then comes back as well."""
    room = bodies.Room(10)
    with room.share() as first:
        first(6)
        with room.share() as second:
            second(4)
            error = refused(second, 1)
            assert (error.status, error.headers["Retry-After"]) == (429, "1")
        assert room.used == 6
    assert room.used == 0
