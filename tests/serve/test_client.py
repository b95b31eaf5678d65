"""The official openai client, synchronous: completions and chats against what the library says by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from hotcold import LLM

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat and the hat"}]
PROMPT = "hello world in the"
NO_END = {"2": -100, "0": -100, "1": -100}  # the tiny model's control tokens


@pytest.fixture(scope="module")
def llm(served_model: Path) -> Iterator[LLM]:
    """The same model in this process: what one answer alone is."""
    with LLM(served_model, n_ctx=2048, n_threads=1, n_parallel=4) as opened:
        yield opened


def checked(found: Any) -> Any:
    """The reply, after the client's own types have validated every field of it (it skips that when it parses)."""
    return type(found).model_validate(found.to_dict(mode="json", exclude_unset=True), strict=False)


def test_models(client: openai.OpenAI, model: str) -> None:
    found = list(client.models.list())
    assert [m.id for m in found] == [model]
    one = client.models.retrieve(model)
    assert Model.model_validate(one.to_dict()) == one
    assert one.object == "model" and isinstance(one.created, int) and one.owned_by


def test_chat(client: openai.OpenAI, model: str, llm: LLM) -> None:
    found = client.chat.completions.create(model=model, messages=ASK, max_tokens=24, temperature=0)
    checked(found)
    assert isinstance(found, ChatCompletion) and found.object == "chat.completion" and found.model == model
    (choice,) = found.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content == llm.chat(ASK, max_tokens=24, temperature=0)
    alone = llm.create_chat_completion(ASK, max_tokens=24, temperature=0)
    assert choice.finish_reason == alone["choices"][0]["finish_reason"]
    assert found.usage is not None
    assert found.usage.prompt_tokens == alone["usage"]["prompt_tokens"]
    assert found.usage.completion_tokens == alone["usage"]["completion_tokens"]
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_completion(client: openai.OpenAI, model: str, llm: LLM) -> None:
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    checked(found)
    assert isinstance(found, Completion) and found.object == "text_completion"
    assert found.choices[0].text == llm.generate(PROMPT, max_tokens=24, temperature=0)


def test_max_completion_tokens(client: openai.OpenAI, model: str) -> None:
    """The newer name of max_tokens."""
    found = client.chat.completions.create(
        model=model, messages=ASK, max_completion_tokens=7, temperature=0, logit_bias=NO_END
    )
    assert found.usage is not None and found.usage.completion_tokens == 7
    assert found.choices[0].finish_reason == "length"


def test_completions_default_to_16_tokens(client: openai.OpenAI, model: str) -> None:
    found = client.completions.create(model=model, prompt=PROMPT, logit_bias=NO_END, seed=1)
    assert found.usage is not None and found.usage.completion_tokens == 16


def test_prompts_as_ids_and_in_lists(client: openai.OpenAI, model: str, llm: LLM) -> None:
    """A list of prompts gives one choice each, in their order; token ids stand for their text."""
    ids = llm.tokenize(PROMPT)
    other = llm.tokenize("the cat")
    options: dict[str, Any] = {"model": model, "max_tokens": 9, "temperature": 0}
    texts = [llm.generate(p, max_tokens=9, temperature=0) for p in (PROMPT, "the cat")]
    for prompt in ([PROMPT, "the cat"], [ids, other]):
        found = client.completions.create(prompt=prompt, **options)
        assert [c.index for c in sorted(found.choices, key=lambda c: c.index)] == [0, 1]
        assert [c.text for c in sorted(found.choices, key=lambda c: c.index)] == texts
        assert found.usage is not None and found.usage.prompt_tokens == len(ids) + len(other)
    assert client.completions.create(prompt=ids, **options).choices[0].text == texts[0]


def test_n(client: openai.OpenAI, model: str) -> None:
    """Several choices of one question differ at a temperature, and are equal without one."""
    options: dict[str, Any] = {"model": model, "messages": ASK, "max_tokens": 12, "n": 3, "logit_bias": NO_END}
    drawn = checked(client.chat.completions.create(temperature=1.5, seed=3, **options))
    assert [c.index for c in drawn.choices] == [0, 1, 2]
    assert len({c.message.content for c in drawn.choices}) == 3
    assert drawn.usage.completion_tokens == 36
    greedy = client.chat.completions.create(temperature=0, **options)
    assert len({c.message.content for c in greedy.choices}) == 1
    again = client.chat.completions.create(temperature=1.5, seed=3, **options)
    assert [c.message.content for c in again.choices] == [c.message.content for c in drawn.choices]


