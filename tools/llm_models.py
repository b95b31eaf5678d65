"""The models that llm_plugin.py registers: hotcold's LLM behind the classes of llm."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, cast

import llm
from llm.parts import TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from .console import StatusLine, find_model

if TYPE_CHECKING:
    from ..runtime.llm import LLM

N_PARALLEL = 4  # answers of the async class that are computed at once
MAX_TOKENS = 1024  # small models may never end by themselves
REPEAT_PENALTY = 1.1  # or fall into loops

_open: dict[tuple[Any, ...], LLM] = {}  # for the life of the process: opening takes longer than answering
_opening = threading.Lock()


class ChatOptions(llm.Model.Options):
    """What `-o NAME VALUE` takes; the names are hotcold's."""

    temperature: float | None = Field(None, ge=0, description="Randomness; 0 takes the likeliest token always")
    top_p: float | None = Field(None, ge=0, le=1, description="Draw from the likeliest tokens that sum to this")
    top_k: int | None = Field(None, ge=0, description="Draw from so many of the likeliest tokens; 0 is off")
    min_p: float | None = Field(None, ge=0, le=1, description="Leave out tokens below this part of the best")
    max_tokens: int | None = Field(None, ge=-1, description=f"Longest answer; -1 is no limit; default {MAX_TOKENS}")
    seed: int | None = Field(None, ge=-1, description="The same seed gives the same answer")
    repeat_penalty: float | None = Field(None, gt=0, description="Above 1 makes repetitions less likely")
    presence_penalty: float | None = Field(None, description="Lowers tokens that occurred")
    frequency_penalty: float | None = Field(None, description="Lowers tokens by how often they occurred")
    stop: str | None = Field(None, min_length=1, description="A text that ends the answer, itself left out")
    n_ctx: int | None = Field(None, ge=1, description="Tokens of context, by default the model's")
    n_threads: int | None = Field(None, ge=1, description="Threads, by default the machine's cores")
    cache_type_k: str | None = Field(None, description="Keys are kept as f16 (the default), q8_0 or q4_0")
    cache_type_v: str | None = Field(None, description="Values are kept as f16 (the default), q8_0 or q4_0")


def open_model(
    model: str,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_parallel: int = 1,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
) -> LLM:
    """The model, opened when it is first asked for and kept from then on."""
    from ..runtime.llm import LLM

    with _opening:
        keys, values = cache_type_k or "f16", cache_type_v or "f16"
        key = model, n_ctx, n_threads, n_parallel, keys, values
        if key not in _open or _open[key].closed:
            path, status = find_model(model), StatusLine()
            try:
                _open[key] = LLM(
                    path,
                    n_ctx=n_ctx,
                    n_threads=n_threads,
                    n_parallel=n_parallel,
                    cache_type_k=keys,
                    cache_type_v=values,
                    progress=status,
                )
            finally:
                status.clear()
        return _open[key]


class _Named:
    """What the three kinds of models share."""

    n_parallel = 1

    def __init__(self, model_id: str, model: str) -> None:
        self.model_id, self.model = model_id, model

    def __str__(self) -> str:
        return f"hotcold: {self.model_id}"


class _Chat(_Named):
    can_stream = True
    supports_schema = True
    supports_tools = True

    def opened(self, prompt: llm.Prompt) -> LLM:
        """The LLM that answers a prompt."""
        options = cast(ChatOptions, prompt.options)
        types = options.cache_type_k, options.cache_type_v
        return open_model(self.model, options.n_ctx, options.n_threads, self.n_parallel, *types)


class Chat(_Chat, llm.Model):
    """One of hotcold's models, for llm's synchronous side."""

    Options = ChatOptions  # type: ignore[assignment]  # mypy wants a class statement here

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """The answer, piece by piece."""
        model, fold = self.opened(prompt), _Fold()
        with closing(model.create_chat_completion(stream=True, **_request(prompt, model))) as chunks:
            for chunk in chunks:
                if text := fold.take(chunk):
                    yield text
        fold.finish(response)


