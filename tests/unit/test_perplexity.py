"""Perplexity against its definition, written down naively."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from typer.testing import CliRunner

from hotcold.formats.gguf import GGUFFile
from hotcold.solver import perplexity
from hotcold.tools import console
from hotcold.tools.cli import app


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


class Predictor:
    """An engine whose logits depend on the last two tokens alone."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        self.file, self.n_vocab = GGUFFile(path), n_vocab

    def new_sequence(self) -> fakes.FakeSequence:
        return fakes.FakeSequence()

    def row(self, tokens: list[int]) -> np.ndarray:
        return np.random.default_rng(tokens[-2:]).normal(0, 3, self.n_vocab).astype(np.float32)

    def eval(self, seq: fakes.FakeSequence, ids: list[int], all_logits: bool = False) -> np.ndarray:
        rows = []
        for token in ids:
            seq.tokens.append(token)
            rows.append(self.row(seq.tokens))
        return np.array(rows if all_logits else rows[-1:])


def naive_perplexity(engine: Predictor, ids: list[int], n_ctx: int, bos: int | None) -> tuple[float, float]:
    """(perplexity, its standard error), written down as the definition has it."""
    found = []
    for start in range(0, len(ids) - len(ids) % n_ctx, n_ctx):
        window = ids[start : start + n_ctx]
        if bos is not None:
            window[0] = bos
        for position in range(n_ctx // 2, n_ctx - 1):
            logits = engine.row(window[: position + 1]).astype(np.float64)
            found.append(np.log(np.exp(logits).sum()) - logits[window[position + 1]])
    value = math.exp(np.mean(found))
    return value, value * float(np.std(found)) / math.sqrt(len(found) - 1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
@pytest.mark.parametrize("budget", [128 << 20, 5000])
def test_perplexity(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    tokenizer: str,
    budget: int,
) -> None:
    path = tiny_model(tokenizer=tokenizer, n_vocab=320)
    engine = Predictor(path, 320)

    @contextmanager
    def open_engine(*arguments: Any, **settings: Any) -> Generator[Any, None, None]:
        yield engine

    monkeypatch.setattr(console, "open_engine", open_engine)
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", budget)
    text = "the hello world and a cat\nin a hat. " * 12
    (tmp_path / "text.txt").write_text(text)
    from hotcold.formats.tokenizer import load_tokenizer

    words = load_tokenizer(engine.file)
    wanted, error = naive_perplexity(engine, words.encode(text), 32, words.bos_id if words.add_bos else None)
    arguments = ["perplexity", str(path), str(tmp_path / "text.txt"), "-c", "32"]
    report = json.loads(invoke(*arguments, "--json").stdout)
    assert report["perplexity"] == pytest.approx(wanted, rel=1e-6)
    assert report["error"] == pytest.approx(error, rel=1e-5)
    assert report["chunks"] == len(words.encode(text)) // 32
    assert report["tokens_scored"] == report["chunks"] * 15
    result = invoke(*arguments, "--chunks", "2")
    assert result.exit_code == 0 and "2 windows of 32 tokens" in result.stdout and result.stderr == ""
    short = invoke("perplexity", str(path), str(tmp_path / "text.txt"), "-c", "512")
    assert short.exit_code == 1 and "wanted at least 1024" in short.stderr
