"""The REPL with a simulated keyboard, and chat in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Generator
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
from talks import HELLO, make_talk, roles

from hotcold.tools import chat, fence, gpu
from hotcold.tools.commands import CommandCompleter
from hotcold.tools.conversation import Conversation


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
    assert fence.fence_open(text) is open_


@pytest.mark.parametrize(("line", "message"), [("a", "a"), ('"""a\nb"""', "a\nb"), ('"""\na\n"""', "a"), ("//x", "/x")])
def test_unfenced(line: str, message: str) -> None:
    assert fence.unfenced(line) == message


# Piped


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes the commands open the scripted model; the list gets the arguments they open it with."""
    opened: list[Any] = []

    @contextmanager
    def open_llm(*arguments: Any, lookup: int, **settings: Any) -> Generator[Any, None, None]:
        opened.append(arguments)
        yield fakes.make(fakes.saying(*HELLO))

    monkeypatch.setattr(gpu, "open_llm", open_llm)
    return opened


def test_piped_chat_answers_once(fake_llm: list[Any]) -> None:
    from typer.testing import CliRunner

    from hotcold.tools.cli import app

    result = CliRunner().invoke(app, ["chat", "--temp", "0", "-t", "1", "-c", "99"], input="hi\nthere\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert fake_llm == [("smollm2", 99, 1, "auto", gpu.GPUOptions(), [], None)]


def test_piped_nothing_is_an_error(fake_llm: list[Any]) -> None:
    from typer.testing import CliRunner

    from hotcold.tools.cli import app

    result = CliRunner().invoke(app, ["chat"], input=" \n")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("hotcold: error: stdin: got nothing") and result.stderr.count("\n") == 1
