"""OpenAI-shaped completions, with llama-cpp-python's names: plain dicts, or iterators of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..formats.errors import ParameterError, UnsupportedError
from ..formats.tokenizer import Tokenizer
from .answer import Answer, Piece, Processor, TokenScore
from .chat_prompt import Messages
from .sampler import check_int, reject_unknown

# Arguments of llama-cpp-python that change nothing at these values (None = at any) and are refused at others.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "tfs_z": (1.0,), "mirostat_mode": (0,), "mirostat_tau": None, "mirostat_eta": None, "grammar": (None,),
    "functions": (None,), "function_call": (None, "none"), "tool_choice": (None, "auto", "none"),
    "n": (1, None), "best_of": (1, None), "user": None, "stream_options": (None,),
}  # fmt: skip
_KNOWN = (
    "suffix", "max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty",
    "repeat_last_n", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stream", "echo",
    "logprobs", "top_logprobs", "logits_processor", "stopping_criteria", "model", "special", "tools",
    "response_format", *_NEUTRAL,
)  # fmt: skip


class Completions:
    """The part of LLM that answers in OpenAI's shapes; LLM supplies what is declared here."""

    tokenizer: Tokenizer
    name: str
    ask: Callable[..., Answer]
    ask_chat: Callable[..., Answer]

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        repeat_penalty: float | None = None,
        top_k: int | None = None,
        stream: bool = False,
        seed: int | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stopping_criteria: Processor | Sequence[Processor] | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        model: str | None = None,
        repeat_last_n: int | None = None,
        special: bool = False,
        **other: Any,
    ) -> Any:
        """Complete a prompt: a `text_completion` dict, or with stream=True an iterator of them.

        max_tokens None or <= 0: until the context is full. Sampling arguments left at None take the file's
        general.sampling.* or SamplingParams' defaults. special: parse control tokens in the prompt. suffix:
        appended to the text (no fill-in-the-middle).
        """
        _refuse_other(other)
        if suffix is not None and not isinstance(suffix, str):
            raise ParameterError(f"suffix: got {type(suffix).__name__}, wanted a text")
        if logprobs is not None:
            check_int("logprobs", logprobs, 0)
        answer = self.ask(
            prompt, _limit(max_tokens), stop, special,
            logprobs=logprobs, prompt_logprobs=bool(echo),
            logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, seed=seed,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        before = prompt if isinstance(prompt, str) else self.tokenizer.decode(answer.request.ids, special=True)
        reply = _Text(answer, self.tokenizer, model or self.name, before=before, echo=bool(echo), suffix=suffix or "")
        return reply.chunks() if stream else reply.whole()

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        repeat_penalty: float | None = None,
        model: str | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        repeat_last_n: int | None = None,
        **other: Any,
    ) -> Any:
        """Answer a conversation: a `chat.completion` dict, or with stream=True an iterator of chunks.

        As in llama-cpp-python the temperature defaults to 0.2 where the file says nothing. `tools` go to the
        chat template. response_format: only {"type": "text"}.
        """
        _refuse_other(other)
        if response_format is not None and dict(response_format) != {"type": "text"}:
            raise UnsupportedError(f"response_format: got {dict(response_format)}, supported is {{'type': 'text'}}")
        if top_logprobs is not None and check_int("top_logprobs", top_logprobs, 0) and not logprobs:
            raise ParameterError(f"top_logprobs: got {top_logprobs} without logprobs, wanted logprobs=True with it")
        answer = self.ask_chat(
            messages, _limit(max_tokens), stop, tools,
            logprobs=(top_logprobs or 0) if logprobs else None,
            logits_processor=logits_processor, fallback={"temp": 0.2},
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, seed=seed,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        reply = _Chat(answer, self.tokenizer, model or self.name)
        return reply.chunks() if stream else reply.whole()


def _limit(max_tokens: int | None) -> int | None:
    """llama-cpp-python's reading of max_tokens: none or <= 0 is no limit."""
    return None if max_tokens is None or check_int("max_tokens", max_tokens) <= 0 else max_tokens


def _refuse_other(other: Mapping[str, Any]) -> None:
    reject_unknown(other, _KNOWN)
    for name, value in other.items():
        if name not in _NEUTRAL:
            raise ParameterError(f"{name}: not an argument of this method")
        neutral = _NEUTRAL[name]
        if neutral is not None and value not in neutral:
            raise UnsupportedError(f"{name}: got {value!r}, and hotcold has no such feature; leave it out")


@dataclass
class _Reply:
    """What both shapes share: one answer, its id and its time."""

    answer: Answer
    tokenizer: Tokenizer
    model: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: int = field(default_factory=lambda: int(time.time()))

    def pieces(self) -> Generator[Piece, None, None]:
        with closing(iter(self.answer)) as pieces:
            yield from pieces

    def usage(self) -> dict[str, int]:
        asked, answered = len(self.answer.request.ids), len(self.answer.tokens)
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}

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
class _Text(_Reply):
    before: str = ""
    echo: bool = False
    suffix: str = ""

    def envelope(self, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {
            "id": f"cmpl-{self.id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }

    def whole(self) -> dict[str, Any]:
        with closing(self.pieces()) as pieces:
            found = list(pieces)
        text = "".join(piece.text for piece in found)
        scores = [score for piece in found for score in piece.scores]
        text = (self.before if self.echo else "") + text + self.suffix
        logprobs = self.logprobs(self.answer.prompt_scores if self.echo else [], scores)
        return {**self.envelope(text, logprobs, self.answer.finish_reason), "usage": self.usage()}

    def chunks(self) -> Generator[dict[str, Any], None, None]:
        echoed = not self.echo
        with closing(self.pieces()) as pieces:
            for piece in pieces:
                if not echoed:
                    echoed = True
                    yield self.envelope(self.before, self.logprobs(self.answer.prompt_scores, []), None)
                yield self.envelope(piece.text, self.logprobs([], piece.scores), None)
        if not echoed:
            yield self.envelope(self.before, self.logprobs(self.answer.prompt_scores, []), None)
        if self.suffix:
            yield self.envelope(self.suffix, None, None)
        yield self.envelope("", None, self.answer.finish_reason)

    def logprobs(self, prompt: Sequence[TokenScore], answer: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.answer.request.logprobs is None:
            return None
        scores = [*prompt, *answer]
        tops: list[dict[str, float] | None] = []
        for s in scores:
            top = None
            if s.logprob is not None:
                top = {self.label(i): logprob for i, logprob in s.top} | {self.label(s.id): s.logprob}
            tops.append(top)
        return {
            "tokens": [self.label(s.id) for s in scores],
            "text_offset": [s.offset for s in prompt] + [len(self.before) + s.offset for s in answer],
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": tops,
        }


class _Chat(_Reply):
    def envelope(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, **choice}],
        }

    def chunk(self, delta: dict[str, str], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.envelope("chat.completion.chunk", choice)

    def whole(self) -> dict[str, Any]:
        with closing(self.pieces()) as pieces:
            found = list(pieces)
        message = {"role": "assistant", "content": "".join(piece.text for piece in found)}
        logprobs = self.logprobs([score for piece in found for score in piece.scores])
        choice = {"message": message, "logprobs": logprobs, "finish_reason": self.answer.finish_reason}
        return {**self.envelope("chat.completion", choice), "usage": self.usage()}

    def chunks(self) -> Generator[dict[str, Any], None, None]:
        with closing(self.pieces()) as pieces:
            yield self.chunk({"role": "assistant"}, None, None)
            for piece in pieces:
                yield self.chunk({"content": piece.text}, self.logprobs(piece.scores), None)
        yield self.chunk({}, None, self.answer.finish_reason)

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.answer.request.logprobs is None:
            return None

        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            return {
                "token": self.label(id),
                "logprob": logprob,
                "bytes": list(self.tokenizer.token_bytes(id)),
            }

        content = [
            {**entry(s.id, s.logprob), "top_logprobs": [entry(i, logprob) for i, logprob in s.top]} for s in scores
        ]
        return {"content": content, "refusal": None}
