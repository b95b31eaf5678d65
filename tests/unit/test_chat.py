"""Conversations and the REPL, over the scripted engine of fakes.py and a simulated keyboard."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from hotcold.formats.errors import ContextLengthError, FormatError, HotcoldError, ParameterError
from hotcold.tools import chat, console
from hotcold.tools.commands import CommandCompleter
from hotcold.tools.conversation import Conversation

HELLO = (fakes.HEL, fakes.LO)


def make_talk(next_token: Callable[[list[int]], int | None] | None = None, **options: Any) -> Conversation:
    llm = fakes.make(next_token or fakes.saying(*HELLO), **options)
    engine: Any = llm.engine
    engine.n_threads = 2
    engine.config.name = "fake model"
    return Conversation(llm, "fake.gguf", options={"temperature": 0.0})


def said(pieces: Iterator[str]) -> str:
    return "".join(pieces)


def roles(talk: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in talk.messages]


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


# The REPL


@pytest.fixture
def type_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """type_in(talk, text) -> what the REPL wrote until it left; "\\r" is Enter, "\\x04" Ctrl-D."""
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(talk: Conversation, text: str) -> str:
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(text)
            chat.Repl(talk).run()
        return capsys.readouterr().out

    return run


def test_repl_answers_and_leaves(type_in: Callable[..., str], tmp_path: Path) -> None:
    talk = make_talk()
    out = type_in(talk, "hi\r\x04")
    assert "fake model" in out and "Hello\n" in out
    assert roles(talk) == [("user", "hi"), ("assistant", "Hello")]
    assert "+hi" in (tmp_path / "home" / "history").read_text()
    assert "Hello" not in type_in(make_talk(), "/bye\rhi\r")


def test_repl_takes_several_lines(type_in: Callable[..., str]) -> None:
    talk = make_talk()
    type_in(talk, '"""one\rtwo\r"""\r\x04')
    assert roles(talk)[0] == ("user", "one\ntwo")


def test_repl_skips_empty_lines_and_escapes_slashes(type_in: Callable[..., str]) -> None:
    talk = make_talk()
    type_in(talk, "\r  \r//etc/passwd\r\x04")
    assert roles(talk)[0] == ("user", "/etc/passwd") and len(talk.messages) == 2


def test_ctrl_c_at_the_prompt_and_in_an_answer(type_in: Callable[..., str]) -> None:
    interrupted = False

    def script(tokens: list[int]) -> int:
        nonlocal interrupted
        chosen = fakes.saying(fakes.HEL, fakes.LO, fakes.WOR, fakes.LD)(tokens)
        if tokens[-1] == fakes.LO and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        return chosen

    talk = make_talk(script)
    out = type_in(talk, "\x03a\rb\r\x04")
    assert "/bye" in out and "Stopped." in out
    answers = [content for role, content in roles(talk) if role == "assistant"]
    assert answers == ["Hello", "Hello world"]


def test_commands(type_in: Callable[..., str], tmp_path: Path) -> None:
    talk = make_talk()
    file = tmp_path / "talk.json"
    out = type_in(
        talk,
        "/help\r/set parameter temperature 0.25\r/set system be kind\r/show parameters\r/show system\r"
        f"/show template\rhi\r/stats\r/save {file}\r/clear\r/load {file}\r/regen\r/bye\r",
    )
    assert "/set parameter NAME VALUE | system TEXT" in out and "/regen" in out
    assert "temperature is now 0.25" in out and "0.25  (set)" in out and "be kind" in out
    assert "<|im_start|>" in out and "tok/s" in out
    assert "Saved 2 messages" in out and "forgotten" in out and "Loaded 2 messages" in out
    assert out.count("Hello\n") == 2
    assert roles(talk) == [("user", "hi"), ("assistant", "Hello")]


def test_wrong_commands_only_say_so(type_in: Callable[..., str], tmp_path: Path) -> None:
    out = type_in(
        make_talk(),
        f"/hlep\r/regne\r/set\r/set parameter\r/set parameter x 1\r/show x\r/save\r/load\r/regen\r"
        f"/load {tmp_path / 'nosuch'}\r/save {tmp_path / 'no' / 'x'}\rhi\r\x04",
    )
    assert "Unknown command /hlep. /help lists them." in out
    assert "Unknown command /regne. Did you mean /regen?" in out
    assert out.count("error: ") == 9
    assert out.endswith("Hello\n\n")


def test_repl_survives_errors(type_in: Callable[..., str]) -> None:
    talk = make_talk(n_ctx=100)
    out = type_in(talk, "x" * 200 + "\rhi\r\x04")
    assert "error: prompt: got" in out and "Hello" in out


def test_repl_says_once_that_it_forgets(type_in: Callable[..., str]) -> None:
    talk = make_talk(n_ctx=300)
    out = type_in(talk, "a question\r" * 9 + "\x04")
    assert talk.dropped > 2 and out.count("outgrew the context") == 1


def test_repl_says_where_an_answer_was_cut(type_in: Callable[..., str]) -> None:
    talk = make_talk(lambda tokens: fakes.LO)
    talk.set_parameter("n_predict", "2")
    assert "Stopped at 2 tokens" in type_in(talk, "hi\r\x04")


def test_repl_says_when_the_context_is_full(type_in: Callable[..., str]) -> None:
    talk = make_talk(lambda tokens: fakes.LO, n_ctx=200)
    out = type_in(talk, "hi\rmore\r\x04")
    assert out.count("the context is full") == 2 and len(talk.messages) == 4


def test_control_characters_do_not_reach_the_terminal(type_in: Callable[..., str]) -> None:
    talk = make_talk(fakes.saying(ord("a"), 0x1B, ord("]"), 0x07, ord("b")))
    assert "a]b\n" in type_in(talk, "hi\r\x04")


def test_without_a_history_file(type_in: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path / "file" / "home"))
    assert "Hello" in type_in(make_talk(), "hi\r\x04")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/re", ["/regen"]),
        ("/set ", ["parameter", "system"]),
        ("/set parameter top", ["top_k", "top_p"]),
        ("/show t", ["template"]),
        ("hello", []),
        ("/save x", []),
    ],
)
def test_completion(typed: str, offered: list[str]) -> None:
    found = CommandCompleter().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == offered


@pytest.mark.parametrize(
    ("text", "open_"),
    [
        ("hi", False),
        ('"""', True),
        ('"""a', True),
        ('"""a"""', False),
        ('"""a\nb"""  ', False),
        ('a """', False),
    ],
)
def test_fences(text: str, open_: bool) -> None:
    assert chat.fence_open(text) is open_


