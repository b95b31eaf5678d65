"""What the commands share on the terminal: progress lines, opening a model, safe printing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import ModelNotFoundError

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.models import Progress

CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}


def printable(text: str) -> str:
    """The text less control characters: what a model or a file says must not drive the terminal."""
    return text.translate(CONTROL)


def human_bytes(count: float) -> str:
    """A byte count in the unit that suits it, such as `93.8 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def note(text: str) -> None:
    """One line for the person, on stderr."""
    print(f"hotcold: {text}", file=sys.stderr, flush=True)


class WordWrap:
    """Streams text to a terminal of `width` cells so that lines break between words; `write` gets the pieces.

    A word is held back until it is whole. `column` is where the cursor is.
    """

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        from rich.cells import cell_len

        self.write, self.width, self.cells = write, width, cell_len
        self.column, self.gap, self.word = 0, "", ""

    def push(self, text: str) -> None:
        """Take the next piece of text."""
        for char in text:
            if char == "\n":
                self._end_word()
                self.write("\n")
                self.column, self.gap = 0, ""
            elif char in " \t":
                self._end_word()
                self.gap += char
            else:
                self.word += char
                # Lines may break after any of the wide characters of East Asian scripts.
                if self.cells(char) > 1:
                    self._end_word()

    def finish(self) -> None:
        """Write what was held back."""
        self._end_word()

    def drop(self) -> None:
        """Forget what was held back."""
        self.gap = self.word = ""

    def _end_word(self) -> None:
        if not self.word:
            return
        size = self.cells(self.word)
        if self.column > 0 and self.column + len(self.gap) + size > self.width:
            self.write("\n" + self.word)
            self.column = size
        else:
            self.write(self.gap + self.word)
            self.column += len(self.gap) + size
        self.gap = self.word = ""


class StatusLine:
    """Progress texts on stderr: one updating line on a terminal, else one line at the start."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.said = ""

    def __call__(self, text: str) -> None:
        if self.live:
            sys.stderr.write(f"\r\x1b[2K{printable(text)}")
            sys.stderr.flush()
            self.said = text
        elif not self.said:
            self.said = text
            note(f"{text} ...")

    def clear(self) -> None:
        if self.live and self.said:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
        self.said = ""


@contextmanager
def download_bar() -> Iterator[Progress]:
    """A progress callback for runtime.models: a rich bar on a terminal, a line per stage elsewhere."""
    if not sys.stderr.isatty():
        told: list[str] = []

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in told:
                told.append(what)
                note(what)

        yield tell
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def find_model(name: str) -> Path:
    """The file that `name` means, pulled with a progress bar when it is not here yet."""
    from ..runtime import models

    try:
        return models.resolve(name, download=False)  # without loading what draws bars
    except ModelNotFoundError:
        with download_bar() as progress:
            return models.resolve(name, progress)


def settled(
    path: Path, lora: Sequence[tuple[Path, float]], n_threads: int | None, status: StatusLine
) -> tuple[Path, Sequence[tuple[Path, float]]]:
    """The file to open for a model with adapters, which is another with a relufy adapter, and the adapters left."""
    if not lora:
        return path, lora
    from ..runtime.merged import settle

    def say(line: str) -> None:
        status.clear()
        note(printable(line))

    return settle(path, lora, n_threads, status, say)


@contextmanager
def open_engine(
    name: str,
    n_ctx: int | None,
    n_threads: int | None,
    sparsity: str = "auto",
    use_section: bool = True,
    lora: Sequence[tuple[Path, float]] = (),
    load: str = "auto",
    **more: Any,
) -> Iterator[Engine]:
    """The bare engine on the model `name`, as open_llm does it; more: Engine's own arguments."""
    path = find_model(name)
    status = StatusLine()
    try:
        from ..runtime.engine import Engine

        path, lora = settled(path, lora, n_threads, status)
        with Engine(
            path,
            n_ctx=n_ctx or None,
            n_threads=n_threads,
            sparsity=sparsity,
            use_section=use_section,
            lora=lora,
            load=load,
            progress=status,
            **more,
        ) as engine:
            status.clear()
            yield engine
    finally:
        status.clear()
