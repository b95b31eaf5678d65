"""OpenAI's shapes, and what the arguments of every call may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import (
    BOS,
    END,
    EU,
    HEL,
    LD,
    LO,
    N_VOCAB,
    RO,
    SMILE,
    STO,
    WOR,
    make,
    saying,
)

from hotcold.formats.errors import (
    FormatError,
    HotcoldError,
    ParameterError,
    UnsupportedError,
)
from hotcold.runtime.llm import LLM


def test_sampling_defaults_come_from_the_file() -> None:
    greedy = make(temp=0.0)
    assert greedy.generate("a", max_tokens=8) == greedy.generate("a", max_tokens=8)
    assert greedy.generate("a", max_tokens=8) == make().generate("a", max_tokens=8, temperature=0)
    asked = greedy.ask("a", 1, top_k=5, temperature=0.5).request.params
    assert (asked.temperature, asked.top_k, asked.top_p) == (0.5, 5, 0.95)
    assert make().ask_chat("a", 1, fallback={"temp": 0.2}).request.params.temperature == 0.2
    assert greedy.ask_chat("a", 1, fallback={"temp": 0.2}).request.params.temperature == 0.0
    with pytest.raises(FormatError, match="fake.gguf: general.sampling .top_p.: got 7"):
        make(top_p=7.0)


def test_logits_processors_and_criteria() -> None:
    llm = make(saying(HEL, LO, WOR))
    seen: list[list[int]] = []

    def no_lo(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.intc and scores.dtype == np.float32 and scores.shape == (N_VOCAB,)
        seen.append(ids.tolist())
        scores[LO] = -np.inf
        scores[LD] = 99
        return scores

    def end_after_two(ids: np.ndarray, scores: np.ndarray) -> bool:
        return len(ids) >= 4

    assert llm.generate("?", max_tokens=2, logits_processor=no_lo) == "ldld"
    assert seen == [[BOS, 63], [BOS, 63, LD]]
    reply = llm.create_completion("?", logits_processor=[no_lo], stopping_criteria=end_after_two)
    assert reply["choices"][0]["text"] == "ldld" and reply["choices"][0]["finish_reason"] == "stop"
    assert llm.generate("?", max_tokens=1, logit_bias={HEL: -100, SMILE: 200}) == "😀"
    with pytest.raises(ParameterError, match="logits_processor: got shape"):
        llm.generate("?", logits_processor=lambda ids, scores: scores[:5])
    with pytest.raises(HotcoldError, match="nan"):
        llm.generate("?", logits_processor=lambda ids, scores: scores * np.nan)
    assert llm.generate("?") == "Hello wor"


def test_completion_shape() -> None:
    llm = make(saying(HEL, LO))
    reply = llm.create_completion("Hi?", max_tokens=9)
    assert list(reply) == ["id", "object", "created", "model", "choices", "usage"]
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion"
    assert isinstance(reply["created"], int) and reply["model"] == "fake.gguf"
    assert reply["choices"] == [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert reply["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert llm("Hi?", max_tokens=1, model="m")["model"] == "m"
    assert llm("Hi?", max_tokens=1)["choices"][0]["finish_reason"] == "length"
    assert llm("Hi?", echo=True, suffix="!")["choices"][0]["text"] == "Hi?Hello!"
    chunks = list(llm.create_completion("Hi?", stream=True, echo=True))
    assert [c["choices"][0]["text"] for c in chunks] == ["Hi?", "Hel", "lo", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert len({c["id"] for c in chunks}) == 1 and "usage" not in chunks[0]


def test_completion_logprobs() -> None:
    llm = make(saying(HEL, EU, RO, STO))
    found = llm.create_completion("Hi?", logprobs=2, echo=True, max_tokens=9)["choices"][0]["logprobs"]
    assert found["tokens"] == ["<s>", "H", "i", "?", "Hel", "bytes:\\xe2\\x82", "bytes:\\xac", "STO", "<|im_end|>"]
    assert found["text_offset"] == [0, 0, 1, 2, 3, 6, 6, 7, 10]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    ids = [BOS, *b"Hi?", HEL, EU, RO, STO, END]
    for i in range(1, len(ids)):
        row = llm.engine.row(ids[:i]).astype(np.float64)  # type: ignore[attr-defined]
        logp = row - np.log(np.exp(row).sum())
        assert found["token_logprobs"][i] == pytest.approx(logp[ids[i]], abs=1e-4)
        assert max(found["top_logprobs"][i].values()) == pytest.approx(logp.max(), abs=1e-4)
        assert len(found["top_logprobs"][i]) in (2, 3)
        assert found["tokens"][i] in found["top_logprobs"][i]
    cut = llm.create_completion("Hi?", logprobs=0, stop="ST")["choices"][0]["logprobs"]
    assert cut["tokens"] == ["Hel", "bytes:\\xe2\\x82", "bytes:\\xac"] and len(cut["top_logprobs"][0]) == 1
    chunks = list(llm.create_completion("Hi?", logprobs=0, stop="ST", stream=True))
    assert [c["choices"][0]["logprobs"] and c["choices"][0]["logprobs"]["tokens"] for c in chunks] == [
        ["Hel"],
        ["bytes:\\xe2\\x82", "bytes:\\xac"],
        None,
    ]


def test_chat_completion_shape() -> None:
    llm = make(saying(HEL, LO))
    messages = [{"role": "user", "content": "Hi?"}]
    reply = llm.create_chat_completion(messages, logprobs=True, top_logprobs=1, response_format={"type": "text"})
    assert list(reply) == ["id", "object", "created", "model", "choices", "usage"]
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["index"] == 0 and choice["finish_reason"] == "stop"
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "Hel" and first["bytes"] == [72, 101, 108]
    assert first["top_logprobs"] == [{"token": "Hel", "logprob": first["logprob"], "bytes": [72, 101, 108]}]
    assert llm.create_chat_completion(messages)["choices"][0]["logprobs"] is None
    chunks = list(llm.create_chat_completion(messages, stream=True))
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.generate("a", max_token=3), "max_token: unknown argument; did you mean max_tokens"),
        (lambda m: m.generate("a", temp=3), "did you mean temperature"),
        (lambda m: m.generate("a", fallback={}), "fallback: unknown"),
        (lambda m: m.chat("a", special=True), "special: unknown"),
        (lambda m: m.chat("a", stream=True), "stream_chat"),
        (lambda m: m.generate("a", max_tokens=-5), "max_tokens: got -5"),
        (lambda m: m.generate("a", max_tokens="x"), "max_tokens: got 'x'"),
        (lambda m: m.generate("a", stop=[""]), "stop: got"),
        (lambda m: m.generate("a", stop=[1]), "stop: got"),
        (lambda m: m.generate("a", stop=5), "stop: got"),
        (lambda m: m.generate("a", top_p=2), "top_p: got 2"),
        (lambda m: m.generate("a", logits_processor=3), "logits_processor: got 3"),
        (lambda m: m.generate("a", logit_bias={9999: 1}), "logit_bias: got token id 9999"),
        (lambda m: m.generate([1, N_VOCAB]), f"token ids: got {N_VOCAB}, wanted 0 to {N_VOCAB - 1}"),
        (lambda m: m.generate([-1]), "token ids: got -1"),
        (lambda m: m.generate(["a"]), "token ids: got list"),
        (lambda m: m.generate([[1], [1, 2]]), "token ids: got list"),
        (lambda m: m.generate(None), "prompt: got NoneType, wanted a text"),
        (lambda m: m.logits("text"), "token ids: got str"),
        (lambda m: m.detokenize([99999]), "token ids: got 99999"),
        (lambda m: m.chat([]), "messages: got"),
        (lambda m: m.chat([{"content": "x"}]), r"messages\[0\]: got"),
        (lambda m: m.chat([{"role": "user", "content": 3}]), r"messages\[0\].content: got int"),
        (lambda m: m.create_completion("a", max_token=3), "did you mean max_tokens"),
        (lambda m: m.create_completion("a", tools=[]), "tools: not an argument"),
        (lambda m: m.create_completion("a", logprobs=-1), "logprobs: got -1"),
        (lambda m: m.create_completion("a", suffix=3), "suffix: got int"),
        (lambda m: m.create_chat_completion("a", top_logprobs=3), "logprobs=True"),
    ],
)
def test_bad_arguments_are_refused_at_once(call: Callable[[LLM], Any], message: str) -> None:
    llm = make(saying(HEL))
    with pytest.raises(ParameterError, match=message):
        call(llm)
    assert llm.generate("?") == "Hel"


def test_features_that_are_missing_say_so() -> None:
    llm = make(saying(HEL))
    with pytest.raises(UnsupportedError, match="mirostat_mode"):
        llm.create_completion("a?", mirostat_mode=2)
    assert llm.create_completion("a?", mirostat_mode=0, tfs_z=1.0, grammar=None)["choices"][0]["text"] == "Hel"
