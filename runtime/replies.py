"""OpenAI's shapes: the dicts that n answers to one request come to, whole or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..formats.tokenizer import Tokenizer
from .answer import Answer, Piece, TokenScore
from .scheduler import Unit

if TYPE_CHECKING:
    from .tool_calls import ToolParser

Json = dict[str, Any]


class Reply:
    """The answers to one request; started once, then read once: `whole` or `chunks`, or their asynchronous twins.

    usage_chunk: a stream ends in a chunk with the usage. Reading starts it, if `start` was not called, and ends it.
    """

    def __init__(self, choices: Sequence[Choice], model: str, usage_chunk: bool = False) -> None:
        self.choices, self.model, self.usage_chunk = list(choices), model, usage_chunk
        self.kind = self.choices[0]
        self.id = f"{self.kind.prefix}-{uuid.uuid4()}"
        self.created = int(time.time())

    def start(self) -> None:
        """Queue the answers, which count as one in the queue; BusyError where it is full of others'."""
        unit = Unit()
        try:
            for choice in self.choices:
                choice.answer.start(unit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the answers, from any thread and at any time."""
        for choice in self.choices:
            choice.answer.close()

    def whole(self) -> Json:
        """The complete answer."""
        with closing(self._parts()) as parts:
            for _ in parts:
                pass
        return self._whole()

    async def awhole(self) -> Json:
        """The complete answer, from any event loop."""
        async with aclosing(self._aparts()) as parts:
            async for _ in parts:
                pass
        return self._whole()

    def chunks(self) -> Generator[Json, None, None]:
        """The answer in chunks; of several choices one after the other."""
        with closing(self._parts()) as parts:
            for part in parts:
                yield self._chunk(part)
        if self.usage_chunk:
            yield self._chunk(None)

    async def achunks(self) -> AsyncGenerator[Json, None]:
        """The answer in chunks, those of several choices as they come."""
        async with aclosing(self._aparts()) as parts:
            async for part in parts:
                yield self._chunk(part)
        if self.usage_chunk:
            yield self._chunk(None)

    def usage(self, choices: Sequence[Choice] | None = None) -> Json:
        """Tokens of the prompts (each once, however many answers it has) and of the answers; of all, or of some."""
        choices = self.choices if choices is None else choices
        prompts = {choice.prompt: choice.answer for choice in reversed(choices)}.values()
        asked = sum(len(answer.request.ids) for answer in prompts)
        cached = sum(min(answer.stats.reused_tokens, len(answer.request.ids)) for answer in prompts)
        answered = sum(len(choice.answer.tokens) for choice in choices)
        return {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _parts(self) -> Generator[Json, None, None]:
        """Choices of chunks."""
        self.start()
        try:
            for choice in self.choices:
                yield from choice.begin()
                with closing(iter(choice.answer)) as pieces:
                    for piece in pieces:
                        yield from choice.take(piece)
                        if choice.enough:
                            break
                yield from choice.end()
        finally:
            self.close()

    async def _aparts(self) -> AsyncGenerator[Json, None]:
        import asyncio  # who needs it has it

        self.start()
        done = object()
        # no more is read ahead of a slow reader than this
        queue: asyncio.Queue[object] = asyncio.Queue(2 * len(self.choices))

        async def read(choice: Choice) -> None:
            try:
                for part in choice.begin():
                    await queue.put(part)
                async with aclosing(choice.answer.__aiter__()) as pieces:
                    async for piece in pieces:
                        for part in choice.take(piece):
                            await queue.put(part)
                        if choice.enough:
                            break
                for part in choice.end():
                    await queue.put(part)
                await queue.put(done)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.ensure_future(read(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                part = await queue.get()
                if isinstance(part, Exception):
                    raise part
                if part is done:
                    left -= 1
                elif isinstance(part, dict):
                    yield part
        finally:
            self.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _whole(self) -> Json:
        choices = [choice.whole() for choice in self.choices]
        return {**self._envelope(self.kind.object), "choices": choices, "usage": self.usage()}

    def _chunk(self, part: Json | None) -> Json:
        chunk = {**self._envelope(self.kind.chunk_object), "choices": [] if part is None else [part]}
        if self.usage_chunk:
            chunk["usage"] = self.usage() if part is None else None
        return chunk

    def _envelope(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass
class Choice:
    """One answer on its way into a reply: pieces in, choices of chunks out, and at the end the whole choice."""

    answer: Answer
    tokenizer: Tokenizer
    index: int = 0
    prompt: int = 0  # which of the request's prompts it answers

    prefix = object = chunk_object = ""
    enough = False  # nothing more is wanted of the answer

    def begin(self) -> list[Json]:
        """What comes before the answer."""
        return []

    def take(self, piece: Piece) -> list[Json]:
        """What a piece of the answer adds."""
        raise NotImplementedError

    def end(self) -> list[Json]:
        """What comes after the answer."""
        raise NotImplementedError

    def whole(self) -> Json:
        """All that was given in parts, as one."""
        raise NotImplementedError

    def label(self, id: int) -> str:
        """A token as text; bytes that are no whole characters in OpenAI's notation: labels stay distinct."""
        if self.tokenizer.is_control(id):
            return self.tokenizer.token_text(id)
        data = self.tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class TextChoice(Choice):
    """A choice of a text completion. before: the prompt as text; echo: give it too; suffix: comes behind the answer."""

    before: str = ""
    echo: bool = False
    suffix: str = ""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        self._text: list[str] = []
        self._scores: list[TokenScore] = []  # of the prompt, where it is echoed, and of the answer
        self._n_prompt = 0
        self._begun = False

    def take(self, piece: Piece) -> list[Json]:
        return [*self._echo(), self._part(piece.text, piece.scores)]

    def end(self) -> list[Json]:
        last = self.answer.end_score  # the end token was chosen too: readers of log probabilities count it
        found = self._echo()
        if self.suffix:
            found.append(self._part(self.suffix, []))
        return [*found, self._part("", [last] if last else [], self.answer.finish_reason)]

    def whole(self) -> Json:
        logprobs = self._logprobs(self._scores, self._n_prompt)
        return self._shape("".join(self._text), logprobs, self.answer.finish_reason)

    def _echo(self) -> list[Json]:
        """The prompt, once; its scores are there when the answer begins."""
        if self._begun or not self.echo:
            return []
        self._begun = True
        self._n_prompt = len(self.answer.prompt_scores)
        return [self._part(self.before, self.answer.prompt_scores, n_prompt=self._n_prompt)]

    def _part(
        self, text: str, scores: Sequence[TokenScore], finish_reason: str | None = None, n_prompt: int = 0
    ) -> Json:
        self._text.append(text)
        self._scores.extend(scores)
        return self._shape(text, self._logprobs(scores, n_prompt) if scores else None, finish_reason)

    def _shape(self, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"text": text, "index": self.index, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, scores: Sequence[TokenScore], n_prompt: int) -> Json | None:
        if self.answer.request.logprobs is None:
            return None
        tops: list[dict[str, float] | None] = []
        for s in scores:
            top = None
            if s.logprob is not None:
                top = {self.label(i): logprob for i, logprob in s.top} | {self.label(s.id): s.logprob}
            tops.append(top)
        shift = len(self.before)
        return {
            "tokens": [self.label(s.id) for s in scores],
            "text_offset": [s.offset + (shift if i >= n_prompt else 0) for i, s in enumerate(scores)],
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": tops,
        }


@dataclass
class ChatChoice(Choice):
    """A choice of a chat completion. parser: finds calls of tools in the answer; several: more than one is wanted."""

    parser: ToolParser | None = None
    several: bool = True

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __post_init__(self) -> None:
        self._content: list[str] = []
        self._calls: list[Json] = []
        self._scores: list[TokenScore] = []
        self._unsaid: list[TokenScore] = []  # scores of text that the parser holds back

    def begin(self) -> list[Json]:
        return [self._part({"role": "assistant", "content": ""})]

    def take(self, piece: Piece) -> list[Json]:
        self._scores.extend(piece.scores)
        self._unsaid.extend(piece.scores)
        if self.parser is None:
            self._content.append(piece.text)
            return [self._part({"content": piece.text})]
        found = [delta for said in self.parser.push(piece.text) if (delta := self._delta(said)) is not None]
        self.enough = not self.several and self.parser.complete > 0
        return [self._part(delta) for delta in found]

    def end(self) -> list[Json]:
        left = [] if self.parser is None or self.enough else self.parser.finish()
        found = [self._part(delta) for said in left if (delta := self._delta(said)) is not None]
        return [*found, self._part({}, self._finish_reason())]

    def whole(self) -> Json:
        text = "".join(self._content)
        message: Json = {"role": "assistant", "content": text if text or not self._calls else None, "refusal": None}
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = self._logprobs(self._scores)
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self._finish_reason()}

    def _finish_reason(self) -> str:
        # an answer that was cut off within a call has not called
        return "tool_calls" if self._calls and self.answer.finish_reason != "length" else self.answer.finish_reason

    def _delta(self, said: Any) -> Json | None:
        """What the parser found, as a delta; None for what is not wanted."""
        if said.call is None:
            self._content.append(said.text)
            return {"content": said.text}
        if said.call and not self.several:
            return None
        if said.name:
            function = {"name": said.name, "arguments": said.text}
            self._calls.append({"id": said.id, "type": "function", "function": dict(function)})
            return {"tool_calls": [{"index": said.call, "id": said.id, "type": "function", "function": function}]}
        self._calls[said.call]["function"]["arguments"] += said.text
        return {"tool_calls": [{"index": said.call, "function": {"arguments": said.text}}]}

    def _part(self, delta: Json, finish_reason: str | None = None) -> Json:
        scores, self._unsaid = self._unsaid, []
        logprobs = self._logprobs(scores) if scores else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, scores: Sequence[TokenScore]) -> Json | None:
        if self.answer.request.logprobs is None:
            return None

        def entry(id: int, logprob: float | None) -> Json:
            return {"token": self.label(id), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(id))}

        content = [
            {**entry(s.id, s.logprob), "top_logprobs": [entry(i, logprob) for i, logprob in s.top]} for s in scores
        ]
        return {"content": content, "refusal": None}
