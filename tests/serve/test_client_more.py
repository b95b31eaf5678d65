"""The official openai client: embeddings and responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.responses import Response
from pydantic import BaseModel
from serve_process import Served

TEXTS = ["hello world", "the cat", "and the hat in the"]


class Side(BaseModel):
    side: Literal["heads", "tails"]


def test_embeddings(client: openai.OpenAI, model: str) -> None:
    """The client asks for base64 by itself; floats are the same numbers; the vectors have unit length."""
    packed = client.embeddings.create(model=model, input=TEXTS)
    floats = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
    CreateEmbeddingResponse.model_validate(floats.to_dict())
    assert [d.index for d in packed.data] == [d.index for d in floats.data] == [0, 1, 2]
    for a, b in zip(packed.data, floats.data, strict=True):
        assert np.allclose(a.embedding, b.embedding, atol=1e-5) and len(a.embedding) == 64
        assert np.isclose(np.linalg.norm(a.embedding), 1, atol=1e-4)
    assert not np.allclose(packed.data[0].embedding, packed.data[1].embedding, atol=1e-3)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 3


def test_embeddings_of_one_and_of_ids(client: openai.OpenAI, model: str, server: Served) -> None:
    """A text, its token ids and a list of either give the same vector, whatever stands beside it."""
    _, found = server.get("/tokenize", {"model": model, "prompt": TEXTS[0], "content": TEXTS[0]})
    ids = found["tokens"]
    together = client.embeddings.create(model=model, input=TEXTS).data[0].embedding
    inputs: list[Any] = [TEXTS[0], [TEXTS[0]], ids, [ids]]
    for given in inputs:
        (only,) = client.embeddings.create(model=model, input=given).data
        assert np.allclose(only.embedding, together, atol=2e-3)


def test_embeddings_shortened(client: openai.OpenAI, model: str) -> None:
    """`dimensions` either cuts to so many, of unit length again, or is refused; never ignored."""
    try:
        found = client.embeddings.create(model=model, input="hello", dimensions=16)
    except openai.BadRequestError as error:
        assert "dimensions" in str(error)
    else:
        assert len(found.data[0].embedding) == 16 and np.isclose(np.linalg.norm(found.data[0].embedding), 1, atol=1e-4)


def test_responses(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "input": "the cat", "max_output_tokens": 16, "temperature": 0}
    found = client.responses.create(instructions="Be brief.", **options)
    Response.model_validate(found.to_dict())
    assert found.object == "response" and found.status in ("completed", "incomplete")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    assert found.output_text == chat.choices[0].message.content
    assert found.usage is not None and chat.usage is not None
    assert found.usage.output_tokens == chat.usage.completion_tokens
    items: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    assert client.responses.create(**{**options, "input": items}).output_text == found.output_text


def test_responses_streamed(client: openai.OpenAI, model: str) -> None:
    """Named events in OpenAI's order, numbered, whose deltas make the text."""
    options: dict[str, Any] = {"model": model, "input": "the cat", "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**options)
    events = list(client.responses.create(stream=True, **options))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    order = [kinds.index(k) for k in (
        "response.created", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done",
    )]  # fmt: skip
    assert order == sorted(order)
    last: Any = events[-1]
    assert last.response.output_text == text


def test_responses_parse(client: openai.OpenAI, model: str) -> None:
    found = client.responses.parse(model=model, input="the cat", text_format=Side, max_output_tokens=64, temperature=0)
    assert isinstance(found.output_parsed, Side)


def test_responses_tools(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "name": "flip", "parameters": Side.model_json_schema(), "strict": True}
    found = client.responses.create(
        model=model, input="the cat", tools=[tool], tool_choice="required", max_output_tokens=99, temperature=0
    )
    (call,) = [item for item in found.output if item.type == "function_call"]
    assert call.name == "flip" and call.call_id
    Side.model_validate(json.loads(call.arguments))


def test_responses_are_not_kept(client: openai.OpenAI, model: str) -> None:
    """Stateless: what refers to an earlier response is refused in words, not answered as if it were known."""
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        client.responses.create(model=model, input="on", previous_response_id="resp_1", max_output_tokens=16)


def test_async(async_client: Callable[[], Any], client: openai.OpenAI, model: str) -> None:
    async def run() -> Any:
        async with async_client() as opened:
            stream = await opened.responses.create(
                model=model, input="the cat", max_output_tokens=16, temperature=0, stream=True
            )
            text = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
            return text, await opened.embeddings.create(model=model, input=TEXTS)

    text, vectors = asyncio.run(run())
    assert (
        text == client.responses.create(model=model, input="the cat", max_output_tokens=16, temperature=0).output_text
    )
    assert len(vectors.data) == 3
