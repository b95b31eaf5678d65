"""Replies: several answers, streams and their ends, limits of requests, and every wrong value."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import BOS, END, HEL, LD, LO, N_VOCAB, WOR, make, saying

from hotcold.formats.errors import BusyError, ContextLengthError, HotcoldError, ParameterError, UnsupportedError
from hotcold.runtime.llm import LLM
from hotcold.runtime.replies import Reply

NOISE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CHAT = {"messages": [{"role": "user", "content": "Hi?"}]}


def texts(reply: Any) -> list[str]:
    return [choice["text"] for choice in reply["choices"]]


def joined(chunks: list[dict[str, Any]], chat: bool = False) -> dict[int, str]:
    """Choice -> its text, out of the chunks of a stream."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["delta"].get("content", "") if chat else choice["text"]
            found[choice["index"]] = found.get(choice["index"], "") + text
    return found


async def collect(reply: Reply) -> list[dict[str, Any]]:
    return [chunk async for chunk in reply.achunks()]


def test_n_answers_differ_and_come_again() -> None:
    llm = make(n_parallel=3)
    asked = {"prompt": "a", "max_tokens": 12, "n": 3, "seed": 7, **NOISE}
    found = texts(llm.open_completion(**asked).whole())
    assert len(set(found)) == 3 and found == texts(llm.open_completion(**asked).whole())
    assert found == [llm.generate("a", max_tokens=12, seed=7 + i, **NOISE) for i in range(3)]
    # the seed of the LLM, too
    seeded = [texts(make(seed=7).open_completion(**{**asked, "seed": None}).whole()) for _ in range(2)]
    assert seeded == [found, found]
    free = texts(llm.open_completion(**{**asked, "seed": -1}).whole())
    assert len(set(free)) == 3