@pytest.mark.parametrize(("line", "message"), [("a", "a"), ('"""a\nb"""', "a\nb"), ('"""\na\n"""', "a"), ("//x", "/x")])
def test_unfenced(line: str, message: str) -> None:
    assert chat.unfenced(line) == message


# Piped


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes the commands open the scripted model; the list gets the arguments they open it with."""
    opened: list[Any] = []

    @contextmanager
    def open_llm(*arguments: Any) -> Generator[Any, None, None]:
        opened.append(arguments)
        yield fakes.make(fakes.saying(*HELLO))

    monkeypatch.setattr(console, "open_llm", open_llm)
    return opened


def test_piped_chat_answers_once(fake_llm: list[Any]) -> None:
    from typer.testing import CliRunner

    from hotcold.tools.cli import app

    result = CliRunner().invoke(app, ["chat", "--temp", "0", "-t", "1", "-c", "99"], input="hi\nthere\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert fake_llm == [("smollm2", 99, 1)]


def test_piped_nothing_is_an_error(fake_llm: list[Any]) -> None:
    from typer.testing import CliRunner

    from hotcold.tools.cli import app

    result = CliRunner().invoke(app, ["chat"], input=" \n")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("hotcold: error: stdin: got nothing") and result.stderr.count("\n") == 1
