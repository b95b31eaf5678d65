"""Large pages: asked for where there are any, and no trouble where there are none."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from hotcold.formats import pages
from hotcold.formats.gguf import GGUFFile


class Mapping:
    def __init__(self, error: OSError | None = None) -> None:
        self.error, self.asked = error, list[int]()

    def madvise(self, advice: int) -> None:
        self.asked.append(advice)
        if self.error:
            raise self.error


def test_a_mapping_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    for mapping in (Mapping(), Mapping(OSError(22, "Invalid argument"))):
        pages.ask_for_large(mapping)  # type: ignore[arg-type]
        assert mapping.asked == [14]
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    other = Mapping()
    pages.ask_for_large(other)  # type: ignore[arg-type]
    assert other.asked == []


def test_every_model_file_asks(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[mmap.mmap] = []
    monkeypatch.setattr("hotcold.formats.gguf.ask_for_large", asked.append)
    with GGUFFile(tiny_model()):
        assert len(asked) == 1


def test_a_forgotten_file_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 10000)
    pages.forget(path)
    assert path.read_bytes() == b"abc" * 10000
    pages.forget(tmp_path / "not there")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    pages.forget(path)
    assert path.read_bytes() == b"abc" * 10000
