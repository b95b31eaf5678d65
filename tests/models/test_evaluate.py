"""`hotcold eval` on tiny models, against logits, activations and statistics that NumPy computes apart from it."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from typer.testing import CliRunner

from hotcold import Engine
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.formats.types import GGMLType
from hotcold.solver import conversations
from hotcold.solver.evaluate import CONVERSATIONS, Report, Row, _texts, evaluate
from hotcold.tools.cli import app

N_CTX, N_LAYER, N_EMBD, N_FF, RANK = 32, 2, 64, 96, 32
WORDS = "the hello world and a cat in a hat is on the other side of a sea. "
RELU = {"llama.hidden_activation": "relu"}
MakeModel = Callable[..., Path]


@dataclass
class Counted(naive.Model):
    """Counts the gates of a ReLU model above zero and the floor: int [n_layer, n_ff], and apart of the last tokens."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros((N_LAYER, N_FF), int))
    last: np.ndarray = field(default_factory=lambda: np.zeros((N_LAYER, N_FF), int))

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        on = self._linear(f"blk.{layer}.ffn_gate", x) > max(0, self.floors[layer])
        self.counts[layer] += on[:-1].sum(axis=0)
        self.last[layer] += on[-1]
        return super()._ffn(layer, x)


def counted(path: Path) -> Counted:
    return Counted(**vars(naive.load(path, kv_f16=True)))


def windows(path: Path, text: str, chunks: int) -> list[list[int]]:
    with GGUFFile(path) as file:
        tokenizer = load_tokenizer(file)
    ids = tokenizer.encode(text, add_bos=False)
    found = [ids[at : at + N_CTX] for at in range(0, chunks * N_CTX, N_CTX)]
    if tokenizer.add_bos:
        found = [[tokenizer.bos_id, *window[1:]] for window in found]
    return found


