"""What nobody should feed the commands: each gives one line on stderr and exit code 1, and no traceback."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hotcold import LLM
from hotcold.formats.errors import FormatError, HotcoldError, ModelNotFoundError, TemplateError, UnsupportedError
from hotcold.tools.cli import app

Make = Callable[..., Path]
COMMANDS = {
    "run": ["run", "{}", "-p", "hello the world and a cat"],
    "run --chat": ["run", "{}", "--chat", "-p", "hello the world and a cat"],
    "chat": ["chat", "{}"],
    "inspect": ["inspect", "{}"],
    "bench": ["bench", "{}"],
    "perplexity": ["perplexity", "{}", __file__],
}
TEMPLATES = {
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "escapes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "escapes by a global": ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    "is no Jinja": ("{% for message in messages %}", "line 1"),
    "never ends": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "turns"),
}


def refused(*arguments: str) -> str:
    """The one line that a command says, but for the progress of a first compilation."""
    result = CliRunner().invoke(app, list(arguments), input="hi")
    assert result.exit_code == 1 and result.stdout == "", result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hotcold: compiling kernels")]
    assert len(lines) == 1 and lines[0].startswith("hotcold: error: ")
    assert "a bug" not in lines[0] and "Traceback" not in lines[0]
    return lines[0]


def foreign(kind: str, folder: Path, model: bytes) -> Path:
    path = folder / f"{kind}.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.bin", model)
    else:
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        contents: dict[str, bytes] = {
            "empty": b"",
            "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
            "safetensors": struct.pack("<Q", len(header)) + header + bytes(8),
            "text": b"GGUF is a file format\n",
            "magic": model[:4],
            "half the header": model[:2000],
            "half the data": model[:-1000],
            "huge counts": model[:8] + struct.pack("<QQ", 2**63, 2**63) + model[24:],
            "version 1": model[:4] + struct.pack("<I", 1) + model[8:],
            "big-endian": model[:4] + struct.pack(">I", 3) + model[8:],
        }
        path.write_bytes(contents[kind])
    return path


FOREIGN = [
    "folder", "pipe", "zip", "empty", "png", "safetensors", "text", "magic", "half the header", "half the data",
    "huge counts", "version 1", "big-endian",
]  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(tiny_model: Make, tmp_path: Path, kind: str) -> None:
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    path = foreign(kind, tmp_path, tiny_model().read_bytes())
    for command in COMMANDS.values():
        assert path.name in refused(*(part.format(path) for part in command))
    with pytest.raises((FormatError, ModelNotFoundError, UnsupportedError)) as caught:
        LLM(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "nosuch.gguf", "nosuch", "a\0b", "hf:a", "a/b:c d"])
def test_names_that_lead_nowhere(name: str) -> None:
    assert "wanted" in refused("run", name, "-p", "x")
    with pytest.raises(ModelNotFoundError):
        LLM(name)


@pytest.mark.parametrize(("source", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates(tiny_model: Make, source: str, says: str) -> None:
    path = tiny_model(chat_template=source)
    for command in ("run --chat", "chat"):
        line = refused(*(part.format(path) for part in COMMANDS[command]), "-t", "1")
        assert line.startswith("hotcold: error: chat template") and says in line
    with LLM(path, n_threads=1) as llm:
        for call in (llm.chat, llm.stream_chat, llm.create_chat_completion):
            with pytest.raises(TemplateError, match=says):
                call("hi")  # type: ignore[operator]
        assert llm.generate("hello", max_tokens=1, temperature=0) is not None


def replaced(path: Path, target: Path, old: str, new: str) -> Path:
    """A copy of a file with one metadata string changed."""
    strings = [struct.pack("<Q", len(text)) + text.encode() for text in (old, new)]
    data = path.read_bytes()
    assert data.count(strings[0]) == 1
    target.write_bytes(data.replace(*strings))
    return target


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("llama", "gpt17", ["'gpt17'", "gptneox, granite, llama", "qwen2, qwen3"]),
        ("gpt2", "bert", ["tokenizer.ggml.model", "'bert'", "gpt2", "llama"]),
        ("gpt-2", "martian", ["tokenizer.ggml.pre", "'martian'", "llama-bpe"]),
    ],
)
def test_unknown_names_list_what_is_supported(
    tiny_model: Make, tmp_path: Path, old: str, new: str, says: list[str]
) -> None:
    # of the same length, so that the tensors stay aligned
    path = replaced(tiny_model(metadata={"padding": "x" * 40}), tmp_path / "odd.gguf", old, new)
    data = path.read_bytes()
    shift = len(new) - len(old)
    padding = struct.pack("<Q", 40) + b"x" * 40
    path.write_bytes(data.replace(padding, struct.pack("<Q", 40 - shift) + b"x" * (40 - shift)))
    for command in ("run", "chat", "perplexity"):
        line = refused(*(part.format(path) for part in COMMANDS[command]))
        assert all(text in line for text in ["odd.gguf", *says])
    with pytest.raises(UnsupportedError):
        LLM(path)


def test_a_prompt_longer_than_the_context(tiny_model: Make) -> None:
    path = tiny_model()
    for command in ("run", "run --chat", "chat"):
        line = refused(*(part.format(path) for part in COMMANDS[command]), "-c", "4", "-t", "1")
        assert "n_ctx = 4" in line and "shorten the prompt" in line
    with LLM(path, n_ctx=4, n_threads=1) as llm:
        calls: list[Callable[..., Any]] = [llm.generate, llm.stream, llm.chat, llm.create_completion]
        for call in calls:
            with pytest.raises(HotcoldError, match="n_ctx = 4"):
                call("hello world and a cat")
        assert llm.create_completion("he", max_tokens=9)["usage"]["total_tokens"] <= 4


def test_an_empty_prompt_starts_from_nothing(tiny_model: Make) -> None:
    path = str(tiny_model())
    options = ["-n", "2", "-t", "1", "--temp", "0"]
    assert CliRunner().invoke(app, ["run", path, "-p", "", *options]).exit_code == 0
    assert CliRunner().invoke(app, ["run", path, "--chat", "-p", "", *options]).exit_code == 0
    assert "wanted a message" in refused_when_empty("chat", path)
    with LLM(path, n_threads=1) as llm:
        texts = {llm.generate(prompt, max_tokens=4, temperature=0) for prompt in ("", [])}
    assert len(texts) == 1


def refused_when_empty(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), input="")
    assert result.exit_code == 1 and result.stdout == ""
    return str(result.stderr)


@pytest.mark.parametrize("below", ["", "below", "below/that"])
def test_cache_folders_that_are_files(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "file").write_text("precious")
    folder = tmp_path / "file" / below
    monkeypatch.setenv("HOTCOLD_HOME", str(folder))
    for arguments in (["pull", "smollm2"], ["run", "smollm2", "-p", "x"], ["chat", "smollm2"]):
        line = refused(*arguments)
        assert str(folder) in line and "HOTCOLD_HOME" in line
    monkeypatch.setenv("HOTCOLD_KERNEL_CACHE", str(folder))
    monkeypatch.setattr("hotcold.runtime.cpu.jit._loaded", {})
    line = refused("run", str(tiny_model()), "-p", "x")
    assert str(folder) in line and "HOTCOLD_KERNEL_CACHE" in line
    assert (tmp_path / "file").read_text() == "precious"
