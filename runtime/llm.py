"""LLM: text in, text out, over one engine; the class that `from hotcold import LLM` gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..formats.chat_template import ChatTemplate, load_template
from ..formats.errors import ClosedError, ContextLengthError, FormatError, ParameterError, UnsupportedError
from ..formats.tokenizer import Tokenizer, load_tokenizer
from .answer import Answer, Constraint, Processor, Request, check_callables, check_stop
from .chat_prompt import ChatPrompt, Messages
from .completions import Completions
from .cpu.layout import KV_BLOCK
from .embedding import Embedder
from .kv_types import KVTypes
from .sampler import SamplingParams, check_ids, check_int
from .scheduler import Scheduler
from .state import Stateful
from .stats import Stats
from .texts import Texts
from .turn import Turn

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from ..formats.section import Placement
    from .engine import Engine
    from .kv_cache import Sequence as Tokens
    from .lora import Wanted
    from .trace import Trace

_ROWS = 128  # rows of logits asked of the engine at once


class LLM(Texts, Completions, Embedder, Stateful):
    """A language model out of a GGUF file; `with LLM("model.gguf") as llm: print(llm.chat("Hello"))`.

    model: a path, or a name that runtime.models.resolve takes (alias, hf: reference), fetched if need be. n_ctx: tokens
    of context (None = the model's, capped by memory); n_threads: None = the machine's cores. seed: for calls that give
    none; None = a fresh one a call. sparsity: which FFN neurons are computed: auto (all that matter), dense, exact,
    threshold=D or predict. placement: what runs on the GPU (hotcold.place makes one); None: all runs on the CPU.
    n_parallel: answers that are computed at once, each with a context of n_ctx; n_queue: answers that may wait for
    that, past which BusyError is raised (None: any number). lookup: tokens to guess from the text so far for each that
    is chosen (prompt lookup): the model's own choices, in fewer steps where text repeats. lora: adapters (GGUF) as
    paths or pairs (path, scale); of a relufy adapter the merged model is opened, made the first time. load: copy the
    weights into memory in the form that is fastest (copy), read them where the file is mapped (mmap), or copy if memory
    allows (auto). cache_type_k, cache_type_v: keys and values are kept as f16, or in less memory, which changes answers
    a little, as q8_0 or q4_0. prompt_cache: a file of what prompts began with: taken up at the start if it is there,
    written by close(). trace: notes what ran when. progress: takes lines about slow steps (verbose sends them to
    stderr).

    The same prompt, settings, seed and form of the weights (load) give the same text, on a new LLM and on one that
    answered other prompts before, alone and among other answers. Two things round otherwise. A prompt that goes on
    after an answer takes that answer's tokens from the cache, where they were computed one by one: the same bits with
    copied weights, but not with mapped or float ones. And with sparse FFNs tokens of one step share a list of neurons.

    Any number of threads and tasks may call. A stream is computed as it is read, at most answer.UNREAD pieces ahead;
    one that nobody reads gives its place to others.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        seed: int | None = None,
        sparsity: str = "auto",
        placement: Placement | None = None,
        n_parallel: int = 1,
        n_queue: int | None = None,
        lookup: int = 0,
        trace: Trace | None = None,
        lora: Wanted = (),
        load: str = "auto",
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        prompt_cache: str | Path | None = None,
        verbose: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads)):
            if value is not None:
                check_int(name, value, 1)
        serving = _check_serving(n_parallel, n_queue, lookup)
        KVTypes.parse(cache_type_k, cache_type_v)
        if not isinstance(model, (str, Path)):
            raise ParameterError(f"model: got {type(model).__name__}, wanted a path or a model name")
        chosen_seed = SamplingParams(seed=seed).seed
        # what these bring takes time, which neither `import` nor a wrong argument should cost
        from .models import resolve

        report = progress or (_to_stderr if verbose else None)
        path = resolve(model, _by_step(report) if report else None)
        from .engine import Engine

        engine = Engine(
            path,
            n_ctx=n_ctx,
            n_threads=n_threads,
            sparsity=sparsity,
            placement=placement,
            n_parallel=n_parallel,
            trace=trace,
            lora=lora,
            load=load,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            progress=report,
        )
        try:
            self._attach(engine, load_tokenizer(engine.file), None, chosen_seed, str(model), serving)
            self._use_prompt_cache(prompt_cache)
        except BaseException:
            engine.close()
            raise

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        seed: int | None = None,
        n_parallel: int = 1,
        n_queue: int | None = None,
        lookup: int = 0,
    ) -> LLM:
        """An LLM around an engine that is open already, for n_parallel sequences; it owns the engine from then on."""
        llm = cls.__new__(cls)
        llm._attach(
            engine,
            tokenizer or load_tokenizer(engine.file),
            template,
            SamplingParams(seed=seed).seed,
            str(engine.file.path),
            _check_serving(n_parallel, n_queue, lookup),
        )
        return llm

    def _attach(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        seed: int | None,
        model: str,
        serving: tuple[int, int | None, int],
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, model
        self.config: ModelConfig = engine.config
        self._template = template
        self._chat_prompt: ChatPrompt | None = None
        try:
            SamplingParams.from_metadata(self.config.sampling)
        except ParameterError as error:
            name, _, problem = str(error).partition(": got ")
            got, _, wanted = problem.partition(", wanted ")
            raise FormatError(engine.file.path, f"general.sampling ({name})", got, wanted) from error
        self._seed = seed
        self.scheduler = Scheduler(engine, *serving)
        self.embedding = Turn()
        self._last: Stats | None = None  # not the answer, which ends when nobody holds it

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template, or ChatML (with a warning) where it has none; loaded on first use."""
        if self._template is None:
            self._template = load_template(self.engine.file)
        return self._template

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may take together."""
        return self.engine.n_ctx

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary, which is the length of a row of logits."""
        return self.engine.n_vocab

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self.scheduler.closed

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text; add_bos: with BOS where the model wants one; special: parse control tokens."""
        self._check_open()
        return self.tokenizer.encode(text, add_bos=None if add_bos else False, special=special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special: with control tokens."""
        self._check_open()
        return self.tokenizer.decode(check_ids(ids, self.n_vocab), special=special)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Raw next-token scores, a fresh float32 array (len(ids), n_vocab); the context starts with `ids`."""
        self._check_open()
        checked = check_ids(ids, self.n_vocab)
        if len(checked) > self.n_ctx:
            raise ContextLengthError(
                f"token ids: got {len(checked)} tokens, and the context holds n_ctx = {self.n_ctx}; "
                "pass fewer or open the model with a larger n_ctx"
            )
        found = np.empty((len(checked), self.n_vocab), np.float32)
        with self.embedding, self._guest(len(checked)) as sequence:
            for start in range(0, len(checked), _ROWS):
                part = checked[start : start + _ROWS]
                with self.scheduler.exclusive() as engine:  # others have their steps in between
                    found[start : start + len(part)] = engine.eval_batch([(sequence, part)], [len(part)], by_rows=False)
        return found

    def stats(self) -> Stats:
        """Token counts and seconds of the answer asked for last (a stream's are complete when it has ended)."""
        return self._last or Stats(n_ctx=self.n_ctx)

    def close(self) -> None:
        """Wait for the step in progress, then free the model; streams end there, with ClosedError for their readers.

        The prompt cache is written before, if there is one; StorageError where it cannot be.
        """
        try:
            self._keep_prompt_cache()
        finally:
            self.scheduler.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"n_ctx={self.n_ctx}, n_threads={self.engine.n_threads}"
        return f"LLM({self.name!r}, {state})"

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(f"{self!r} cannot be copied or sent to another process; open the model there")

    def __enter__(self) -> LLM:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        stop: str | Sequence[str] | None = None,
        special: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stopping_criteria: Processor | Sequence[Processor] | None = None,
        constraint: Constraint | None = None,
        schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        fallback: Mapping[str, float] | None = None,
        **sampling: Any,
    ) -> Answer:
        """A checked, unstarted answer to a prompt, to be iterated over with `for` or `async for`.

        logprobs: how many alternatives to score for each token; prompt_logprobs: the prompt's tokens too. constraint:
        what may come next (grammar.py), for one answer; schema, regex, grammar: make one, as in `generate`. fallback:
        stands behind the file's sampling defaults.
        """
        self._check_open()
        params = SamplingParams.from_metadata({**(fallback or {}), **self.config.sampling}, **sampling)
        if params.seed is None and self._seed is not None:
            params = replace(params, seed=self._seed)
        if schema is not None or regex is not None or grammar is not None:
            from .grammar import constraint as make  # who asks for none shall not wait for it

            constraint = make(self.tokenizer, schema=schema, regex=regex, grammar=grammar)
        answer = Answer(
            self.scheduler,
            self.tokenizer,
            Request(
                ids=self._prompt_ids(prompt, special),
                params=params,
                max_tokens=max_tokens,
                stop=check_stop(stop),
                processors=check_callables("logits_processor", logits_processor),
                criteria=check_callables("stopping_criteria", stopping_criteria),
                constraint=constraint,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs and logprobs is not None,
            ),
        )
        self._last = answer.stats
        return answer

    def ask_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: list[Any] | None = None,
        logprobs: int | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        constraint: Constraint | None = None,
        fallback: Mapping[str, float] | None = None,
        **sampling: Any,
    ) -> Answer:
        """The same as `ask`, for the assistant's answer to a conversation."""
        self._check_open()
        if self._chat_prompt is None:
            self._chat_prompt = ChatPrompt(self.tokenizer, self.template, self._check_length)
        return self.ask(
            self._chat_prompt.encode(messages, tools),
            max_tokens,
            [*check_stop(stop), *self.template.stop_strings],
            logprobs=logprobs,
            logits_processor=logits_processor,
            constraint=constraint,
            fallback=fallback,
            **sampling,
        )

    @contextmanager
    def _guest(self, n_tokens: int) -> Iterator[Tokens]:
        """A sequence beside those of answers."""
        with self.scheduler.exclusive() as engine:
            sequence = engine.new_sequence(guest=n_tokens <= engine.cache.n_spare * KV_BLOCK)
        try:
            yield sequence
        finally:
            with self.scheduler.steps:
                sequence.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("LLM: used after close(); open the model again")

    def _check_length(self, n_characters: int) -> None:
        """ContextLengthError for a text that is too long however it is cut: tokenizing it could take minutes."""
        most = self.tokenizer.most_characters(self.n_ctx)
        if most is not None and n_characters > most:
            raise ContextLengthError(
                f"prompt: got {n_characters} characters, and the context of n_ctx = {self.n_ctx} tokens holds at most "
                f"{most}; shorten the prompt or open the model with a larger n_ctx"
            )

    def _prompt_ids(self, prompt: str | Sequence[int], special: bool) -> list[int]:
        if isinstance(prompt, str):
            self._check_length(len(prompt))
            ids = self.tokenizer.encode(prompt, special=special)
            # an EOS that the model wants after a text would end the prompt before the answer
            if self.tokenizer.add_eos and ids[-1:] == [self.tokenizer.eos_id]:
                ids.pop()
        elif prompt is None or isinstance(prompt, bytes):
            raise ParameterError(f"prompt: got {type(prompt).__name__}, wanted a text or a list of token ids")
        else:
            ids = check_ids(prompt, self.n_vocab)
        if not ids:
            first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            if first is None:
                raise ParameterError("prompt: got an empty one, and this model has no BOS token to start from")
            ids = [first]
        return ids


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _by_step(report: Callable[[str], None]) -> Callable[[str, int, int | None], None]:
    """Byte-by-byte progress of a download as one line for each step."""
    latest = ""

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal latest
        if what != latest:
            latest = what
            report(what)

    return progress


def _check_serving(n_parallel: int, n_queue: int | None, lookup: int) -> tuple[int, int | None, int]:
    """Scheduler's arguments, checked."""
    most = check_int("n_parallel", n_parallel, 1, 128)
    queue = None if n_queue is None else check_int("n_queue", n_queue, 0)
    return most, queue, check_int("lookup", lookup, 0, 16)
