"""What the commands share on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hotcold.tools import console


class Terminal:
    """A stderr that says whether it is a terminal and keeps what is written."""

    def __init__(self, live: bool) -> None:
        self.live, self.text = live, ""

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_status_line_updates_itself_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(live=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    status = console.StatusLine()
    status("compiling 1/2")
    status("compiling 2/2\x1b[31m")
    status.clear()
    status.clear()
    assert terminal.text == "\r\x1b[2Kcompiling 1/2\r\x1b[2Kcompiling 2/2[31m\r\x1b[2K"


def test_a_status_line_is_said_once_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Terminal(live=False)
    monkeypatch.setattr(sys, "stderr", log)
    status = console.StatusLine()
    status("compiling 1/2")
    status("compiling 2/2")
    status.clear()
    assert log.text == "hotcold: compiling 1/2 ...\n"


def wrapped(text: str, width: int, step: int = 3) -> str:
    out: list[str] = []
    wrap = console.WordWrap(out.append, width)
    for start in range(0, len(text), step):
        wrap.push(text[start : start + step])
    wrap.finish()
    return "".join(out)


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", "one two\nthree"),
        ("exactly8 x", "exactly8\nx"),
        ("a\n\n  indented", "a\n\n  indented"),
        ("unbreakable word", "unbreakable\nword"),
        ("日本語日本語", "日本語日\n本語"),
        ("tail  \nx", "tail\nx"),
    ],
)
def test_word_wrap(text: str, lines: str, step: int) -> None:
    assert wrapped(text, 8, step) == lines
    assert wrapped(text, 10_000, step) == text.replace("  \n", "\n")


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (98_362_432, "93.8 MiB"), (5 << 30, "5.00 GiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert console.human_bytes(count) == text


def test_find_model_says_what_it_fetches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hotcold.runtime import models

    def pull(name: str, progress: Any) -> Path:
        for done in range(3):
            progress("downloading x", done, 3)
        progress("verifying x", 1, None)
        return tmp_path

    monkeypatch.setattr(models, "pull", pull)
    monkeypatch.setenv("HOTCOLD_HOME", str(tmp_path))
    assert console.find_model("smollm2") == tmp_path
    assert capsys.readouterr().err == "hotcold: downloading x\nhotcold: verifying x\n"
