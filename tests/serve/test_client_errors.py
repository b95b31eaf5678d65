"""The official openai client: each class of error, in OpenAI's shape, and no 5xx for what a client did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_http import Exchange
from serve_process import KEY, Served

ASK: list[Any] = [{"role": "user", "content": "hello"}]
NO_END = {"2": -100, "0": -100, "1": -100}


def shaped(error: openai.APIStatusError) -> Any:
    """The error object, after a look at its shape: message, type, param, code."""
    body: Any = error.body
    assert isinstance(body, dict) and set(body) >= {"message", "type", "param", "code"}, error.response.text
    assert isinstance(body["message"], str) and body["message"] and isinstance(body["type"], str)
    assert "Traceback" not in body["message"] and "/" not in (body["code"] or "")
    return body


@pytest.mark.parametrize("key", ["sk-wrong", "x", KEY + "x", KEY[:-1], KEY.upper()])
def test_wrong_key(server: Served, key: str) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as wrong:
        calls: list[Callable[[], object]] = [
            wrong.models.list,
            lambda: wrong.chat.completions.create(model="any", messages=ASK),
            lambda: wrong.embeddings.create(model="any", input="x"),
            lambda: wrong.responses.create(model="any", input="x"),
        ]
        for call in calls:
            with pytest.raises(openai.AuthenticationError) as raised:
                call()
            assert shaped(raised.value)["code"] == "invalid_api_key"
            assert KEY not in raised.value.response.text


def test_no_key(server: Served) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/tokenize", "/metrics"):
        exchange = asyncio.run(_status(server, path))
        assert exchange == 401, path
    assert asyncio.run(_status(server, "/health")) == 200  # what a load balancer asks


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY} {KEY}", "Bearer \xff\xfe", "Bearer " + "x" * 9999],
)
def test_odd_authorization(server: Served, header: str) -> None:
    assert asyncio.run(_status(server, "/v1/models", {"Authorization": header})) == 401


async def _status(server: Served, path: str, headers: dict[str, str] | None = None) -> int:
    found = await Exchange.open(server.url, path, None if "chat" not in path else {}, headers=headers)
    await found.close()
    return found.status


def test_unknown_model(client: openai.OpenAI) -> None:
    """Where one model is served, requests may name it as they like; asked about, it has its name alone."""
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("no-such-model")
    assert shaped(raised.value)["code"] == "model_not_found"


def test_two_models(tiny_model: Callable[..., Path]) -> None:
    """Each answers by its own name and no other; their answers differ."""
    files = [tiny_model(seed=seed) for seed in (6, 7)]
    names = ("--alias", "one", "--alias", "two")
    with Served(*files, *names, "--ctx", "256", "--parallel", "2", "--threads", "1") as both:
        with openai.OpenAI(base_url=both.url + "/v1", api_key=KEY, max_retries=0) as client:
            assert [found.id for found in client.models.list()] == ["one", "two"]
            texts = []
            for name in ("one", "two"):
                found = client.completions.create(model=name, prompt="hello", temperature=0, logit_bias=NO_END)
                assert found.model == name
                texts.append(found.choices[0].text)
            assert texts[0] != texts[1]
            calls: list[Callable[[], object]] = [
                lambda: client.chat.completions.create(model="three", messages=ASK),
                lambda: client.chat.completions.create(model="three", messages=ASK, stream=True),
                lambda: client.completions.create(model="three", prompt="hello"),
                lambda: client.embeddings.create(model="three", input="hello"),
                lambda: client.responses.create(model="three", input="hello"),
                lambda: client.models.retrieve("three"),
            ]
            for call in calls:
                with pytest.raises(openai.NotFoundError) as raised:
                    call()
                assert shaped(raised.value)["code"] == "model_not_found"


def test_context_length(client: openai.OpenAI, model: str) -> None:
    long = "the cat " * 3000
    calls: list[Callable[[], object]] = [
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": long}]),
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": long}], stream=True),
        lambda: client.completions.create(model=model, prompt=long),
        lambda: client.completions.create(model=model, prompt=["hello", long]),
        lambda: client.completions.create(model=model, prompt=[5] * 5000, stream=True),
        lambda: client.responses.create(model=model, input=long),
        lambda: client.embeddings.create(model=model, input=long),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError) as raised:
            call()
        assert shaped(raised.value)["code"] == "context_length_exceeded"


BAD: list[dict[str, Any]] = [
    {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"max_tokens": -5}, {"max_tokens": 1.5}, {"n": 0},
    {"n": 10**9}, {"stop": 5}, {"stop": [""]}, {"logit_bias": {"x": 1}}, {"logit_bias": {"999999": 1}},
    {"logit_bias": [1]}, {"seed": "a"}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": -1},
    {"logprobs": True, "top_logprobs": 10**6}, {"presence_penalty": "x"}, {"stream": "perhaps"},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}},
    {"tools": "hammer"}, {"tools": [{"type": "function"}]}, {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "none such"}}, "tools": [
        {"type": "function", "function": {"name": "flip", "parameters": {"type": "object"}}}]},
    {"messages": []}, {"messages": [{}]}, {"messages": [{"role": "user", "content": 5}]}, {"messages": 7},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "", "content": "x"}]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD, ids=lambda wrong: str(wrong)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments(client: openai.OpenAI, model: str, wrong: dict[str, Any], stream: bool) -> None:
    """400 at once, streamed or not: a stream that begins with 200 has nothing wrong with its arguments."""
    request = {"model": model, "messages": ASK, "max_tokens": 4, "stream": stream, **wrong}
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as raised:
        client.post("/chat/completions", body=request, cast_to=object)
    assert shaped(raised.value)["type"] == "invalid_request_error"


BAD_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("/completions", {"prompt": {"a": 1}}), ("/completions", {"prompt": [[1], "a"]}),
    ("/completions", {"prompt": [-1]}),
    ("/completions", {"prompt": [10**9]}), ("/completions", {"prompt": [1.5]}),
    ("/completions", {"prompt": "a", "logprobs": -1}),
    ("/completions", {"prompt": "a", "logprobs": 10**6}), ("/completions", {"prompt": "a", "best_of": 0}),
    ("/completions", {"prompt": [True]}), ("/embeddings", {"input": []}), ("/embeddings", {"input": ""}),
    ("/embeddings", {"input": [[]]}), ("/embeddings", {"input": {"a": 1}}),
    ("/embeddings", {"input": "a", "encoding_format": "hex"}),
    ("/embeddings", {"input": [10**9]}), ("/embeddings", {"input": "a", "dimensions": 0}), ("/embeddings", {}),
    ("/completions", {"prompt": "a", "suffix": 5}), ("/responses", {"input": 5}),
    ("/responses", {"input": [{"role": "x"}]}),
    ("/responses", {"input": "a", "max_output_tokens": -2}),
    ("/responses", {"input": "a", "text": {"format": {"type": "x"}}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "wrong"), BAD_TEXT, ids=lambda value: str(value)[:60])
def test_bad_arguments_elsewhere(client: openai.OpenAI, model: str, path: str, wrong: dict[str, Any]) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as raised:
        client.post(path, body={"model": model, **wrong}, cast_to=object)
    assert shaped(raised.value)["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., Path]) -> Iterator[Served]:
    """One answer at a time, and one that waits."""
    file = tiny_model(n_ctx_train=8192, n_layer=3)
    with Served(file, "--parallel", "1", "--queue", "1", "--threads", "1") as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(small: Served, stream: bool) -> None:
    """Past the queue: 429 with Retry-After at once, and those that were let in go on."""
    name = small.model()
    long = {"model": name, "messages": ASK, "max_tokens": 8000, "logit_bias": NO_END, "stream": True}

    async def fill() -> list[Exchange]:
        running = await Exchange.open(small.url, "/v1/chat/completions", long, KEY)
        await anext(running.events())
        waiting = asyncio.create_task(Exchange.open(small.url, "/v1/chat/completions", long, KEY))
        while small.figures(await asyncio.to_thread(small.metrics)).waiting < 1:
            await asyncio.sleep(0.02)
        async with openai.AsyncOpenAI(base_url=small.url + "/v1", api_key=KEY, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as raised:
                await client.chat.completions.create(model=name, messages=ASK, max_tokens=1, stream=stream)
        shaped(raised.value)
        assert float(raised.value.response.headers["retry-after"]) > 0
        await anext(running.events())  # still there
        running.abort()
        found = await waiting
        await anext(found.events())
        found.abort()
        return [running, found]

    assert [exchange.status for exchange in asyncio.run(fill())] == [200, 200]
    small.settled()
    with openai.OpenAI(base_url=small.url + "/v1", api_key=KEY, max_retries=0) as client:
        assert client.chat.completions.create(model=name, messages=ASK, max_tokens=1).choices