def test_many_prompts_are_numbered_as_openai_does() -> None:
    llm = make(saying(HEL, LO), n_parallel=2)
    reply = llm.open_completion(prompt=["A?", "B?"], n=2, echo=True).whole()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert texts(reply) == ["A?Hello", "A?Hello", "B?Hello", "B?Hello"]
    assert [reply["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [6, 8, 14]
    ids = llm.open_completion(prompt=[[65, 63], [66, 63]], echo=True).whole()
    assert texts(ids) == ["A?Hello", "B?Hello"] and ids["usage"]["prompt_tokens"] == 4
    for prompt in ([65, 63], (65, 63), np.array([65, 63])):
        assert texts(llm.open_completion(prompt=prompt, echo=True).whole()) == ["A?Hello"]
    assert texts(llm.open_completion(prompt=[np.array([65, 63])], echo=True).whole()) == ["A?Hello"]
    assert llm.open_completion(prompt=[]).choices[0].answer.request.ids == [BOS]
    again = llm.open_completion(prompt=["A?"] * 2, max_tokens=1).whole()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_streams_say_what_whole_replies_say(n_parallel: int) -> None:
    def new() -> LLM:
        return make(n_parallel=n_parallel)

    text = {"prompt": ["a", "b"], "n": 2, "seed": 1, "max_tokens": 80, "echo": True, "logprobs": 1, **NOISE}
    whole = new().open_completion(**text).whole()
    for chunks in (list(new().open_completion(**text).chunks()), asyncio.run(collect(new().open_completion(**text)))):
        assert joined(chunks) == dict(enumerate(texts(whole)))
        for choice in whole["choices"]:
            parts = [p for c in chunks for p in c["choices"] if p["index"] == choice["index"]]
            for key, values in choice["logprobs"].items():
                assert [v for p in parts for v in (p["logprobs"] or {}).get(key, [])] == values
            assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
    assert asyncio.run(new().open_completion(**text).awhole())["choices"] == whole["choices"]
    chat = {**CHAT, "n": 3, "seed": 1, "max_tokens": 60, "logprobs": True, "top_logprobs": 2, **NOISE}
    whole = new().open_chat(**chat).whole()
    for chunks in (list(new().open_chat(**chat).chunks()), asyncio.run(collect(new().open_chat(**chat)))):
        assert joined(chunks, chat=True) == {c["index"]: c["message"]["content"] for c in whole["choices"]}
        for choice in whole["choices"]:
            parts = [p for c in chunks for p in c["choices"] if p["index"] == choice["index"]]
            scores = [score for p in parts for score in (p["logprobs"] or {}).get("content", [])]
            assert scores == choice["logprobs"]["content"] and len(scores) > 0


def test_the_usage_chunk() -> None:
    llm = make(saying(HEL, LO))
    for reply in (llm.open_chat(**CHAT, stream=True, stream_options={"include_usage": True}),
                  llm.open_completion(prompt="Hi?", stream=True, stream_options={"include_usage": True})):  # fmt: skip
        *chunks, last = reply.chunks()
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 and last["id"] == chunks[0]["id"]
    assert all("usage" not in chunk for chunk in llm.open_chat(**CHAT, stream_options={}).chunks())


def test_scoring_a_prompt() -> None:
    """What harnesses ask that read log probabilities of a prompt's tokens."""
    llm = make(saying(END))
    ids = [BOS, 72, 105, 63]
    scored = llm.open_completion(prompt=[ids, ids[:3]], max_tokens=0, echo=True, logprobs=1, temperature=0).whole()
    assert [len(choice["logprobs"]["tokens"]) for choice in scored["choices"]] == [4, 3]
    assert scored["usage"]["completion_tokens"] == 0 and scored["choices"][0]["finish_reason"] == "length"
    logprobs = scored["choices"][0]["logprobs"]
    for i in range(1, 4):
        row = llm.engine.row(ids[:i]).astype(np.float64)  # type: ignore[attr-defined]
        row -= np.log(np.exp(row).sum())
        assert logprobs["token_logprobs"][i] == pytest.approx(row[ids[i]], abs=1e-3)
        assert max(logprobs["top_logprobs"][i].values()) == pytest.approx(row.max(), abs=1e-3)
    # with max_tokens=1 there is one token more, even if it ends the answer
    more = llm.open_completion(prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0).whole()["choices"][0]
    assert more["finish_reason"] == "stop" and more["logprobs"]["tokens"] == [*logprobs["tokens"], "<|im_end|>"]
    assert more["logprobs"]["token_logprobs"][:4] == logprobs["token_logprobs"]
    full = llm.open_completion(prompt="a" * 199, max_tokens=0, echo=True, logprobs=0)
    assert full.whole()["usage"]["prompt_tokens"] == 200
    with pytest.raises(ContextLengthError):
        llm.open_completion(prompt="a" * 199, max_tokens=1)


def test_limits() -> None:
    llm = make(saying(*[HEL] * 50), n_ctx=100)

    def length(method: Callable[..., Reply], **request: Any) -> int:
        return method(**request).whole()["usage"]["completion_tokens"]

    assert length(llm.open_completion, prompt="?") == 16 == length(llm.open_completion, prompt="?", max_tokens=None)
    assert length(llm.open_completion, prompt="?", max_tokens=-1) == 50
    assert length(llm.open_completion, prompt="?", max_tokens=0) == 0
    assert length(llm.open_chat, **CHAT) == 50 == length(llm.open_chat, **CHAT, max_tokens=-1)
    assert length(llm.open_chat, **CHAT, max_tokens=9, max_completion_tokens=3) == 3
    assert length(llm.open_chat, **CHAT, max_tokens=3) == 3
    for limit in (None, 0, -1, -7):
        assert llm.create_completion("?", max_tokens=limit)["usage"]["completion_tokens"] == 50


def test_a_reply_is_queued_as_one() -> None:
    llm = make(n_parallel=1, n_queue=1)
    assert len(texts(llm.open_completion(prompt=["a"] * 40, n=3, max_tokens=2).whole())) == 120
    waits = [llm.open_completion(prompt="a", n=n) for n in (5, 1)]
    for reply in waits:
        reply.start()
    late = llm.open_completion(prompt="a", n=2)
    with pytest.raises(BusyError):
        late.start()
    assert len(llm.scheduler.waiting) == 6  # nothing of the late one
    waits[0].choices[0].answer.close()  # the other four are still there
    with pytest.raises(BusyError):
        llm.open_completion(prompt="a").start()
    for reply in waits:
        reply.close()
    assert llm.create_completion("a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_streams_that_are_left() -> None:
    llm = make(n_parallel=2)
    chunks = llm.open_completion(prompt="a", n=2, max_tokens=100).chunks()
    next(chunks)
    chunks.close()
    assert not llm.scheduler.running and not llm.scheduler.waiting

    async def leave() -> None:
        reply = llm.open_chat(**CHAT, n=2, max_tokens=100)
        async for _ in reply.achunks():
            reply.close()
            break

    asyncio.run(leave())
    assert llm.create_completion("a", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert not llm.scheduler.running and not llm.scheduler.waiting


def test_an_error_reaches_the_reader() -> None:
    def broken(ids: Any, scores: Any) -> Any:
        return scores * np.nan if len(ids) > 6 else scores

    llm = make(n_parallel=2)
    for n in (1, 2):
        with pytest.raises(HotcoldError, match="nan"):
            llm.open_completion(prompt="a", n=n, max_tokens=50, logits_processor=broken).whole()
        with pytest.raises(HotcoldError, match="nan"):
            asyncio.run(collect(llm.open_completion(prompt="a", n=n, max_tokens=50, logits_processor=broken)))
    assert llm.create_completion("a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_response_formats() -> None:
    llm = make(n_ctx=2000)
    for form in (
        {"type": "json_object", "schema": {"enum": [{"a": 1}]}},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"enum": [{"a": 1}]}}},
    ):
        assert llm.open_chat(**CHAT, response_format=form).whole()["choices"][0]["message"]["content"] == '{"a": 1}'
    found = llm.open_chat(**CHAT, response_format={"type": "json_object"}, seed=1, **NOISE).whole()["choices"][0]
    assert found["message"]["content"].startswith("{")
    assert llm.open_chat(**CHAT, grammar='root ::= "yes"').whole()["choices"][0]["message"]["content"] == "yes"
    assert texts(llm.create_completion("?", regex="[ab]{3}", n=2, seed=1))[0].strip("ab") == ""


def test_unknown_fields_pass_and_known_ones_do_not() -> None:
    llm = make(saying(HEL))
    more = {"store": True, "metadata": {"a": 1}, "whatever": [1], "user": "me"}
    assert texts(llm.open_completion(prompt="?", **more).whole()) == ["Hel"]
    with pytest.raises(UnsupportedError, match="^mirostat_mode: got 2"):
        llm.open_completion(prompt="?", mirostat_mode=2)
    with pytest.raises(UnsupportedError, match="^best_of: got 3"):
        llm.open_completion(prompt="?", best_of=3)
    assert llm.open_completion(prompt="?", best_of=2, n=2)
    with pytest.raises(ParameterError, match="whatever: unknown argument"):
        llm.create_completion("?", whatever=1)
    with pytest.raises(ParameterError, match="echo: not an argument of this method"):
        llm.create_chat_completion("?", echo=True)


JUNK: list[Any] = [
    True, -1, 0, 10**400, -(10**400), 1.5, 1e308, float("nan"), float("inf"), "", "junk", "\ud800", b"x", [], [None],
    [[]], ["a", 1], [5, "a"], [[1], "a"], [1.5], [True], [{}], {}, {"a": 1}, {"type": "x"}, {"type": "json_schema"},
    {"9" * 30: 1}, {5: "x"}, {5: 10**400}, {10**9: 1}, object(), {1, 2}, lambda: 1, {"include_usage": "x"}, [[-1]],
    {"type": "function", "function": {"name": 5}}, {"type": "json_schema", "json_schema": {"schema": 5}}, [N_VOCAB],
    [["a"]], [10**400],
]  # fmt: skip
SHARED = [
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "n", "stream", "stream_options", "max_tokens", "logprobs",
    "model", "logits_processor", "schema", "regex", "grammar", "functions", "mirostat_mode", "best_of",
]  # fmt: skip
FIELDS = [("open_completion", name) for name in [*SHARED, "prompt", "suffix", "echo", "special", "stopping_criteria"]]
FIELDS += [
    ("open_chat", name)
    for name in [*SHARED, "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format",
                 "max_completion_tokens", "top_logprobs"]
]  # fmt: skip


@pytest.mark.parametrize("method, name", FIELDS)
def test_a_wrong_value_names_its_argument(method: str, name: str) -> None:
    """Either it is taken, and answered, or it is an error whose message begins with the argument's name."""
    llm = make(saying(HEL, LO, WOR, LD))
    base: dict[str, Any] = {"prompt": "Hi?"} if method == "open_completion" else dict(CHAT)
    base["max_tokens"] = 2
    if name == "top_logprobs":
        base["logprobs"] = True
    for junk in JUNK:
        if junk == "\ud800" and name in ("prompt", "messages"):
            continue  # real tokenizers replace it, the fake one does not
        try:
            reply = getattr(llm, method)(**{**base, name: junk})
        except (ParameterError, UnsupportedError) as error:
            assert str(error).startswith(name), (junk, error)
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        if not callable(junk):  # it is called, and what it raises is its own
            try:
                reply.whole()
            except ContextLengthError:
                raise
            except HotcoldError as error:
                assert str(error).startswith(name), (junk, error)


def test_two_wrong_values_at_a_time() -> None:
    llm = make(saying(HEL))
    rng = random.Random(5)
    names = [name for method, name in FIELDS if method == "open_chat"]
    for _ in range(300):
        request = {**CHAT, "max_tokens": 1, **{name: rng.choice(JUNK) for name in rng.sample(names, 2)}}
        try:
            llm.open_chat(**request)
        except (ParameterError, UnsupportedError, ContextLengthError):
            pass


@pytest.mark.parametrize("method", ["open_completion", "open_chat"])
def test_what_is_missing(method: str) -> None:
    with pytest.raises(ParameterError, match="^(prompt|messages): got none"):
        getattr(make(), method)()


def test_too_many() -> None:
    llm = make()
    with pytest.raises(ParameterError, match="^n: got 129"):
        llm.open_completion(prompt="a", n=129)
    with pytest.raises(ParameterError, match="^n: got 200 answers"):
        llm.open_completion(prompt=["a"] * 100, n=2)
    with pytest.raises(ParameterError, match="^prompt: got 5000 prompts"):
        llm.open_completion(prompt=["a"] * 5000)
    with pytest.raises(ParameterError, match="^stop: got 65 texts"):
        llm.open_chat(**CHAT, stop=["a"] * 65)
    with pytest.raises(ParameterError, match="^stop: got 1 texts"):
        llm.open_chat(**CHAT, stop="a" * 2000)
    with pytest.raises(ParameterError, match="^logprobs: got 101"):
        llm.open_completion(prompt="a", logprobs=101)


def test_a_suffix_is_no_text_to_insert_before() -> None:
    llm = make(saying(HEL, LO))
    with pytest.raises(UnsupportedError, match="^suffix: got 'end', and hotcold cannot insert"):
        llm.open_completion(prompt="?", suffix="end")
    assert texts(llm.open_completion(prompt="?", suffix="").whole()) == ["Hello"]
    assert texts(llm.create_completion("?", suffix="end")) == ["Helloend"]


@pytest.mark.parametrize("name, value, instead", [
    ("functions", [{"name": "x"}], "pass tools"), ("function_call", {"name": "x"}, "pass tool_choice"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["open_chat", "open_completion"])
def test_old_names_of_tools_are_refused(method: str, name: str, value: Any, instead: str) -> None:
    open_ = getattr(make(saying(HEL)), method)
    base: dict[str, Any] = {"prompt": "?"} if method == "open_completion" else dict(CHAT)
    with pytest.raises(UnsupportedError, match=f"^{name}: got .*; {instead}$"):
        open_(**base, **{name: value})
    for neutral in (None, [] if name == "functions" else "none"):
        assert open_(**base, **{name: neutral})
