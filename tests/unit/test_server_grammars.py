"""Grammars that want much, sent to a server on which others are being answered."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fakes
import httpx
import pytest
from serving import USER, Serving, make, serving

from hotcold.runtime import grammar

N = 40  # tokens of the other client's answer


def ambiguous(n: int, start: str = "start: a*") -> str:
    """n rules, each of which reads what the others read."""
    lines = [f"b{i}: /[a-z ]{{1,{i % 7 + 1}}}/ a?" for i in range(n)]
    return "\n".join([start, "a: " + " | ".join(f"b{i}" for i in range(n)), *lines]) + "\n"


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"grammar": ambiguous(1500)}, "grammar"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar"),
    ({"grammar": "start: A\nA: ~/.*b.{25}/"}, "grammar"),
    ({"grammar": "root ::= " + "(" * 5000}, "grammar"),
    ({"regex": ".?" * 5000}, "regex"),
    ({"regex": "(a"}, "regex"),
    ({"response_format": {"type": "json_object", "schema": {"type": "string", "pattern": ".?" * 5000}}}, "response_"),
]
# taken or refused, as it comes
EXPENSIVE: list[dict[str, Any]] = [
    {"grammar": ambiguous(150)},
    {"grammar": ambiguous(150, 'start: "x" a*')},
    {"grammar": 'root ::= root root | "a" | ""'},
    {"regex": "(a|b)*a(a|b){200}"},
    {"regex": "(.*a){20}"},
    {"regex": "(a{1000}){1000}"},
]


@pytest.fixture
def stream() -> Iterator[tuple[Serving, threading.Event]]:
    """A server whose model goes on past the first token of a long answer when the event says so."""
    go = threading.Event()

    def next_token(tokens: list[int]) -> int:
        said = tokens.count(fakes.HEL)
        if said == 1:
            assert go.wait(60)
        return fakes.HEL if said < N else fakes.END

    with serving({"m": make(next_token, n_ctx=2000, n_parallel=3)}) as running:
        try:
            yield running, go
        finally:
            go.set()


def text_of(response: httpx.Response) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("body, name", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_refused_while_another_is_answered(
    stream: tuple[Serving, threading.Event], body: dict[str, Any], name: str
) -> None:
    running, go = stream
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(running.chat, stream=True, max_tokens=1000)
        refused = running.client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 5, **body})
        assert not other.done()  # it waits for us alone
        go.set()
        assert text_of(other.result()) == "Hel" * N
    assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(name)


def test_what_costs_much_is_answered_or_refused() -> None:
    llm = make(n_ctx=2000, n_parallel=3)
    with serving({"m": llm}) as running, ThreadPoolExecutor(len(EXPENSIVE)) as pool:
        asked = [pool.submit(running.chat, max_tokens=20, **body) for body in EXPENSIVE]
        assert running.chat(max_tokens=20).status_code == 200
        for found in asked:
            response = found.result()
            assert response.status_code in (200, 400)
            if response.status_code == 400:
                assert response.json()["error"]["message"].startswith(("grammar: ", "regex: "))
        assert running.chat(max_tokens=20).status_code == 200
        assert not llm.scheduler.running


def test_others_are_answered_while_a_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain answers, and those with grammars of their own."""
    begun, go, real = threading.Event(), threading.Event(), grammar._Grammars._compile

    def compile(self: Any, source: str, name: str) -> Any:
        if "slow" in source:
            begun.set()
            assert go.wait(60)
        return real(self, source, name)

    monkeypatch.setattr(grammar._Grammars, "_compile", compile)
    monkeypatch.setattr(grammar, "_COMPILE_S", 60.0)
    with serving({"m": make(n_ctx=2000, n_parallel=3)}) as running, ThreadPoolExecutor(1) as pool:
        try:
            slow = pool.submit(running.chat, regex="slow")
            assert begun.wait(60)
            assert running.chat(max_tokens=3).status_code == 200
            quick = running.chat(regex="quick").json()
            assert quick["choices"][0]["message"]["content"] == "quick" and not slow.done()
        finally:
            go.set()
        assert slow.result().json()["choices"][0]["message"]["content"] == "slow"