def log_shares(model: naive.Model, wanted: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities [n, n_vocab] at all positions that are scored, and the tokens that follow."""
    rows, targets = [], []
    for window in wanted:
        logits = model.forward(window)[N_CTX // 2 : -1]
        rows.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        targets += window[N_CTX // 2 + 1 :]
    return np.concatenate(rows), np.array(targets)


def text_file(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text(WORDS * 40)
    return path


def with_section(path: Path, to: Path, densities: list[float] | None = None, predictors: bool = False) -> Path:
    """A copy of a model with a section that has some thresholds, and predictors whose every other neuron is on."""
    metadata: dict[str, Any] = {}
    tensors = []

    def add(name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, "<f4")
        tensors.append(SectionTensor(name, data.shape[::-1], GGMLType.F32, lambda: data.view(np.uint8)))

    if densities:
        metadata["hotcold.threshold.densities"] = densities
        add("ffn_thresholds", np.linspace(0.1, 0.4, len(densities) * N_LAYER).reshape(len(densities), N_LAYER))
    if predictors:
        metadata |= {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}
        for layer in range(N_LAYER):
            add(f"blk.{layer}.ffn_pred_a.weight", np.zeros((RANK, N_EMBD)))
            add(f"blk.{layer}.ffn_pred_b.weight", np.zeros((N_FF, RANK)))
            add(f"blk.{layer}.ffn_pred_cut", np.where(np.arange(N_FF) % 2, 1.0, -1.0))
    shutil.copy(path, to)
    update_section(to, Contents(metadata, tensors))
    return to


def row(report: Report, mode: str) -> Row:
    return next(one for one in report.rows[1:] if one.mode == mode)


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_the_numbers_are_those_of_numpy(tiny_model: MakeModel, tmp_path: Path, tokenizer: str) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "n_vocab": 320}
    teacher, student = tiny_model(**options), tiny_model(**options, metadata=RELU)
    report = evaluate([student], teacher, files=[text_file(tmp_path)], default_text=False, n_ctx=N_CTX, chunks=5)
    wanted = windows(teacher, WORDS * 40, 5)
    assert report.texts[0].windows == wanted
    # the vocabulary of "llama" spells the opening of a conversation letter by letter
    assert report.notes == [] if tokenizer == "gpt2" else "whose opening fits half a window" in report.notes[0]
    assert [text.name for text in report.texts[1:]] == (["conversations"] if tokenizer == "gpt2" else [])
    model = counted(student)
    (first, targets), (second, _) = log_shares(naive.load(teacher, kv_f16=True), wanted), log_shares(model, wanted)
    places = np.arange(len(targets)), targets
    apart = first[places] - second[places]
    assert [(one.model, one.mode) for one in report.rows] == [(teacher, "dense"), (student, "exact")]
    for one, nll in zip(report.rows, (-first[places], -second[places]), strict=True):
        score = one.scores["words.txt"]
        assert score.tokens == len(targets) == 5 * 15
        assert score.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-3)
        assert score.error == pytest.approx(np.exp(nll.mean()) * nll.std(ddof=1) / np.sqrt(len(nll)), rel=1e-3)
    found = report.rows[1].scores["words.txt"]
    assert found.ratio == pytest.approx(np.exp(apart.mean()), rel=1e-3)
    assert found.ratio_error == pytest.approx(np.exp(apart.mean()) * apart.std(ddof=1) / np.sqrt(len(apart)), rel=1e-3)
    assert 0.01 < found.ratio_error < found.error / report.rows[0].scores["words.txt"].perplexity
    assert found.kl == pytest.approx((np.exp(first) * (first - second)).sum(axis=1).mean(), rel=2e-3)
    same = (first.argmax(axis=1) == second.argmax(axis=1)).mean()
    assert found.same == pytest.approx(same, abs=1.5 / len(targets)) and 0.1 < same < 0.95
    np.testing.assert_allclose(found.densities, model.counts.mean(axis=1) / (5 * (N_CTX - 1)), atol=2e-3)
    assert found.density == pytest.approx(np.mean(found.densities)) and 0.4 < found.density < 0.6
    # F32 throughout: a third is the gate
    assert found.read == pytest.approx((1 + 2 * found.density) / 3, rel=1e-6)
    assert report.rows[0].scores["words.txt"].read == 1.0


def test_skew_is_that_of_all_windows(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tiny_model(metadata=RELU, bypass=True, floors=[0.1, 0.6])
    files = [text_file(tmp_path)]
    report = evaluate([path], None, ["exact"], files, default_text=False, n_ctx=N_CTX, chunks=3)
    model = counted(path)
    for window in (window for text in report.texts for window in text.windows):
        model.forward(window)
    on_text = counted(path)
    for window in report.texts[0].windows:
        on_text.forward(window)
    score = report.rows[1].scores["words.txt"]
    np.testing.assert_allclose(score.densities, on_text.counts.mean(axis=1) / (3 * (N_CTX - 1)), atol=2e-3)
    assert score.densities[1] < score.densities[0] - 0.05
    assert score.read == pytest.approx((1 + 2 * score.density) / 3 + N_EMBD / (3 * N_FF))  # the bypass is always read
    counts = np.sort((model.counts + model.last).ravel())[::-1]
    share = (np.searchsorted(np.cumsum(counts), 0.8 * counts.sum()) + 1) / counts.size
    assert report.rows[1].skew == pytest.approx(share, abs=0.01) and 0.1 < share < 0.7


def test_a_model_against_itself(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tiny_model(qtype="Q8_0")
    other = Path(shutil.copy(path, tmp_path / "other.gguf"))
    report = evaluate([other], path, files=[text_file(tmp_path)], default_text=False, n_ctx=N_CTX, chunks=4)
    assert [one.mode for one in report.rows] == ["dense", "dense"]
    for score in report.rows[1].scores.values():
        assert score.ratio == pytest.approx(1, abs=1e-6) and score.ratio_error < 1e-6
        assert score.kl < 1e-6 and score.same == 1.0 and score.densities == [1.0] * N_LAYER and score.read == 1.0
    alone = evaluate([path], files=[text_file(tmp_path)], default_text=False, n_ctx=N_CTX, chunks=4)
    assert [one.model for one in alone.rows] == [path]  # its own mode is the reference's
    assert alone.rows[0].scores == report.rows[0].scores


def test_every_mode_that_a_section_makes_possible(tiny_model: MakeModel, tmp_path: Path) -> None:
    teacher = tiny_model()
    relu = with_section(tiny_model(metadata=RELU), tmp_path / "relu.gguf", [1.0, 0.75, 0.5], True)
    silu = with_section(teacher, tmp_path / "silu.gguf", [0.6])
    files = [text_file(tmp_path)]
    report = evaluate([relu, silu], teacher, files=files, default_text=False, n_ctx=N_CTX, chunks=2)
    modes = [(one.model, one.mode, one.series) for one in report.rows]
    assert modes == [
        (teacher, "dense", "dense"),
        (relu, "exact", "relufied (exact)"),
        (relu, "threshold=0.75", "relufied (threshold)"),
        (relu, "threshold=0.5", "relufied (threshold)"),
        (relu, "predict", "relufied + predictors"),
        (silu, "dense", "dense"),
        (silu, "threshold=0.6", "threshold"),
    ]
    predicted = row(report, "predict").scores["words.txt"]
    assert predicted.densities == [0.5, 0.5]
    sizes = N_EMBD * RANK + RANK * N_FF, 3 * N_EMBD * N_FF
    assert predicted.read == pytest.approx(0.5 + sizes[0] / sizes[1])
    exact, weak, weaker = (row(report, mode) for mode in ("exact", "threshold=0.75", "threshold=0.5"))
    assert exact.scores["words.txt"].density > weak.scores["words.txt"].density > weaker.scores["words.txt"].density
    assert exact.skew == row(report, "predict").skew and exact.skew is not None and weaker.skew is not None
    assert exact.skew > weaker.skew and report.rows[5].skew is None
    with Engine(silu, n_ctx=N_CTX, n_threads=1, sparsity="threshold=0.6") as engine:
        for window in report.texts[0].windows:
            engine.eval(engine.new_sequence(), window[:-1])
        assert report.rows[6].scores["words.txt"].density == pytest.approx(engine.usage.density, abs=2e-3)


def test_a_mixture_of_experts(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tiny_model(n_expert=4)
    other = Path(shutil.copy(path, tmp_path / "other.gguf"))
    report = evaluate([other], path, files=[text_file(tmp_path)], default_text=False, n_ctx=N_CTX, chunks=2)
    score = report.rows[1].scores["words.txt"]
    assert score.densities == [0.5, 0.5] and score.kl == 0
    assert score.read == pytest.approx(0.5 + 4 * N_EMBD / (4 * 3 * N_EMBD * N_FF))
    model = naive.load(path, kv_f16=True)
    for text in report.texts:
        for window in text.windows:
            model.forward(window[:-1])
    ordered = np.sort(model.heat.ravel())[::-1]
    share = (np.searchsorted(np.cumsum(ordered), 0.8 * ordered.sum()) + 1) / ordered.size
    assert report.rows[1].skew == pytest.approx(share, abs=0.13)  # of 8, one may change its place by rounding


def test_conversations_depend_on_their_number_alone(tiny_model: MakeModel) -> None:
    with Engine(tiny_model(), n_ctx=N_CTX, n_threads=2, sparsity="dense", n_parallel=3) as engine:
        three = conversations.write(engine, [1, 5, 7], 3, N_CTX)
        assert conversations.write(engine, [1, 5, 7], 2, N_CTX) == three[:2]
        assert conversations.write(engine, [1, 5, 7], 1, N_CTX, seed=1) != three[:1]
    assert len({tuple(window) for window in three}) == 3
    assert all(len(window) == N_CTX and window[:3] == [1, 5, 7] for window in three)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.1, 1e-4, 0.4], np.float32))
    places = (np.arange(1000) + 0.5) / 1000
    found = np.bincount([conversations._drawn(logits, place) for place in places], minlength=4) / 1000
    shares = np.array([0.5, 0.1, 0, 0.4]) ** (1 / conversations.TEMPERATURE)
    np.testing.assert_allclose(found, shares / shares.sum(), atol=2e-3)


def test_the_command(tiny_model: MakeModel, tmp_path: Path) -> None:
    teacher = tiny_model(n_ctx_train=512)
    student = with_section(tiny_model(n_ctx_train=512, metadata=RELU), tmp_path / "student.gguf", predictors=True)
    arguments = [student, "--against", teacher, "--text", text_file(tmp_path), "-c", N_CTX, "--chunks", 2, "-t", 1]
    plot = tmp_path / "quality.png"
    done = invoke(*arguments, "--json", "--plot", plot, "--prompts")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["windows"] == {"words.txt": 2, "pydoc_data.topics": 2, "conversations": 2}
    assert report["published_skews"] == {"OPT-30B": 0.26, "ReGLU-70B": 0.43}
    assert [one["mode"] for one in report["rows"]] == ["dense", "exact", "predict"]
    for one in report["rows"]:
        assert set(one["texts"]) == set(report["windows"])
        assert list(one["answers"]) == list(conversations.PROMPTS)
        assert all(0 < score["density"] <= 1 and score["perplexity"] > 1 for score in one["texts"].values())
    head = plot.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", head[16:]) == (1950, 630)

    done = invoke(*arguments, "--no-default-text", "--sparsity", "auto", "--prompts")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "words.txt, 2 windows of 32 tokens" and "pydoc" not in done.stdout
    exact = report["rows"][1]["texts"]["words.txt"]
    numbers = [f"{exact['density']:.1%}", f"{exact['read']:.1%}", f"{exact['perplexity']:.3f} +/- {exact['error']:.3f}"]
    numbers += [f"{exact['ratio']:.4f} +/- {exact['ratio_error']:.4f}", f"{exact['kl']:.4f}", f"{exact['same']:.1%}"]
    places = [lines[3].index(number) + len(number) for number in numbers]
    columns = ("active", "FFN read", "perplexity", "ratio", "KL", "same token")
    assert places == [lines[1].index(name) + len(name) for name in columns]  # in order, and aligned
    assert lines[2].startswith(f"{teacher.stem} dense ")
    assert lines[3].startswith("student exact ") and lines[4] == ""
    assert (
        "(PowerInfer's models: 26% in OPT-30B, 43% in ReGLU-70B)" in done.stdout and "% in student exact" in done.stdout
    )
    assert all(f"> {prompt}" in lines for prompt in conversations.PROMPTS)


def test_without_a_chat_template(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tiny_model(chat_template=None)
    done = invoke(path, "--text", text_file(tmp_path), "-c", N_CTX, "--chunks", 1, "--prompts", "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["windows"]) == ["words.txt", "pydoc_data.topics"]
    assert done.stderr.count("no conversations: ") == 1


def test_bad_input(tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, text = tiny_model(), text_file(tmp_path)
    other = tiny_model(n_vocab=310)
    foreign = tiny_model(tokenizer="llama", n_vocab=300)
    (tmp_path / "short.txt").write_text("the cat")
    settings = ("-c", N_CTX, "--chunks", 1, "--no-default-text", "--text", text)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    silent = invoke(tiny_model(chat_template=None), "--no-default-text")
    assert silent.exit_code == 1 and "texts: got none" in silent.stderr
    for arguments, message in (
        ((other, "--against", teacher), "vocabulary: got 310 tokens, wanted the 300 of"),
        ((foreign, "--against", teacher), "300 tokens, of which number 0 is another"),
        ((teacher, "--text", tmp_path / "short.txt"), "wanted at least one window of 32 (-c)"),
        ((teacher, "--text", tmp_path / "none.txt"), "none.txt: cannot be read"),
        ((tmp_path / "none.gguf",), "none.gguf"),
        ((teacher, "--against", tmp_path / "none.gguf"), "none.gguf"),
        ((teacher, "--sparsity", "predict"), f"{teacher}: sparsity: got predict, but the model has no predictors"),
        ((teacher, "--sparsity", "exact"), f"{teacher}: sparsity: got exact"),
        ((teacher, "--sparsity", "threshold=0.5"), "no thresholds"),
        ((teacher, "--sparsity", "thin"), "sparsity: got 'thin'"),
        ((teacher, "--chunks", 0), "--chunks: got 0"),
        ((tmp_path / "none.gguf", "--tasks", "arc_easy"), "--tasks needs lm-evaluation-harness: pip install lm-eval"),
        ((tmp_path / "none.gguf", "--limit", 3), "--limit: got it without --tasks"),
        ((tmp_path / "none.gguf", "--plot", tmp_path / "a.nosuch"), "--plot: got 'nosuch', wanted one of"),
        ((tmp_path / "none.gguf", "--plot", tmp_path / "no" / "a.png"), "a.png: no such folder"),
    ):
        done = invoke(*settings[:5], *(settings[5:] if "--text" not in arguments else ()), *arguments)
        errors = [line for line in done.stderr.splitlines() if line.startswith("hotcold: error: ")]
        assert done.exit_code == 1 and len(errors) == 1 and message in errors[0], (arguments, done.output)


def test_logits_that_are_no_numbers_are_not_measured(tiny_model: MakeModel, tmp_path: Path) -> None:
    with GGUFFile(tiny_model()) as file:
        weights = file.data("output_norm.weight").tobytes()
    raw = tiny_model().read_bytes()
    assert raw.count(weights) == 1
    (damaged := tmp_path / "damaged.gguf").write_bytes(raw.replace(weights, struct.pack("<f", np.nan) + weights[4:]))
    settings = ("-c", N_CTX, "--chunks", 1, "--no-default-text", "--text", text_file(tmp_path))
    done = invoke(damaged, "--against", tiny_model(), *settings)
    assert done.exit_code == 1 and "damaged.gguf: logits on" in done.stderr and "(dense): got no numbers" in done.stderr


def test_a_model_of_two_names_is_measured_once(tiny_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tiny_model())
    settings = ("-c", N_CTX, "--chunks", 1, "--no-default-text", "--text", text_file(tmp_path), "--json")
    done = invoke(tiny_model(), tmp_path / "link.gguf", "--against", tmp_path / "link.gguf", *settings)
    assert done.exit_code == 0 and len(json.loads(done.stdout)["rows"]) == 1


def test_every_text_has_a_name_of_its_own(tiny_model: MakeModel, tmp_path: Path) -> None:
    files = [tmp_path / folder / name for folder in ("a", "b") for name in ("x.txt", CONVERSATIONS)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("the hello world and a cat " * 40, encoding="utf-8")
    path = tiny_model(chat_template=None)
    texts, _ = _texts(path, files, False, 32, 1, 1, lambda line: None)
    own = CONVERSATIONS
    assert [text.name for text in texts] == ["x.txt", f"{own} (2)", "x.txt (2)", f"{own} (3)"]
