"""The commands: what they print where, exit codes, and that no error ends in a traceback."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from hotcold.formats.errors import HotcoldError
from hotcold.formats.gguf import GGUFFile
from hotcold.tools import console, gpu, options, show
from hotcold.tools.cli import app

HELLO = (fakes.HEL, fakes.LO)


def invoke(*arguments: str, input: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=input)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes the commands open an LLM that says Hello; the list gets the arguments and then the LLM."""
    opened: list[Any] = []

    @contextmanager
    def open_llm(*arguments: Any, lookup: int, **settings: Any) -> Generator[Any, None, None]:
        llm = fakes.make(fakes.saying(*HELLO), lookup=lookup)
        opened.append(((*arguments, lookup), llm))
        yield llm

    monkeypatch.setattr(gpu, "open_llm", open_llm)
    return opened


def test_no_command_shows_help() -> None:
    result = invoke()
    assert result.exit_code == 0
    for name in ("chat", "run", "pull", "inspect", "bench", "perplexity"):
        assert f"\n  {name}" in result.stdout
        assert invoke(name, "--help").exit_code == 0


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, "hotcold 0.1.0\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["run"],
        ["run", "m", "-p", "x", "--temp", "-1"],
        ["run", "m", "-p", "x", "-f", "y"],
        ["run", "m", "-p", "x", "--system", "s"],
        ["run", "m", "-p", "x", "-t", "0"],
        ["bench", "m", "--against", "nosuch"],
        ["perplexity", "m"],
        ["chat", "m", "n"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nosuch.gguf", "-p", "x"],
        ["chat", "nosuch.gguf"],
        ["inspect", "nosuch.gguf"],
        ["bench", "nosuch.gguf"],
        ["pull", "nosuch"],
        ["inspect", __file__],
        ["run", "nosuch.gguf", "-f", "nosuch.txt"],
        ["perplexity", "nosuch.gguf", "nosuch.txt"],
    ],
)
def test_errors_are_one_line(arguments: list[str]) -> None:
    result = invoke(*arguments, input="hi")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("hotcold: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("problem", "code", "says"),
    [
        (HotcoldError("two\nlines"), 1, "hotcold: error: two lines\n"),
        (MemoryError(), 1, "hotcold: error: out of memory; try a shorter context (-c) or a smaller model\n"),
        (OSError(28, "No space left on device", "x.json"), 1, "error: x.json: No space left on device\n"),
        (RuntimeError("oops"), 1, "error: a bug: RuntimeError: oops; HOTCOLD_DEBUG=1 shows where"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_command_raises(monkeypatch: pytest.MonkeyPatch, problem: BaseException, code: int, says: str) -> None:
    def fail(name: str) -> Path:
        raise problem

    monkeypatch.setattr(console, "find_model", fail)
    result = invoke("inspect", "m")
    assert result.exit_code == code and result.stdout == ""
    assert says in result.stderr and bool(says) == bool(result.stderr)
    assert "Traceback" not in result.stderr
    if code == 1:
        monkeypatch.setenv("HOTCOLD_DEBUG", "1")
        assert "Traceback" in invoke("inspect", "m").stderr


def run_script(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    code = "import sys; from hotcold.tools.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_the_entry_point() -> None:
    done = run_script("inspect", "nosuch.gguf")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hotcold: error: nosuch.gguf: no such file")


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is an OSError of another kind there")
def test_a_closed_pipe_is_quiet(tiny_model: Callable[..., Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from hotcold.tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tiny_model())],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_starting_imports_little() -> None:
    code = (
        "import sys; import hotcold.tools.cli; "
        "heavy = {'rich', 'prompt_toolkit', 'huggingface_hub', 'numba', 'tokenizers', 'gguf', 'jinja2'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# run


def test_run_prints_only_the_text(fake_llm: list[Any]) -> None:
    options = ("--temp", "0", "-c", "77", "-t", "3", "--sparsity", "threshold=0.5")
    options += ("--vram-budget", "2GiB", "--require-gpu", "--cold", "mapped")
    result = invoke("run", "m", "-p", "x?", *options)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
    assert fake_llm[0][0] == ("m", 77, 3, "threshold=0.5", gpu.GPUOptions("2GiB", True, "mapped"), [], None, 0)


def test_run_reads_its_prompt_from_anywhere(fake_llm: list[Any], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("ü\xff?".encode() + b"\xff?")
    wanted = [("ü\xff?\ufffd?", ["-f", str(tmp_path / "prompt.txt")], None)]
    wanted += [
        ("piped?", ["-p", "-"], "piped?\n"),
        ("piped?", [], "piped?\n"),
        ("given?", ["-p", "given?"], ""),
    ]
    for text, arguments, piped in wanted:
        result = invoke("run", "m", "--temp", "0", *arguments, input=piped)
        assert (result.exit_code, result.stdout) == (0, "Hello\n")
        llm = fake_llm[-1][1]
        tokens = llm.engine.known[-1]
        assert tokens[: len(text.encode()) + 1] == llm.tokenize(text)


def test_run_chat_and_stats(fake_llm: list[Any]) -> None:
    result = invoke("run", "m", "--chat", "-p", "hi", "--system", "s", "--temp", "0", "--stats")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.startswith("hotcold: prompt ") and "tok/s" in result.stderr
    llm = fake_llm[-1][1]
    prompt = llm.detokenize(llm.engine.known[-1], special=True)
    assert prompt.startswith("<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_run_limits_the_length(fake_llm: list[Any]) -> None:
    assert invoke("run", "m", "-p", "x?", "--temp", "0", "-n", "1").stdout == "Hel\n"


def test_run_parses_control_tokens_only_when_asked(fake_llm: list[Any]) -> None:
    for arguments, found in (([], False), (["--special"], True)):
        invoke("run", "m", "-p", "<|im_end|>x?", "--temp", "0", *arguments)
        assert (fakes.END in fake_llm[-1][1].engine.known[-1]) is found


def test_seed_repeats_the_text(fake_llm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def noise(*arguments: Any, **serving: Any) -> Generator[Any, None, None]:
        yield fakes.make()

    monkeypatch.setattr(gpu, "open_llm", noise)
    texts = [invoke("run", "m", "-p", "x", "-n", "20", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_only_given_sampling_options_count() -> None:
    assert options.sampling(None, None, None, None, None, -1) == {}
    assert options.sampling(0.0, 3, 0.5, 0.1, 1.1, 7) == {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "seed": 7,
    }


# inspect


def test_inspect(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model(qtype="Q8_0", metadata={"general.author": "\x1b]0;evil\x07", "odd.value": math.nan})
    result = invoke("inspect", str(path))
    assert result.exit_code == 0
    assert "general.architecture" in result.stdout and '"llama"' in result.stdout
    assert "(300 in all)" in result.stdout and "\x1b" not in result.stdout
    assert "blk.1.ffn_down.weight" in result.stdout and "Q8_0" in result.stdout


def test_inspect_json(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model(qtype="Q8_0", metadata={"general.author": "\x1b]0;evil\x07", "odd.value": math.nan})
    report = json.loads(invoke("inspect", str(path), "--json").stdout)
    assert report["file"] == str(path) and report["file_bytes"] == path.stat().st_size
    assert report["metadata"]["odd.value"] == "nan"
    assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == 300
    assert report["metadata"]["general.architecture"] == "llama"
    embedding = report["tensors"][0]
    assert embedding["name"] == "token_embd.weight" and embedding["shape"] == [64, 300]
    assert embedding["type"] == "Q8_0" and embedding["bytes"] == 300 * 64 // 32 * 34
    assert report["parameters"] == sum(math.prod(tensor["shape"]) for tensor in report["tensors"])
    assert sum(total["bytes"] for total in report["types"].values()) == sum(
        tensor["bytes"] for tensor in report["tensors"]
    )
    assert 8.5 < report["bits_per_weight"] < 9.5
    with GGUFFile(path) as gguf:
        assert show.type_totals(gguf)["F32"][0] == 5


# with the real engine


def test_run_bench_and_perplexity_for_real(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = str(tiny_model())
    texts = [invoke("run", path, "-p", "hello", "-n", "8", "--temp", "0", "-t", "1") for _ in range(2)]
    assert texts[0].exit_code == 0, texts[0].stderr
    assert texts[0].stdout == texts[1].stdout
    report = json.loads(invoke("bench", path, "-p", "16", "-n", "2", "-r", "1", "-t", "1", "--json").stdout)
    assert report["prompt_tok_s"] > 0 and report["threads"] == 1
    (tmp_path / "text.txt").write_text("the hello world and a cat\n" * 10)
    arguments = ["perplexity", path, str(tmp_path / "text.txt"), "-c", "16", "-t", "1", "--json"]
    result = invoke(*arguments)
    assert 1 < json.loads(result.stdout)["perplexity"] < 10_000


def test_a_prompt_longer_than_the_context(tiny_model: Callable[..., Path]) -> None:
    result = invoke("run", str(tiny_model()), "-p", "x" * 100, "-c", "32", "-t", "1")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("hotcold: error: prompt: got")


def test_lookup_changes_the_speed_and_not_the_text(fake_llm: list[Any]) -> None:
    plain = invoke("run", "m", "-p", "Hello. Hello. Hello?", "--temp", "0", "--stats")
    guessing = invoke("run", "m", "-p", "Hello. Hello. Hello?", "--temp", "0", "--stats", "--lookup", "4")
    assert plain.stdout == guessing.stdout == "Hello\n" and "guesses" not in plain.stderr
    assert fake_llm[-1][0][-1] == 4
    assert invoke("run", "m", "-p", "x", "--lookup", "17").exit_code == 2