def test_seed(client: openai.OpenAI, model: str) -> None:
    def drawn(seed: int) -> str | None:
        found = client.chat.completions.create(
            model=model, messages=ASK, max_tokens=12, temperature=1.2, seed=seed, logit_bias=NO_END
        )
        return found.choices[0].message.content

    assert drawn(5) == drawn(5) != drawn(6)


def test_stop(client: openai.OpenAI, model: str) -> None:
    """The answer ends before a stop string, wherever it comes."""
    options: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 40,
        "temperature": 0,
        "logit_bias": NO_END,
    }
    whole = client.completions.create(**options).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    for wanted in (stop, ["no such text", stop]):
        found = client.completions.create(stop=wanted, **options).choices[0]
        assert found.text == whole[: whole.index(stop)] and found.finish_reason == "stop"


def test_logit_bias(client: openai.OpenAI, model: str, llm: LLM) -> None:
    (token,) = llm.tokenize("q")
    found = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=5, temperature=0, logit_bias={str(token): 100}
    )
    assert found.choices[0].text == "qqqqq"


def test_unknown_fields_are_tolerated(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model, messages=ASK, max_tokens=2, user="someone", store=False, service_tier="auto",
        metadata={"a": "b"}, extra_body={"no_such_field": {"deep": [1, None]}},
    )  # fmt: skip
    assert len(found.choices) == 1


def test_roles_and_parts(client: openai.OpenAI, model: str) -> None:
    """Content as a list of parts is the text of its parts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat "}, {"type": "text", "text": "sat"}]}]
    plain = [{"role": "user", "content": "the cat sat"}]
    answers = [
        client.chat.completions.create(model=model, messages=m, max_tokens=8, temperature=0) for m in (parts, plain)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_echo_and_logprobs(client: openai.OpenAI, model: str, llm: LLM) -> None:
    """Every token of prompt and answer with its log probability, which raw logits confirm."""
    ids = llm.tokenize(PROMPT)
    found = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, echo=True, logprobs=3, logit_bias=NO_END
    )
    choice = found.choices[0]
    scores = choice.logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.top_logprobs
    assert choice.text.startswith(PROMPT) and len(scores.tokens) == len(ids) + 6
    assert scores.token_logprobs[0] is None and scores.text_offset is not None and scores.text_offset[0] == 0
    expected = log_softmax(llm.logits(ids))
    for place, token in enumerate(ids[1:], 1):
        row = expected[place - 1]
        assert math.isclose(scores.token_logprobs[place], row[token], abs_tol=2e-3)
        best = sorted(row, reverse=True)[:3]
        got = sorted((scores.top_logprobs[place] or {}).values(), reverse=True)
        # the token itself stands among them, whether it is one of the best or not
        assert len(got) in (3, 4) and np.allclose(got[:3], best, atol=2e-3)


def test_echo_alone(client: openai.OpenAI, model: str, llm: LLM) -> None:
    """max_tokens 0 with echo only scores the prompt; 1 is what evaluation harnesses send."""
    for n in (0, 1):
        found = client.completions.create(
            model=model, prompt=[llm.tokenize(PROMPT)], max_tokens=n, temperature=0, echo=True, logprobs=1
        )
        scores = found.choices[0].logprobs
        assert scores is not None and scores.token_logprobs is not None
        assert len(scores.token_logprobs) == len(llm.tokenize(PROMPT)) + n


def test_chat_logprobs(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model, messages=ASK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2, logit_bias=NO_END
    )
    checked(found)
    scores = found.choices[0].logprobs
    assert scores is not None and scores.content is not None and len(scores.content) == 5
    for entry in scores.content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    data = b"".join(bytes(entry.bytes or []) for entry in scores.content)
    assert data.decode(errors="replace").startswith(found.choices[0].message.content or "")
