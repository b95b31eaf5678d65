"""`--lora` and `--prompt-cache`: what they mean, what they do to an answer, what `inspect` says of an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import ATTENTION, make_adapter, matrices, merged
from typer.testing import CliRunner

from hotcold.tools.cli import app
from hotcold.tools.options import adapters


def test_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b=2").touch()
    given = ["a.gguf", "a.gguf=0.5", "a=b.gguf=-2", "a=b.gguf", "b=2", "=3"]
    assert adapters(given) == [
        (Path("a.gguf"), 1.0),
        (Path("a.gguf"), 0.5),
        (Path("a=b.gguf"), -2.0),
        (Path("a=b.gguf"), 1.0),
        (Path("b=2"), 1.0),
        (Path("=3"), 1.0),
    ]
    assert adapters(None) == []


def run(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_run_and_perplexity_with_adapters(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    whole = merged(model, tmp_path / "merged.gguf", (make_adapter(path, matrices(model), strength=1.0), 1.5))
    ask = ("-p", "hello the cat", "-n", "12", "--temp", "0", "-c", "64")
    wanted = run("run", str(whole), *ask)
    assert run("run", str(model), *ask, "--lora", f"{path}=0.5", "--lora", str(path)) == wanted
    assert run("run", str(model), *ask) != wanted
    text = tmp_path / "text.txt"
    text.write_text("the cat and the hello world " * 20)
    said = [
        json.loads(run("perplexity", *arguments, str(text), "-c", "32", "--json"))["perplexity"]
        for arguments in ((str(whole),), (str(model), "--lora", f"{path}=1.5"), (str(model),))
    ]
    assert said[1] == pytest.approx(said[0], rel=1e-3)
    assert said[2] != pytest.approx(said[0], rel=1e-2)


def test_a_wrong_adapter_is_one_line(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    make_adapter(tmp_path / "bad.gguf", {"blk.0.attn_q.weight": (64, 64)}, arch="qwen2")
    said = run("run", str(tiny_model()), "-p", "x", "--lora", str(tmp_path / "bad.gguf"), fails=True)
    assert said.count("\n") == 1 and "bad.gguf" in said and "'qwen2'" in said


def test_inspect_says_what_an_adapter_is(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    make_adapter(path, matrices(tiny_model(), ATTENTION), rank=3)
    said = run("inspect", str(path))
    assert "LoRA for llama models (--lora), rank 3, alpha 8" in said
    assert "8 matrices: attn_k, attn_output, attn_q, attn_v" in said
    assert json.loads(run("inspect", str(path), "--json"))["model"]["family"] == "llama"
    make_adapter(path, {"blk.0.attn_q.weight": (64, 64)}, kind="other")
    assert "not supported: key 'adapter.type'" in run("inspect", str(path))


def test_a_prompt_cache_from_run_to_run(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache"
    ask = ("run", str(model), "-p", "hello the cat " * 8, "-n", "8", "--temp", "0", "-c", "256", "--stats")
    cached = ("--prompt-cache", str(path))
    said = [run(*ask), run(*ask, *cached), run(*ask, *cached)]
    assert [line.count("(0 cached") for line in said] == [1, 1, 0]
    assert len({line.partition("prompt ")[0] for line in said}) == 1
    adapter = tmp_path / "adapter.gguf"
    make_adapter(adapter, matrices(model))
    wrong = run(*ask, *cached, "--lora", str(adapter), fails=True)
    assert wrong.count("\n") == 1 and "another model's, or one of other settings" in wrong
