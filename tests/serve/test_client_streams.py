"""The official openai client: streams, synchronous and asynchronous, many at once, and left in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from serve_http import Exchange, text_of
from serve_process import KEY, Served

NO_END = {"2": -100, "0": -100, "1": -100}


def asked(text: str, n_tokens: int = 24, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": n_tokens, "temperature": 0, "logit_bias": NO_END, **options}


def test_chat_stream(client: openai.OpenAI, model: str) -> None:
    """The pieces make the whole answer; the first names the role, the last the reason, all the same id."""
    whole = client.chat.completions.create(model=model, **asked("hello"))
    chunks = list(client.chat.completions.create(model=model, stream=True, **asked("hello")))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict())
        assert chunk.object == "chat.completion.chunk" and chunk.usage is None
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
    assert len(chunks) > 4


def test_include_usage(client: openai.OpenAI, model: str) -> None:
    """One more chunk without choices has the usage; the others have none."""
    stream = client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **asked("hello", 9)
    )
    *others, last = list(stream)
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 9
    assert last.usage.total_tokens == last.usage.prompt_tokens + 9
    assert all(chunk.usage is None and chunk.choices for chunk in others)


def test_completion_stream(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "prompt": "hello",
        "max_tokens": 20,
        "temperature": 0,
        "logit_bias": NO_END,
    }
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert {c.object for c in chunks} == {"text_completion"} and all(isinstance(c, Completion) for c in chunks)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][:-1] == [None] * (len(chunks) - 2)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_stream_of_several_choices(client: openai.OpenAI, model: str) -> None:
    """Chunks of n choices may interleave; each choice's own make its answer."""
    options = asked("hello", 12, n=3, temperature=1.4, seed=8)
    whole = client.chat.completions.create(model=model, **options)
    found = {0: "", 1: "", 2: ""}
    ended = set()
    for chunk in client.chat.completions.create(model=model, stream=True, **options):
        for choice in chunk.choices:
            assert choice.index not in ended
            found[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ended.add(choice.index)
    assert found == {c.index: c.message.content for c in whole.choices} and ended == {0, 1, 2}


def test_stream_with_logprobs(client: openai.OpenAI, model: str) -> None:
    options = asked("hello", 8, logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(model=model, **options)
    streamed = []
    for chunk in client.chat.completions.create(model=model, stream=True, **options):
        scores = chunk.choices[0].logprobs
        streamed += scores.content or [] if scores else []
    assert whole.choices[0].logprobs is not None
    # a batch of several streams may round otherwise than one alone
    assert [s.token for s in streamed] == [s.token for s in whole.choices[0].logprobs.content or []]


def test_client_side_accumulation(client: openai.OpenAI, model: str) -> None:
    """The client's own stream helper rebuilds the whole completion from our chunks."""
    long = client.chat.completions.create(model=model, **asked("hello")).choices[0].message.content or ""
    options = asked("hello", stop=long[-4:])  # the helper raises where max_tokens ends an answer
    whole = client.chat.completions.create(model=model, **options)
    with client.chat.completions.stream(model=model, **options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_async_streams_at_once(async_client: Callable[[], Any], client: openai.OpenAI, model: str) -> None:
    """More streams than the server runs at once: each gives its own text, the one that it gives alone."""
    words = ["hello", "the cat", "and on", "is it", "hello world", "she", "in the", "a hat", "over", "an ant"]
    alone = {w: client.chat.completions.create(model=model, **asked(w)).choices[0].message.content for w in words}
    assert len(set(alone.values())) == len(words)

    async def one(opened: openai.AsyncOpenAI, word: str) -> tuple[str, str]:
        stream = await opened.chat.completions.create(model=model, stream=True, **asked(word))
        return word, "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[tuple[str, str]]:
        async with async_client() as opened:
            return await asyncio.gather(*(one(opened, word) for word in words))

    assert dict(asyncio.run(all_of_them())) == alone


def test_async_whole_answers_at_once(async_client: Callable[[], Any], model: str) -> None:
    async def both() -> list[Any]:
        async with async_client() as opened:
            return await asyncio.gather(
                opened.chat.completions.create(model=model, **asked("hello")),
                opened.completions.create(model=model, prompt="hello", max_tokens=4),
                opened.embeddings.create(model=model, input="hello"),
                opened.models.list(),
            )

    chat, text, vectors, models = asyncio.run(both())
    assert chat.choices[0].message.content and text.choices and vectors.data and models.data[0].id == model


@pytest.mark.parametrize("goodbye", ["close", "abort"])
def test_leaving_frees_the_sequence(server: Served, model: str, goodbye: str) -> None:
    """A client that leaves in mid-stream: its sequence stops, its blocks come back, and others go on unharmed."""
    long = {"model": model, "stream": True, **asked("the hat", 1900)}
    before = server.metrics()

    async def run() -> str:
        leaving = [await Exchange.open(server.url, "/v1/chat/completions", long, KEY) for _ in range(3)]
        staying = await Exchange.open(
            server.url, "/v1/chat/completions", {"model": model, "stream": True, **asked("hello", 60)}, KEY
        )
        for exchange in leaving:
            events = exchange.events()
            for _ in range(3):
                await anext(events)
            await exchange.close() if goodbye == "close" else exchange.abort()
        return "".join([text_of(event) async for event in staying.events()])

    text = asyncio.run(run())
    _, alone = server.get("/v1/chat/completions", {"model": model, **asked("hello", 60)})
    assert text == alone["choices"][0]["message"]["content"]
    after = server.settled()
    assert after.running == after.waiting == after.blocks == 0
    generated = after.tokens - Served.figures(before).tokens
    assert 120 <= generated < 3 * 1900


def test_leaving_while_waiting(server: Served, model: str) -> None:
    """A client that leaves the queue is forgotten, whole answers included."""

    async def run() -> None:
        body = {"model": model, **asked("the hat", 1900)}
        running = [
            await Exchange.open(server.url, "/v1/chat/completions", {**body, "stream": True}, KEY) for _ in range(4)
        ]
        queued = [asyncio.create_task(Exchange.open(server.url, "/v1/chat/completions", body, KEY)) for _ in range(4)]
        await asyncio.sleep(0.1)
        for task in queued:
            task.cancel()
        for exchange in running:
            exchange.abort()
        await asyncio.gather(*queued, return_exceptions=True)

    asyncio.run(run())
    after = server.settled()
    assert after.running == after.waiting == after.blocks == 0
