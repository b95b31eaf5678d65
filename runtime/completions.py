"""LLM's answers in OpenAI's shapes: requests as OpenAI's API has them, and methods with llama-cpp-python's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..formats.chat_template import ChatTemplate
from ..formats.errors import ParameterError
from ..formats.tokenizer import Tokenizer
from .answer import Answer, Processor
from .chat_prompt import Messages
from .fields import MOST_CHOICES, MOST_TOP, Fields, check_other, split_prompts
from .replies import ChatChoice, Reply, TextChoice
from .sampler import check_int


class Completions:
    """The part of LLM that answers in OpenAI's shapes; LLM supplies what is declared here."""

    tokenizer: Tokenizer
    name: str
    ask: Callable[..., Answer]
    ask_chat: Callable[..., Answer]

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        raise NotImplementedError

    def open_completion(self, **request: Any) -> Reply:
        """The reply to a request to /v1/completions, checked and not started: its fields, as OpenAI documents them.

        prompt: a text, token ids, or a list of either. n answers to each; with a seed, answer i uses seed + i.
        max_tokens: 16 where it is missing, -1 = until the context is full, 0 = no answer (with echo and logprobs it
        scores the prompt). Beyond OpenAI's: top_k, min_p, typical_p, repeat_penalty, repeat_last_n, special (parse
        control tokens in the prompt), and schema, regex or grammar (see `generate`). None counts as missing; unknown
        fields are left alone. UnsupportedError for a suffix, which at OpenAI is text to insert before.
        """
        fields = Fields(request)
        fields.refuse("suffix", "hotcold cannot insert text before another; leave it out")
        return self._open_completion(fields)

    def _open_completion(self, fields: Fields, suffix: str = "") -> Reply:
        """suffix: comes behind each answer."""
        prompts, n = split_prompts(fields.required("prompt")), fields.count()
        _check_choices(len(prompts) * n)
        echo, special = fields.flag("echo"), fields.flag("special")
        asked = {
            "max_tokens": fields.limit("max_tokens", default=16),
            "stop": fields.stop(),
            "special": special,
            "logprobs": fields.integer("logprobs", 0, MOST_TOP),
            "prompt_logprobs": echo,
            "logits_processor": fields.any("logits_processor"),
            "stopping_criteria": fields.any("stopping_criteria"),
        }
        constraint = self._constraint(fields)
        usage_chunk, model = fields.usage_chunk(), fields.text("model") or self.name
        choices: list[TextChoice] = []
        for p, prompt in enumerate(prompts):
            for answer in self._answers(self.ask, prompt, n, constraint, asked, fields.sampling()):
                decoded = prompt if isinstance(prompt, str) else self.tokenizer.decode(answer.request.ids, special=True)
                choices.append(
                    TextChoice(answer, self.tokenizer, len(choices), p, before=decoded, echo=echo, suffix=suffix)
                )
        return Reply(choices, model, usage_chunk)

    def open_chat(self, **request: Any) -> Reply:
        """The reply to a request to /v1/chat/completions, checked and not started: its fields are OpenAI's.

        The same holds as for `open_completion`, but that max_tokens (or max_completion_tokens) is "until the context
        is full" where it is missing, and the temperature 0.2 where neither request nor file names one, as in
        llama-cpp-python. tools: go through the model's chat template where it knows them, else into the system
        message. Arguments fit a function's parameters where a call is forced, and where the function is strict and
        the model's format opens calls with a mark of its own (Llama's does not).
        """
        fields = Fields(request)
        messages, n = fields.required("messages"), fields.count()
        logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MOST_TOP)
        if top and not logprobs:
            raise ParameterError(f"top_logprobs: got {top} without logprobs, wanted logprobs=True with it")
        from .tool_calls import ToolParser, check_tools, force_calls, format_of, strict_calls
        from .tool_prompt import tool_prompt

        use = check_tools(fields.any("tools"), fields.any("tool_choice"), fields.any("parallel_tool_calls"))
        schema, wants_json = fields.response_format()
        form = format_of(self.template.source)
        if use.tools and (use.forced or wants_json):
            or_schema = None if use.forced else schema or {"type": "object"}
            constraint: Any = force_calls(self.tokenizer, use, form, or_schema)
        else:
            constraint = self._constraint(fields, schema, wants_json)
            constraint = constraint or strict_calls(self.tokenizer, use, form)
        messages, tools = tool_prompt(self.template).prepare(messages, use.tools)
        asked = {
            "max_tokens": fields.limit("max_completion_tokens", "max_tokens", default=None),
            "stop": fields.stop(),
            "tools": tools,
            "logprobs": (top or 0) if logprobs else None,
            "logits_processor": fields.any("logits_processor"),
            "fallback": {"temp": 0.2},
        }
        usage_chunk, model = fields.usage_chunk(), fields.text("model") or self.name
        answers = self._answers(self.ask_chat, messages, n, constraint, asked, fields.sampling())
        choices = [
            ChatChoice(
                answer, self.tokenizer, i, parser=ToolParser(use.names) if use.tools else None, several=use.several
            )
            for i, answer in enumerate(answers)
        ]
        return Reply(choices, model, usage_chunk)

    def create_completion(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
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
        grammar: str | None = None,
        **other: Any,
    ) -> Any:
        """Complete a prompt: a `text_completion` dict, or with stream=True an iterator of them.

        max_tokens None or <= 0: until the context is full. Sampling arguments left at None take the file's
        general.sampling.* or SamplingParams' defaults. special: parse control tokens in the prompt. suffix:
        appended to the text (no fill-in-the-middle). other: n, stream_options, schema, regex (see `open_completion`).
        """
        check_other(other, ("n", "best_of", "stream_options", "schema", "regex"))
        fields = Fields(dict(
            **other, prompt=_given(prompt, "prompt"), suffix=suffix, max_tokens=_limit(max_tokens), stop=stop,
            temperature=temperature, top_p=top_p, min_p=min_p, typical_p=typical_p, logprobs=logprobs, echo=echo,
            frequency_penalty=frequency_penalty, presence_penalty=presence_penalty, repeat_penalty=repeat_penalty,
            top_k=top_k, stream=stream, seed=seed, logits_processor=logits_processor, logit_bias=logit_bias,
            stopping_criteria=stopping_criteria, model=model, repeat_last_n=repeat_last_n, special=special,
            grammar=grammar,
        ))  # fmt: skip
        reply = self._open_completion(fields, fields.text("suffix"))
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
        tool_choice: str | Mapping[str, Any] | None = None,
        grammar: str | None = None,
        **other: Any,
    ) -> Any:
        """Answer a conversation: a `chat.completion` dict, or with stream=True an iterator of chunks.

        As in llama-cpp-python the temperature defaults to 0.2 where the file says nothing. response_format: OpenAI's,
        or {"type": "json_object", "schema": ...}. other: n, stream_options, parallel_tool_calls, max_completion_tokens,
        schema, regex (see `open_chat`).
        """
        check_other(other, ("n", "stream_options", "parallel_tool_calls", "max_completion_tokens", "schema", "regex"))
        reply = self.open_chat(
            **other, messages=_given(messages, "messages"), tools=tools, tool_choice=tool_choice, stop=stop, seed=seed,
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, typical_p=typical_p, stream=stream,
            response_format=response_format, max_tokens=_limit(max_tokens), presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, repeat_penalty=repeat_penalty, model=model, logprobs=logprobs,
            logits_processor=logits_processor, logit_bias=logit_bias, top_logprobs=top_logprobs,
            repeat_last_n=repeat_last_n, grammar=grammar,
        )  # fmt: skip
        return reply.chunks() if stream else reply.whole()

    def _answers(
        self,
        ask: Callable[..., Answer],
        prompt: Any,
        n: int,
        constraint: Any,
        asked: dict[str, Any],
        sampling: dict[str, Any],
    ) -> list[Answer]:
        """n answers to one prompt, which with a seed differ and come again."""
        found: list[Answer] = []
        for i in range(n):
            if i == 1:  # the prompt is rendered and cut once
                first = found[0].request
                ask, prompt = self.ask, first.ids
                asked = {**asked, "stop": first.stop}
                asked.pop("tools", None)
            seed = found[0].request.params.seed if found else None
            if seed is not None and seed >= 0:
                sampling = {**sampling, "seed": seed + i}
            try:
                found.append(ask(prompt, **asked, **sampling, constraint=constraint and constraint.copy()))
            except ParameterError as error:
                # LLM.tokenize and others have an argument of that name
                if str(error).startswith("token ids: "):
                    raise ParameterError(f"prompt: {error}") from None
                raise
        return found

    def _constraint(self, fields: Fields, schema: Any = None, wants_json: bool = False) -> Any:
        from .grammar import constraint

        if wants_json:
            name = "response_format"
            return constraint(self.tokenizer, schema=schema, json_object=schema is None, name=name)
        given = {name: fields.any(name) for name in ("schema", "regex", "grammar")}
        return constraint(self.tokenizer, **given)


def _check_choices(count: int) -> None:
    if count > MOST_CHOICES:
        raise ParameterError(f"n: got {count} answers in all, wanted at most {MOST_CHOICES}")


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise ParameterError(f"{name}: got NoneType, wanted a text or a list")
    return value


def _limit(max_tokens: int | None) -> int:
    """llama-cpp-python's reading of max_tokens: none or <= 0 is no limit, which requests write as -1."""
    return -1 if max_tokens is None or check_int("max_tokens", max_tokens) <= 0 else max_tokens
