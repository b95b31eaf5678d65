"""/v1/responses in terms of a chat completion: the request there, the answer and its stream back."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from .answers import event
from .failures import APIError

_SAME = ("temperature", "top_p", "parallel_tool_calls")


def chat_request(given: dict[str, Any]) -> dict[str, Any]:
    """A checked request as one for a chat completion; APIError 400 for items that are not supported."""
    request: dict[str, Any] = {name: given[name] for name in _SAME if given.get(name) is not None}
    request["messages"] = _messages(given)
    if given.get("max_output_tokens") is not None:
        request["max_completion_tokens"] = given["max_output_tokens"]
    if given.get("tools"):
        names = ("name", "description", "parameters", "strict")
        request["tools"] = [
            {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
            for tool in given["tools"]
        ]
    choice = given.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    if choice is not None:
        request["tool_choice"] = choice
    form = (given.get("text") or {}).get("format")
    if form and form["type"] == "json_schema":
        form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    if form:
        request["response_format"] = form
    return request


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if given.get("instructions"):
        found.append({"role": "system", "content": given["instructions"]})
    if isinstance(given["input"], str):
        return [*found, {"role": "user", "content": given["input"]}]
    for i, item in enumerate(given["input"]):
        kind = item.get("type") or "message"
        if kind == "message":
            wanted: tuple[str, ...] = ("role", "content")
        else:
            wanted = {"function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id", "output"),
                      "reasoning": ()}.get(kind, ("type",))  # fmt: skip
        if wanted == ("type",):
            raise APIError(
                400, f"input[{i}].type: got {kind!r:.40}, supported are message, function_call, function_call_output",
                param=f"input[{i}].type", code="unsupported",
            )  # fmt: skip
        for name in wanted:
            if item.get(name) is None:
                raise APIError(400, f"input[{i}].{name}: got nothing, which a {kind} needs", param=f"input[{i}].{name}")
        if kind == "message":
            found.append({"role": item["role"], "content": _text(f"input[{i}].content", item["content"])})
        elif kind == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            if not found or found[-1]["role"] != "assistant":  # what is said and called at once is one turn
                found.append({"role": "assistant", "content": None})
            calls = found[-1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": call})
        elif kind == "function_call_output":
            content = _text(f"input[{i}].output", item["output"])
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    if not found:
        raise APIError(400, "input: got no message", param="input")
    return found


def _text(where: str, content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    for k, part in enumerate(content):
        if part["type"] not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise APIError(
                400, f"{where}[{k}]: got a part of type {part['type']!r:.40}, supported is text",
                param=f"{where}[{k}]", code="unsupported",
            )  # fmt: skip
    return "".join(part["text"] for part in content)


class Response:
    """The response to one request, as it grows."""

    def __init__(self, given: dict[str, Any], model: str, created: int) -> None:
        self.output: list[dict[str, Any]] = []
        self.body: dict[str, Any] = {
            "id": _new("resp"), "object": "response", "created_at": created, "status": "in_progress", "error": None,
            "incomplete_details": None, "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"), "model": model, "output": self.output,
            "parallel_tool_calls": given.get("parallel_tool_calls") is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": given.get("temperature"),
            "text": given.get("text") or {"format": {"type": "text"}},
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": given.get("tools") or [], "top_p": given.get("top_p"), "truncation": "disabled", "usage": None,
            "user": None, "metadata": given.get("metadata") or {},
        }  # fmt: skip
        self.text: dict[str, Any] | None = None
        self.number = 0

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The response that a chat completion comes to."""
        choice = completion["choices"][0]
        message = choice["message"]
        for _ in self._add(message.get("content"), message.get("tool_calls") or []):
            pass  # what a stream would say
        for _ in self._end(choice["finish_reason"], completion["usage"]):
            pass
        return self.body

    async def events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events, of a chat completion's chunks with usage."""
        finish, usage = "stop", None
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self.body)
        async for chunk in chunks:
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish = choice["finish_reason"] or finish
                delta = choice["delta"]
                for one in self._add(delta.get("content"), delta.get("tool_calls") or []):
                    yield one
        for one in self._end(finish, usage):
            yield one

    def failure(self, failed: APIError) -> bytes:
        """The events that end a stream that failed."""
        code = failed.code or failed.type
        self.body["status"], self.body["error"] = "failed", {"code": code, "message": failed.message}
        told = self._event("error", code=code, message=failed.message, param=failed.param)
        return told + self._event("response.failed", response=self.body)

    def _add(self, text: str | None, calls: list[dict[str, Any]]) -> Iterator[bytes]:
        if text:
            if self.text is None:
                yield from self._open_text()
            self.output[-1]["content"][0]["text"] += text
            yield self._event("response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[])
        for call in calls:
            function = call.get("function") or {}
            if function.get("name"):
                yield from self._close()
                yield from self._open({"type": "function_call", "id": _new("fc"), "status": "in_progress",
                                       "call_id": call["id"], "name": function["name"], "arguments": ""})  # fmt: skip
            if piece := function.get("arguments"):
                self.output[-1]["arguments"] += piece
                yield self._event("response.function_call_arguments.delta", **self._place(), delta=piece)

    def _open_text(self) -> Iterator[bytes]:
        yield from self._close()
        yield from self._open({"type": "message", "id": _new("msg"), "status": "in_progress", "role": "assistant",
                               "content": []})  # fmt: skip
        self.text = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=self.text)
        self.output[-1]["content"].append(self.text)

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        """Say that the latest item is complete."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item = self.output[-1]
        if self.text is not None:
            text, self.text = self.text, None
            place = {**self._place(), "content_index": 0}
            yield self._event("response.output_text.done", **place, text=text["text"], logprobs=[])
            yield self._event("response.content_part.done", **place, part=text)
        else:
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", **self._place(), name=item["name"],
                              arguments=arguments)  # fmt: skip
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _end(self, finish: str, usage: dict[str, Any] | None) -> Iterator[bytes]:
        status = "incomplete" if finish == "length" else "completed"
        if not self.output:
            yield from self._open_text()
        yield from self._close(status)
        self.body["status"] = status
        if status == "incomplete":
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            self.body["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": details.get("cached_tokens", 0), "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        yield self._event(f"response.{status}", response=self.body)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _event(self, kind: str, **data: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number - 1, **data}, kind)


def _new(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"