class AsyncChat(_Chat, llm.AsyncModel):
    """The same for its asynchronous side; several answers at once share the model's steps."""

    n_parallel = N_PARALLEL
    Options = ChatOptions  # type: ignore[assignment]  # mypy wants a class statement here

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str, None]:
        """The answer, piece by piece; the event loop goes on while the model is opened and computes."""
        model, fold = await asyncio.to_thread(self.opened, prompt), _Fold()
        reply = model.open_chat(**_request(prompt, model))
        async with aclosing(reply.achunks()) as chunks:
            async for chunk in chunks:
                if text := fold.take(chunk):
                    yield text
        fold.finish(response)


class Embedding(_Named, llm.EmbeddingModel):
    """A model's embeddings: one vector a text, of length 1."""

    batch_size = 64

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """The vectors of texts."""
        yield from open_model(self.model).embed([str(item) for item in items]).array.tolist()


def _request(prompt: llm.Prompt, model: LLM) -> dict[str, Any]:
    """A prompt as arguments of create_chat_completion."""
    asked = prompt.options.model_dump(exclude_none=True, exclude={"n_ctx", "n_threads", "cache_type_k", "cache_type_v"})
    request = {"max_tokens": MAX_TOKENS, **asked, "messages": _messages(prompt.messages)}
    request["stream_options"] = {"include_usage": True}
    if prompt.schema:
        form = {"name": "answer", "schema": prompt.schema}
        request["response_format"] = {"type": "json_schema", "json_schema": form}
    if prompt.tools:
        request["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
            }
            for t in prompt.tools
        ]
    if not (prompt.schema or prompt.tools or "repeat_penalty" in model.config.sampling):
        request.setdefault("repeat_penalty", REPEAT_PENALTY)  # which JSON, made of repetitions, cannot stand
    return request


def _messages(messages: Iterable[llm.Message]) -> list[dict[str, Any]]:
    """llm's messages in OpenAI's shape."""
    found: list[dict[str, Any]] = []
    for message in messages:
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
        results = [part for part in message.parts if isinstance(part, ToolResultPart)]
        for result in results:
            content = result.output if result.exception is None else f"Error: {result.exception}"
            found.append(
                {"role": "tool", "tool_call_id": result.tool_call_id or "", "name": result.name, "content": content}
            )
        if calls:
            asked = [
                {
                    "id": call.tool_call_id or "",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
                }
                for call in calls
            ]
            found.append({"role": message.role, "content": text or None, "tool_calls": asked})
        elif text or not results:
            found.append({"role": message.role, "content": text})
    return found


class _Fold:
    """What the chunks of an answer come to besides its text: the tools it calls, the tokens it took."""

    def __init__(self) -> None:
        self.calls: dict[int, dict[str, str]] = {}
        self.usage: dict[str, int] | None = None

    def take(self, chunk: dict[str, Any]) -> str:
        """Note one chunk; its text."""
        self.usage = chunk.get("usage") or self.usage
        if not chunk["choices"]:
            return ""
        delta = chunk["choices"][0]["delta"]
        for part in delta.get("tool_calls") or ():
            call = self.calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] += part.get("id") or ""
            for name, text in part["function"].items():
                call[name] += text or ""
        return delta.get("content") or ""

    def finish(self, response: llm.Response | llm.AsyncResponse) -> None:
        """Tell the response."""
        for call in self.calls.values():
            try:
                arguments = json.loads(call["arguments"] or "{}")
            except ValueError:
                raise llm.ModelError(
                    f"{call['name']}: the answer ended within the call's arguments; raise max_tokens"
                ) from None
            response.add_tool_call(llm.ToolCall(call["name"], arguments, tool_call_id=call["id"] or None))
        if self.usage:
            response.set_usage(input=self.usage["prompt_tokens"], output=self.usage["completion_tokens"])
