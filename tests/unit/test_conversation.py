"""Conversations: history, what still fits, parameters, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
from talks import HELLO, make_talk, roles, said

from hotcold.formats.errors import ContextLengthError, FormatError, HotcoldError, ParameterError


def test_turns_build_a_history() -> None:
    talk = make_talk()
    assert said(talk.ask("one")) == "Hello"
    assert said(talk.ask("two")) == "Hello"
    assert roles(talk) == [("user", "one"), ("assistant", "Hello"), ("user", "two"), ("assistant", "Hello")]
    assert talk.llm.stats().reused_tokens > 0
    talk.clear()
    assert talk.messages == []


def test_the_system_prompt_leads() -> None:
    prompts: list[str] = []
    talk = make_talk()
    talk.system = "be brief"
    real = talk.llm.template.render

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        prompts.append(real(messages, **options))
        return prompts[-1]

    talk.llm.template.render = render  # type: ignore[method-assign]
    said(talk.ask("x"))
    assert prompts[-1].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nx")


def test_an_answer_that_is_stopped_is_kept() -> None:
    talk = make_talk()
    pieces = talk.ask("x")
    assert next(pieces) == "Hel"
    pieces.close()
    assert roles(talk) == [("user", "x"), ("assistant", "Hel")]
    assert said(talk.ask("y")) == "Hello"


@pytest.mark.parametrize("problem", [KeyboardInterrupt, HotcoldError])
def test_a_question_without_any_answer_is_forgotten(problem: type[BaseException]) -> None:
    def fail(tokens: list[int]) -> int:
        raise problem("stop")

    talk = make_talk(fail)
    with pytest.raises(problem):
        said(talk.ask("x"))
    assert talk.messages == []


def test_regenerate_replaces_the_answer() -> None:
    talk = make_talk()
    with pytest.raises(ParameterError, match="nothing to answer"):
        said(talk.regenerate())
    said(talk.ask("x"))
    talk.messages[-1]["content"] = "old"
    assert said(talk.regenerate()) == "Hello"
    assert roles(talk) == [("user", "x"), ("assistant", "Hello")]


def test_a_failed_regeneration_keeps_the_old_answer() -> None:
    broken = False

    def script(tokens: list[int]) -> int:
        if broken:
            raise HotcoldError("no")
        return fakes.saying(*HELLO)(tokens)

    talk = make_talk(script)
    said(talk.ask("x"))
    broken = True
    with pytest.raises(HotcoldError):
        said(talk.regenerate())
    assert roles(talk) == [("user", "x"), ("assistant", "Hello")]


def test_an_empty_answer_is_an_answer() -> None:
    talk = make_talk(fakes.saying())
    assert said(talk.ask("x")) == ""
    assert roles(talk) == [("user", "x"), ("assistant", "")]


def test_n_predict_limits_an_answer() -> None:
    talk = make_talk(lambda tokens: fakes.LO)
    talk.set_parameter("n_predict", "3")
    assert said(talk.ask("x")) == "lololo"


def test_the_oldest_turns_make_room() -> None:
    talk = make_talk(n_ctx=300)
    for turn in range(9):
        assert said(talk.ask(f"question {turn}")) == "Hello"
    assert talk.dropped > 0 and talk.dropped % 2 == 0
    assert len(talk.messages) == 18  # all is there to be saved
    assert talk.llm.stats().context_used <= 300
    talk.clear()
    assert talk.dropped == 0


def test_a_message_longer_than_the_context_is_refused_and_forgotten() -> None:
    talk = make_talk(n_ctx=100)
    with pytest.raises(ContextLengthError):
        said(talk.ask("x" * 200))
    assert talk.messages == []
    assert said(talk.ask("x")) == "Hello"


def test_parameters_are_checked() -> None:
    talk = make_talk()
    talk.set_parameter("temp", "0.5")
    talk.set_parameter("top-k", "7")
    talk.set_parameter("num_predict", "9")
    assert talk.options == {"temperature": 0.5, "top_k": 7} and talk.n_predict == 9
    for name, value, says in [
        ("nosuch", "1", "wanted one of temperature"),
        ("top_k", "1.5", "a whole number"),
        ("temperature", "warm", "a number"),
        ("top_p", "7", "top_p"),
        ("n_predict", "-2", "n_predict"),
    ]:
        with pytest.raises(ParameterError, match=says):
            talk.set_parameter(name, value)
    assert talk.options == {"temperature": 0.5, "top_k": 7} and talk.n_predict == 9


def test_save_and_load(tmp_path: Path) -> None:
    talk = make_talk()
    talk.system = "söme"
    talk.set_parameter("top_k", "3")
    said(talk.ask("x"))
    talk.save(tmp_path / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    other = make_talk()
    other.load(tmp_path / "talk.json")
    assert (other.system, other.messages, other.parameters()) == (
        talk.system,
        talk.messages,
        talk.parameters(),
    )
    assert said(other.ask("y")) == "Hello"


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make_talk()
    talk.save(tmp_path / "talk.json")
    before = (tmp_path / "talk.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said(talk.ask("x"))
    with pytest.raises(OSError, match="No space"):
        talk.save(tmp_path / "talk.json")
    assert (tmp_path / "talk.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


GOOD = {"format": "hotcold-chat", "version": 1, "system": None, "parameters": {}, "messages": []}


@pytest.mark.parametrize(
    "data",
    [
        b"not json",
        b"[" * 100_000,
        b"[]",
        b"\xff\xfe",
        {**GOOD, "format": "other"},
        {**GOOD, "version": 2},
        {**GOOD, "system": 3},
        {**GOOD, "messages": "hi"},
        {**GOOD, "messages": [{"role": "user"}]},
        {**GOOD, "messages": [{"role": "root", "content": "x"}]},
        {**GOOD, "parameters": {"nosuch": 1}},
        {**GOOD, "parameters": {"top_k": "x"}},
        {**GOOD, "parameters": {"top_p": 7.0}},
        {**GOOD, "parameters": {"n_predict": 1.5}},
        {**GOOD, "parameters": []},
    ],
)
def test_load_refuses_what_save_does_not_write(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    talk = make_talk()
    said(talk.ask("x"))
    with pytest.raises(FormatError):
        talk.load(path)
    assert len(talk.messages) == 2 and talk.options == {"temperature": 0.0}
