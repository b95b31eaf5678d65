"""The commands: what they print where, exit codes, and that no error ends in a traceback."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from typer.testing import CliRunner

from hotcold.formats.errors import HotcoldError, UnsupportedError
from hotcold.formats.gguf import GGUFFile
from hotcold.tools import bench, console, options, perplexity, show
from hotcold.tools.cli import app

HELLO = (fakes.HEL, fakes.LO)


def invoke(*arguments: str, input: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=input)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes the commands open an LLM that says Hello; the list gets the arguments and then the LLM."""
    opened: list[Any] = []

    @contextmanager
    def open_llm(*arguments: Any) -> Generator[Any, None, None]:
        llm = fakes.make(fakes.saying(*HELLO))
        opened.append((arguments, llm))
        yield llm

    monkeypatch.setattr(console, "open_llm", open_llm)
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
    result = invoke("run", "m", "-p", "x?", "--temp", "0", "-c", "77", "-t", "3")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
    assert fake_llm[0][0] == ("m", 77, 3)


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
        tokens = llm._session._sequence.tokens
        assert tokens[: len(text.encode()) + 1] == llm.tokenize(text)


def test_run_chat_and_stats(fake_llm: list[Any]) -> None:
    result = invoke("run", "m", "--chat", "-p", "hi", "--system", "s", "--temp", "0", "--stats")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.startswith("hotcold: prompt ") and "tok/s" in result.stderr
    llm = fake_llm[-1][1]
    prompt = llm.detokenize(llm._session._sequence.tokens, special=True)
    assert prompt.startswith("<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_run_limits_the_length(fake_llm: list[Any]) -> None:
    assert invoke("run", "m", "-p", "x?", "--temp", "0", "-n", "1").stdout == "Hel\n"


def test_run_parses_control_tokens_only_when_asked(fake_llm: list[Any]) -> None:
    for arguments, found in (([], False), (["--special"], True)):
        invoke("run", "m", "-p", "<|im_end|>x?", "--temp", "0", *arguments)
        assert (fakes.END in fake_llm[-1][1]._session._sequence.tokens) is found


def test_seed_repeats_the_text(fake_llm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def noise(*arguments: Any) -> Generator[Any, None, None]:
        yield fakes.make()

    monkeypatch.setattr(console, "open_llm", noise)
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


# bench


class FakeSide:
    """A side whose times are given; notes in which order it was asked."""

    def __init__(self, name: str, order: list[str], times: Sequence[float]) -> None:
        self.name, self.order, self.times = name, order, list(times)
        self.load_s, self.first_token_s = 1.0, 2.0

    def prompt(self, ids: list[int]) -> float:
        self.order.append(f"{self.name} prompt {len(ids)}")
        return self.times[0]

    def decode(self, first: int, n: int) -> float:
        self.order.append(f"{self.name} decode {n}")
        return self.times.pop(0)

    def peak_rss(self) -> int | None:
        return 5


def test_measure_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    order: list[str] = []
    sides = [FakeSide("a", order, [9, 1, 2, 4]), FakeSide("b", order, [9, 8, 8, 8])]
    ours, theirs = bench.measure(sides, [1] * 16, 32, 3)
    assert order == ["a prompt 16", "b prompt 16", "a decode 32", "b decode 32"] * 4
    assert (ours["prompt_tok_s"], ours["decode_tok_s"]) == (8.0, 16.0)
    assert (theirs["prompt_tok_s"], theirs["decode_tok_s"]) == (2.0, 4.0)
    assert (ours["load_s"], ours["first_token_s"], ours["peak_rss_bytes"]) == (1.0, 2.0, 5)


def test_token_ids_are_valid_and_always_the_same() -> None:
    ids = bench.token_ids(50, 1000)
    assert ids == bench.token_ids(50, 1000) and set(ids) == set(range(50))


def fake_engine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    class Engine(fakes.FakeEngine):
        def __init__(self, path: Path, *, n_ctx: int, n_threads: int | None, progress: Any) -> None:
            super().__init__(lambda tokens: None, n_ctx)
            self.n_threads = n_threads or 2
            made.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    monkeypatch.setattr("hotcold.runtime.engine.Engine", Engine)
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    return made


# As much of llama_cpp as the child process calls; it "computes" the next token as the sum of all so far.
PEER = """
import ctypes, os, types
__version__ = "0"
llama_token = ctypes.c_int32
print("noise on stdout that is no reply")
class Context:
    tokens = ()
def llama_model_default_params(): return types.SimpleNamespace()
def llama_context_default_params(): return types.SimpleNamespace()
def llama_model_load_from_file(path, params): return None if b"broken" in path else "model"
def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch == 2 and params.n_ctx == 256
    return Context()
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return 8
def llama_get_memory(context): return context
def llama_memory_clear(context, data): context.tokens = ()
def llama_batch_get_one(array, n): return list(array)
def llama_decode(context, batch):
    context.tokens += tuple(batch)
    return 0
def llama_get_logits_ith(context, i):
    row = (ctypes.c_float * 8)()
    row[sum(context.tokens) % 8] = 1
    return ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
def llama_log_callback(function): return function
def llama_log_set(callback, data): pass
def llama_backend_init(): print("more noise", flush=True)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_bench_json(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    fake_engine(monkeypatch)
    result = invoke("bench", str(tiny_model()), "-p", "20", "-n", "4", "-r", "2", "-t", "2", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"] == str(tiny_model()) and report["threads"] == 2
    for key in ("prompt_tok_s", "decode_tok_s", "load_s", "first_token_s"):
        assert report[key] > 0
    assert report["peak_rss_bytes"] is None or report["peak_rss_bytes"] > 1 << 20
    assert "peer" not in report


def test_bench_evaluates_what_it_says(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    made = fake_engine(monkeypatch)
    result = invoke("bench", str(tiny_model()), "-p", "20", "-n", "4", "-r", "2")
    assert result.exit_code == 0 and "prompt 20 (tok/s)" in result.stdout
    assert made[0].calls == [8] + [20, 1, 1, 1, 1] * 3 and made[0].n_ctx == 256 and made[0].closed


def test_bench_against(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], peer: None) -> None:
    fake_engine(monkeypatch)
    arguments = [
        "bench",
        str(tiny_model()),
        "-p",
        "20",
        "-n",
        "4",
        "-r",
        "1",
        "--against",
        "llama-cpp-python",
    ]
    report = json.loads(invoke(*arguments, "--json").stdout)
    keys = {"model", "threads", "prompt_tok_s", "decode_tok_s", "load_s", "first_token_s", "peak_rss_bytes"}
    assert keys <= set(report["peer"]) and report["peer"]["prompt_tok_s"] > 0
    assert report["ratio"]["prompt"] == report["prompt_tok_s"] / report["peer"]["prompt_tok_s"]
    assert report["ratio"]["decode"] == report["decode_tok_s"] / report["peer"]["decode_tok_s"]
    table = invoke(*arguments, "--peer-python", sys.executable).stdout
    assert "llama-cpp-python" in table and "x\n" in table


def test_the_peer_decodes_greedily(peer: None) -> None:
    theirs = bench.Theirs(Path(sys.executable), Path("model.gguf"), 256, 2, 8)
    try:
        assert theirs.load_s <= theirs.first_token_s
        assert theirs.prompt([1, 2, 3]) > 0 and theirs.decode(1, 5) > 0
    finally:
        theirs.close()
    assert theirs.process.returncode is not None


@pytest.mark.parametrize(
    ("python", "model", "says"),
    [
        (sys.executable, "broken.gguf", "could not load"),
        (str(Path(__file__)), "m.gguf", "wanted an interpreter"),
        ("nosuch-python", "m.gguf", "wanted an interpreter"),
    ],
)
def test_a_peer_that_does_not_work(peer: None, python: str, model: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        bench.Theirs(Path(python), Path(model), 256, 2, 8)


def test_a_python_without_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no llama here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no llama here; install it there"):
        bench.Theirs(Path(sys.executable), Path("m.gguf"), 256, 2, 8)


# perplexity


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
    def open_engine(*arguments: Any) -> Generator[Any, None, None]:
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


# the console


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
