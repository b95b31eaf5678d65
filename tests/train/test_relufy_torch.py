"""relufy with PyTorch, on tiny models: the forward pass, the training, taking up interrupted work, the file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
from tiny import RopeOptions
from typer.testing import CliRunner

from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import StorageError, TrainingError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.lora import Adapter
from hotcold.formats.section import find_section
from hotcold.formats.tokenizer import load_tokenizer
from hotcold.formats.types import GGMLType
from hotcold.solver import own_text, relufy
from hotcold.solver.corpus import Corpus
from hotcold.tools.cli import app

torch = pytest.importorskip("torch")

from hotcold.solver import distill, relu_file, relufy_checks, torch_model  # noqa: E402
from hotcold.solver.distill import Distillation, Plan  # noqa: E402
from hotcold.solver.fit import Fitting  # noqa: E402
from hotcold.solver.pool import Pool  # noqa: E402
from hotcold.solver.relufy_checks import Effort, Recipe  # noqa: E402
from hotcold.solver.student import Ffn, Student  # noqa: E402
from hotcold.solver.top_tokens import Expected, Teaching, check_room, divergence  # noqa: E402
from hotcold.solver.torch_model import TorchModel, fastest_dtype  # noqa: E402

Make = Callable[..., Path]
IDS = [1, 5, 9, 200, 33, 270, 7, 7, 64, 12, 99, 250, 3, 4]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "wide heads, some dimensions turned": {"head_dim": 32, "rope_dim": 16},
    "qwen2": {"arch": "qwen2", "tied": True},
    "linear": {"rope": RopeOptions("linear")},
    "yarn with factors": {"rope": RopeOptions("yarn", freqs=True)},
    "window": {"sliding_window": 5},
    "gelu": {"metadata": {"llama.hidden_activation": "gelu"}},
    "relu2": {"metadata": {"llama.hidden_activation": "relu2"}},
}

SMALL = Recipe(fit_tokens=16384)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(path: Path, n_ctx: int = 64) -> TorchModel:
    with GGUFFile(path) as file:
        return TorchModel(file, ModelConfig.from_gguf(file), n_ctx, torch.float32)


def text(n_windows: int = 80, seed: int = 0) -> Corpus:
    """Ids that follow one another with some order: each is the one before plus one of a few steps."""
    steps = np.random.default_rng(seed).choice([1, 2, 3, 50], n_windows * 256)
    return Corpus("steps", (np.cumsum(steps) % 300).astype(np.int32), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_with_the_oracle(tiny_model: Make, family: str) -> None:
    path = tiny_model(**FAMILIES[family])
    model = load(path)
    with torch.no_grad():
        normed = model.forward(torch.tensor([IDS, IDS[::-1]]))
        logits = normed @ model.head().T
    for got, ids in zip(logits, (IDS, IDS[::-1]), strict=True):
        wanted = naive.forward(path, ids)
        assert np.abs(got.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_norms_of_heads_agree_with_the_oracle(family_file: Make) -> None:
    path = family_file("qwen3")
    model = load(path)
    ids = [id % model.config.n_vocab for id in IDS]
    with torch.no_grad():
        logits = model.forward(torch.tensor([ids]))[0] @ model.head().T
    wanted = naive.forward(path, ids)
    assert np.abs(logits.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_perplexity_agrees_with_the_oracle(tiny_model: Make) -> None:
    path = tiny_model()
    perplexity, densities = Student(load(path), []).evaluate(torch.tensor([IDS, IDS[::-1]]))
    nll = []
    for ids in (IDS, IDS[::-1]):
        logits = naive.forward(path, ids)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-log_p[i - 1, ids[i]] for i in range(len(IDS) // 2 + 1, len(IDS))]
    assert densities == []
    assert perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def trained(model: TorchModel, seed: int = 0, low_rank: int = 0) -> Student:
    """A student of random FFNs near the teacher's, with a bypass and floors."""
    torch.manual_seed(seed)
    make = (lambda layer: Ffn.low_rank(model, layer, low_rank, seed)) if low_rank else (lambda n: Ffn.whole(model, n))
    ffns = [make(layer) for layer in range(model.config.n_layer)]
    for layer, ffn in enumerate(ffns):
        ffn.floor = 0.02 * (layer + 1)
        for value in ffn.tensors():
            value += 0.02 * torch.randn_like(value)
    return Student(model, ffns)


def logits(student: Student, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return (student.forward(torch.tensor([ids])).normed[0] @ student.teacher.head().T).numpy()


def test_a_student_is_the_model_that_is_written(tiny_model: Make, tmp_path: Path) -> None:
    path, out = tiny_model(), tmp_path / "out.gguf"
    student = trained(load(path))
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        floors = [ffn.floor for ffn in student.ffns]
        relu_file.write(file, config, out, GGMLType.F32, lambda n: student.ffns[n].arrays(), floors, {})
    wanted = naive.forward(out, IDS)
    assert np.abs(logits(student, IDS) - wanted).max() < 1e-4 * np.abs(wanted).max()
    gates = naive.forward(path, IDS)
    assert np.abs(gates - wanted).max() > 0.1


def test_low_rank_is_the_whole_of_its_products(tiny_model: Make) -> None:
    model = load(tiny_model())
    thin = trained(model, low_rank=3)
    whole = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    for one, other in zip(thin.ffns, whole.ffns, strict=True):
        other.floor = one.floor
        for part in ("gate", "up", "down", "bypass"):
            factors = one.factors()[part]
            assert factors.a.shape[0] == factors.b.shape[1] == (12 if part == "bypass" else 3)
            other.own[part] += torch.from_numpy(factors.b @ factors.a)
    np.testing.assert_allclose(logits(thin, IDS), logits(whole, IDS), atol=1e-4)


def test_hot_neurons_come_first_and_nothing_else_changes(tiny_model: Make) -> None:
    student = trained(load(tiny_model()))
    windows = torch.tensor([IDS, IDS[::-1]])
    before, gates = logits(student, IDS), [ffn.own["gate"].clone() for ffn in student.ffns]
    student.put_hot_first(windows)
    np.testing.assert_allclose(logits(student, IDS), before, rtol=1e-4, atol=1e-5)
    for layer, ffn in enumerate(student.ffns):
        assert not torch.equal(ffn.own["gate"], gates[layer])
        assert sorted(ffn.own["gate"][:, 0].tolist()) == sorted(gates[layer][:, 0].tolist())
    counts = []
    x = student.teacher.embed(windows)
    with torch.no_grad():
        for layer, ffn in enumerate(student.ffns):
            x = x + student.teacher.attention(layer, x)
            y, gate = ffn(student.teacher.norm(f"blk.{layer}.ffn_norm", x))
            counts.append((gate >= ffn.floor).flatten(0, 1).sum(0).tolist())
            x = x + y
    assert all(row == sorted(row, reverse=True) and row[0] > row[-1] for row in counts)


def test_checkpointing_changes_no_gradient(tiny_model: Make) -> None:
    def gradients(saving: bool) -> list[torch.Tensor]:
        student = trained(load(tiny_model()))
        student.saving = saving
        for ffn in student.ffns:
            for value in ffn.tensors():
                value.requires_grad_(True)
        outcome = student.forward(torch.tensor([IDS]))
        (outcome.normed.square().sum() + 3 * outcome.soft.sum()).backward()
        return [value.grad for ffn in student.ffns for value in ffn.tensors()]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, again)
        assert kept.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_dialogues_are_what_the_model_says(tiny_model: Make, family: str) -> None:
    """At a temperature near zero, each token is the one that the whole window's forward pass has on top."""
    model = load(tiny_model(**FAMILIES[family]))
    (window,) = own_text.write(model, IDS[:4], 1, 40, 1e-6, 0, lambda done, total: None)
    with torch.no_grad():
        top = (model.forward(window[None])[0] @ model.head().T).argmax(-1)
    assert window[:4].tolist() == IDS[:4]
    assert window[4:].tolist() == top[3:-1].tolist()


def test_dialogues_are_many_and_the_same_for_a_seed(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "BATCH", 2)
    model = load(tiny_model())
    first, again, other = (own_text.write(model, IDS[:4], 5, 20, 1.0, seed, lambda d, t: None) for seed in (0, 0, 9))
    assert first.shape == (5, 20)
    assert len({tuple(window) for window in first.tolist()}) == 5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_opening_of_a_chat(tiny_model: Make) -> None:
    with GGUFFile(tiny_model()) as chat, GGUFFile(tiny_model(chat_template=None)) as plain:
        tokenizer = load_tokenizer(chat)
        assert own_text.opening(chat, 256) == tokenizer.encode("<|im_start|>user\n", special=True)
        assert own_text.opening(chat, 4) is None
        assert own_text.opening(plain, 256) is None


def test_documents_begin_as_the_model_has_it(tiny_model: Make) -> None:
    with GGUFFile(tiny_model()) as file:
        tokenizer = load_tokenizer(file)
        (start,) = own_text.document_start(file) or []
        assert start in (tokenizer.encode("<|endoftext|>", special=True)[0], tokenizer.bos_id, tokenizer.eos_id)


def test_kinds_of_text_are_mixed_by_their_shares() -> None:
    kinds = [(torch.arange(n)[:, None], share) for n, share in ((10, 1.0), (7, 0.25), (3, 0.3))]
    pool = Pool(kinds, 3)
    assert len(pool.windows) == 20
    whole = pool.draw(0, 400)
    pieces = [pool.draw(place, 8) for place in range(0, 400, 8)]
    assert sorted(torch.cat(pieces).tolist()) == sorted(whole.tolist())
    for first, n, share in ((0, 10, 0.45), (10, 7, 0.25), (17, 3, 0.3)):
        drawn = [number for number in whole.tolist() if first <= number < first + n]
        assert len(drawn) == pytest.approx(400 * share, abs=1)
        rounds = [drawn[i : i + n] for i in range(0, len(drawn) - n, n)]
        assert all(sorted(row) == list(range(first, first + n)) for row in rounds)
        assert any(row != rounds[0] for row in rounds)
    assert max(sum(number >= 10 for number in piece.tolist()) for piece in pieces) <= 6
    assert Pool(kinds, 3).draw(80, 8).tolist() == pieces[10].tolist()
    assert Pool(kinds, 4).draw(80, 8).tolist() != pieces[10].tolist()


@pytest.mark.parametrize("top", [3, 40])
def test_divergence_and_its_gradient(top: int) -> None:
    """As that of distributions in which all but the teacher's top tokens are one."""
    torch.manual_seed(0)
    wanted, given, head = torch.randn(700, 16), torch.randn(700, 16), torch.randn(40, 16)
    given.requires_grad_(True)
    p, q = ((x @ head.T).softmax(-1) for x in (wanted, given))
    probabilities, ids = p.topk(top, -1)

    def merged(x: torch.Tensor) -> torch.Tensor:
        kept = x.gather(1, ids)
        return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1) if top < 40 else kept

    loss = torch.nn.functional.kl_div(merged(q).log(), merged(p), reduction="batchmean")
    loss.backward()
    got, gradient = divergence(Expected(ids, probabilities), given.detach(), head)
    assert got == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gradient, given.grad, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_asked_once(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = load(tiny_model()), torch.tensor([IDS, IDS[::-1], IDS])
    first = Teaching(model, Pool([(windows, 1.0)], 0), tmp_path)
    ids, expected = first(torch.tensor([1, 0]))
    assert ids.tolist() == [IDS[::-1], IDS]
    with torch.no_grad():
        p = (model.forward(ids).flatten(0, 1) @ model.head().T).softmax(-1)
    torch.testing.assert_close(expected.p, p.gather(1, expected.ids), rtol=2e-3, atol=1e-6)
    assert (p.topk(expected.p.shape[1]).values.sum(1) - expected.p.sum(1)).abs().max() < 1e-3
    again = Teaching(model, Pool([(windows, 1.0)], 0), tmp_path)
    monkeypatch.setattr(model, "forward", lambda ids: pytest.fail("asked again"))
    for got, wanted in zip(again(torch.tensor([1, 0]))[1:], (expected,), strict=True):
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.p, wanted.p)


def test_answers_that_a_power_cut_left_damaged_are_asked_again(tiny_model: Make, tmp_path: Path) -> None:
    model, windows = load(tiny_model()), torch.tensor([IDS, IDS[::-1]])
    _, wanted = Teaching(model, Pool([(windows, 1.0)], 0), tmp_path)(torch.tensor([0, 1]))
    for name in ("top-ids.bin", "top-p.bin"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes(len(kept) // 2) + kept[len(kept) // 2 :])
        _, got = Teaching(model, Pool([(windows, 1.0)], 0), tmp_path)(torch.tensor([0, 1]))
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.p, wanted.p)


def test_a_full_disk_is_told_each_time(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, pool = load(tiny_model()), Pool([(torch.tensor([IDS] * 1000), 1.0)], 0)
    for _ in range(2):
        with pytest.raises(StorageError, match="No space left on device; .* takes [0-9]+ MiB there"):
            Teaching(model, pool, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(StorageError, match="wanted 366 for what the teacher expects of 1000000 tokens"):
        check_room(tmp_path / "empty", 1_000_000)


def test_batches_are_written_side_by_side_where_memory_has_room(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for room, n in ((None, 3), (1 << 40, 3), (1, 1)):
        monkeypatch.setattr(own_text, "available_bytes", lambda room=room: room)
        assert own_text.writers(model) == n


def test_a_layer_of_closed_neurons_is_fitted(tiny_model: Make) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    ffn = Ffn.whole(model, 0)
    ffn.own["gate"].zero_()
    fitting = Fitting(Student(model, [ffn]), steps_of_text()[:64])
    fitting.attend()
    assert 0 < fitting.fit(ffn) < 0.9 and torch.equal(ffn.own["down"], model.weights["blk.0.ffn_down.weight"].float())


def steps_of_text() -> torch.Tensor:
    return torch.from_numpy(text().ids.reshape(-1, relufy_checks.WINDOW)).long()


def pool_of_text(share: float = 0.0) -> Pool:
    """The share comes from the last quarter of it."""
    windows = steps_of_text()
    return Pool([(windows[:60], 1.0), (windows[60:], share)] if share else [(windows, 1.0)], 0)


def plan(**changes: Any) -> Plan:
    return Plan(**({"density": 0.3, "lr": 2e-3, "batch": 8, "ubatch": 8, "steps": 60} | changes))


def test_a_fit_leaves_less_than_what_relu_leaves_out(tiny_model: Make) -> None:
    """Against least squares in float64 for the first layer, whose inputs are the teacher's."""
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, 0)])
    fitting = Fitting(student, steps_of_text()[:64])
    fitting.attend()
    missing = (fitting.teacher - fitting.student).flatten(0, 1)
    x = model.norm("blk.0.ffn_norm", fitting.student.flatten(0, 1))
    relu, _ = student.ffns[0](x)
    left = fitting.fit(student.ffns[0])
    weight = 1 / (fitting.teacher.flatten(0, 1).square().mean(1, keepdim=True).sqrt() + 1e-3)

    def error(out: torch.Tensor) -> float:
        return float(((missing - out) * weight).square().sum())

    after = error(student.ffns[0](x)[0])
    assert after / error(relu) == pytest.approx(left, rel=1e-3)
    best = np.linalg.lstsq((torch.cat([x, torch.ones(len(x), 1)], 1) * weight).numpy().astype(np.float64),
                           ((missing - relu) * weight).numpy().astype(np.float64), rcond=None)[1].sum()  # fmt: skip
    assert after < 1.01 * best < 0.9 * error(relu)


def test_a_low_rank_fit_is_the_best_of_its_rank(tiny_model: Make) -> None:
    """By Eckart and Young: what least squares leaves, and the fitted values' smaller singular values squared."""
    model = load(tiny_model(), relufy_checks.WINDOW)
    ffn = Ffn.low_rank(model, 0, 2, 0)
    fitting = Fitting(Student(model, [ffn]), steps_of_text()[:64])
    fitting.attend()
    x = model.norm("blk.0.ffn_norm", fitting.student.flatten(0, 1))
    weight = 1 / (fitting.teacher.flatten(0, 1).square().mean(1, keepdim=True).sqrt() + 1e-3)
    missing = (fitting.teacher - fitting.student).flatten(0, 1)
    inputs, wanted = ((v * weight).numpy().astype(np.float64) for v in (x, missing - ffn(x)[0]))
    left = fitting.fit(ffn)
    assert np.linalg.matrix_rank(ffn.matrix("bypass").numpy(), tol=1e-4) == 8
    found = np.square(wanted - inputs @ ffn.matrix("bypass").numpy().T.astype(np.float64)).sum()
    fitted = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    best = np.square(wanted - fitted).sum() + np.square(np.linalg.svd(fitted)[1][8:]).sum()
    assert best <= found < 1.01 * best
    assert left == pytest.approx(found / np.square(wanted).sum(), rel=1e-3)


def test_all_layers_learn_and_get_sparser(tiny_model: Make, tmp_path: Path) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    teaching = Teaching(model, pool_of_text(), tmp_path)
    learning = Distillation(student, teaching, plan(density=1.0, steps=20))
    found = np.array([learning.step() for _ in range(20)])
    assert found[-5:, 0].mean() < 0.8 * found[:2, 0].mean()
    training = Distillation(student, teaching, plan())
    found = np.array([training.step() for _ in range(60)])
    assert found[-5:, 1].mean() < 0.33 < 0.45 < found[0, 1]
    assert all(ffn.floor > 0 for ffn in student.ffns)
    perplexity, densities = student.evaluate(steps_of_text()[:8])
    assert np.mean(densities) == pytest.approx(found[-1, 1], abs=0.03)


def test_small_pieces_make_the_same_step(tiny_model: Make, tmp_path: Path) -> None:
    def after(ubatch: int) -> tuple[list[torch.Tensor], list[float], tuple[float, float]]:
        model = load(tiny_model(), relufy_checks.WINDOW)
        student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
        teaching = Teaching(model, pool_of_text(0.5), tmp_path)
        training = Distillation(student, teaching, plan(ubatch=ubatch, steps=1))
        training.share = 0.5  # so that there is a pressure
        found = training.step()
        gradients = [training.optimizer.state[value]["exp_avg"] for value in training.parameters]
        training.done = 1  # all time is over, so floors follow what was found
        training._raise_floors([0.5] * len(student.ffns))
        return gradients, [ffn.floor for ffn in student.ffns], found

    whole, pieces = after(8), after(2)
    for one, other in zip(whole[0], pieces[0], strict=True):
        assert (one - other).abs().max() < 5e-3 * one.abs().max()  # the stand-in for density has a scale by piece
    assert pieces[1:] == (pytest.approx(whole[1]), pytest.approx(whole[2]))


def test_floors_follow_all_pieces_of_a_batch(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    training = Distillation(student, Teaching(model, pool_of_text(0.5), tmp_path), plan(ubatch=2))
    forward, lowest = student.forward, []

    def watched(ids: torch.Tensor) -> Any:
        lowest.append(forward(ids)._replace(least=torch.full((2,), float(len(lowest)))))
        return lowest[-1]

    wanted: list[list[float]] = []
    monkeypatch.setattr(student, "forward", watched)
    monkeypatch.setattr(training, "_raise_floors", wanted.append)
    training.step()
    assert len(lowest) == 4
    assert wanted == [[pytest.approx(1.5), pytest.approx(1.5)]]


def test_time_takes_the_place_of_steps(tiny_model: Make, tmp_path: Path) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    over = iter([0.0, 0.3, 0.7, 2.0])
    now = [0.0]
    training = Distillation(student, Teaching(model, pool_of_text(), tmp_path), plan(steps=None), lambda: now[0])
    targets = []
    for share in over:
        now[0] = share
        training.start = 0.5
        targets.append((training.progress, training.target()))
    assert targets == [(0.0, 0.5), (0.3, pytest.approx(0.4)), (0.7, pytest.approx(0.3)), (1.0, pytest.approx(0.3))]


def test_losses_that_are_no_numbers_change_nothing(tiny_model: Make, tmp_path: Path) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    training = Distillation(student, Teaching(model, pool_of_text(), tmp_path), plan())
    training.step()
    before = [value.detach().clone() for value in training.parameters]
    model.weights["output_norm.weight"][0] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2; .* a lower --lr \(it was 0.002\)"):
        training.step()
    assert training.done == 1 and not training.whole
    assert all(map(torch.equal, before, training.parameters))
    model.weights["blk.0.attn_norm.weight"][0] = float("nan")
    fitting = Fitting(Student(model, [Ffn.whole(model, 0)]), steps_of_text()[:64])
    fitting.attend()
    with pytest.raises(TrainingError, match="layer 0: its values are no numbers"):
        fitting.fit(Ffn.whole(model, 0))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes")])
def test_memory_that_is_out_says_what_fits(tiny_model: Make, tmp_path: Path, error: Exception) -> None:
    model = load(tiny_model(), relufy_checks.WINDOW)
    student = Student(model, [Ffn.whole(model, layer) for layer in range(model.config.n_layer)])
    training = Distillation(student, Teaching(model, pool_of_text(), tmp_path), plan(ubatch=4))

    def fail(ids: torch.Tensor) -> None:
        raise error

    student.forward = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(
        TrainingError, match="out of memory with 1024 tokens at once.*--checkpointing, or --ubatch-size 512"
    ):
        training.step()


def make(model: Path, out: Path, stop_in: str = "", stop_at: int = -1, **changes: Any) -> list[str]:
    """The lines that relufy says; interrupted, as by Ctrl-C, when its progress is at stop_at of a stage."""
    calls = 0

    def advance(what: str, done: int, total: int) -> None:
        nonlocal calls
        if stop_in and what.startswith(stop_in):
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt

    said: list[str] = []
    recipe, effort = replace(SMALL, **changes), Effort(density=0.4, minutes=None, tokens=20480, lr=2e-3)
    with GGUFFile(model) as file:
        relufy.relufy(file, text(), out, recipe, effort, GGMLType.F32, said.append, advance)
    return said


def stages(said: list[str]) -> list[str]:
    return [line.split(":")[0] for line in said]


def test_interrupted_work_is_taken_up_and_gives_the_same_file(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relufy, "SAVES", 3)  # a state is kept after steps 4, 8 and 10
    monkeypatch.setattr(relufy, "OWN_WINDOWS", 96)
    model, whole, pieces = tiny_model(), tmp_path / "whole.gguf", tmp_path / "pieces.gguf"
    said = make(model, whole, sweeps=2)
    fits = [f"sweep {sweep} of 2{layer}" for sweep in (1, 2) for layer in (", layer 0", ", layer 1", "")]
    last = [f"all layers, {share}%, step {n}" for share, n in ((40, 4), (80, 8), (100, 10))]
    assert stages(said) == ["teacher", "dialogues", "documents", *fits, *last, "done"]
    assert not (tmp_path / "whole.gguf.relufy").exists()
    stops = (("sweep 1", 2), ("sweep 2", 1), ("sweep 2", 2), ("all layers", 2), ("all layers", 4))
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            make(model, pieces, *stop, sweeps=2)
        assert not pieces.exists()
    again = make(model, pieces, sweeps=2)
    assert again[0].startswith("going on with the work kept in")
    assert stages(again[4:]) == [*last[2:], "done"]  # the interruption itself kept step 6
    with GGUFFile(pieces) as one, GGUFFile(whole) as other:
        assert list(one.tensors) == list(other.tensors)
        for name in one.tensors:
            assert np.array_equal(one.data(name), other.data(name)), name
        assert one.get("hotcold.relufy.distilled_tokens") == 20480


def test_the_command(tiny_model: Make, tmp_path: Path) -> None:
    model, out, words = tiny_model(), tmp_path / "out.gguf", tmp_path / "words.txt"
    words.write_text("the hello world and a cat sat on the mat in here. " * 1100, encoding="utf-8")
    options = ["--fit-tokens", "16384", "--tokens", "4096", "--type", "F16", "-t", "1"]
    result = CliRunner().invoke(app, ["relufy", str(model), str(words), "-o", str(out), *options])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(out)
    assert "active neurons" in result.stdout and "x the teacher's" in result.stdout
    assert "llama.cpp refuses this file" in result.stderr
    with GGUFFile(out) as file, find_section(file) as section:
        assert section.attached and section.has_down_t()
        config = ModelConfig.from_gguf(file)
        assert config.activation == "relu" and config.has("ffn_bypass.weight")
        assert file.get("hotcold.relufy.texts") == ["words.txt"]
        assert file.tensors["blk.1.ffn_down.weight"].type == GGMLType.F16


def test_the_command_without_a_text(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relufy, "SELF_WINDOWS", 96)
    out = tmp_path / "out.gguf"
    options = ["--text", "self", "--fit-tokens", "16384", "--tokens", "2048", "--type", "F32", "-t", "1"]
    result = CliRunner().invoke(app, ["relufy", str(tiny_model()), "-o", str(out), *options])
    assert result.exit_code == 0, result.stderr
    assert "the model wrote 96 windows" in result.stderr
    with GGUFFile(out) as file:
        assert file.get("hotcold.relufy.texts") == ["text of the model's own"]


def test_the_command_makes_an_adapter(tiny_model: Make, tmp_path: Path) -> None:
    """Which convert merges into a ReLU model."""
    model, adapter, merged, words = tiny_model(), tmp_path / "a.gguf", tmp_path / "m.gguf", tmp_path / "words.txt"
    words.write_text("the hello world and a cat sat on the mat in here. " * 1100, encoding="utf-8")
    options = ["--low-rank", "4", "--fit-tokens", "16384", "--tokens", "4096", "-t", "1"]
    result = CliRunner().invoke(app, ["relufy", str(model), str(words), "-o", str(adapter), *options])
    assert result.exit_code == 0, result.stderr
    assert "--lora" in result.stderr
    with Adapter(adapter) as made:
        assert made.activation == "relu"
        assert made.ranks["blk.1.ffn_gate.weight"] == 4
        assert made.ranks["blk.1.ffn_bypass.weight"] == 16
    result = CliRunner().invoke(
        app, ["convert", str(model), "--lora", str(adapter), "-o", str(merged), "--type", "F32"]
    )
    assert result.exit_code == 0, result.stderr
    with GGUFFile(merged) as file:
        config = ModelConfig.from_gguf(file)
        assert config.activation == "relu" and config.has("ffn_bypass.weight") and max(config.activation_floors) > 0
    assert np.abs(naive.forward(merged, IDS) - naive.forward(model, IDS)).max() > 0.01


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_the_faster_type_is_taken(monkeypatch: pytest.MonkeyPatch, faster: torch.dtype) -> None:
    monkeypatch.setattr(torch_model, "_seconds", lambda a, b: 1.0 if a.dtype == faster else 2.0)
    assert fastest_dtype(torch.device("cpu")) == faster


class Clock:
    """A second goes by each time that it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_time_counts_over_interruptions(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses do not count, what was done before them does: the share that is over never falls, and ends at 1."""
    seen: list[int] = []
    stops = iter([3, 5, 10**6])

    def run() -> relufy.Report:
        clock, calls, stop = Clock(), 0, next(stops)
        clock.now += 1e6 * stop  # the pause
        monkeypatch.setattr(relufy, "time", clock)

        def advance(what: str, done: int, total: int) -> None:
            nonlocal calls
            if what.startswith("all layers"):
                calls += 1
                seen.append(done)
                if calls == stop:
                    raise KeyboardInterrupt

        with GGUFFile(tiny_model()) as file:
            recipe, effort = Recipe(fit_tokens=16384, chat=0.0, own=0.0), Effort(minutes=1.5, lr=2e-3)
            return relufy.relufy(
                file, text(), tmp_path / "o.gguf", recipe, effort, GGMLType.F32, lambda line: None, advance
            )

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
    report = run()
    assert seen == sorted(seen) and seen[-1] == 1000 and len(seen) > 8
    assert report.tokens == len(seen) * 2048
    assert 1.4 < report.minutes < 1.6


def test_a_loss_that_is_no_number_leaves_what_was_kept(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the last save, from which a lower rate may go another way."""
    monkeypatch.setattr(relufy, "SAVES", 5)  # after steps 2, 4, ...
    real, calls = distill.divergence, 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return (float("nan"), real(*arguments)[1]) if calls == 6 else real(*arguments)

    monkeypatch.setattr(distill, "divergence", broken)
    with pytest.raises(TrainingError, match="the loss is nan at step 6"):
        make(tiny_model(), tmp_path / "o.gguf", chat=0.0, own=0.0)
    state = torch.load(tmp_path / "o.gguf.relufy" / "together.pt", weights_only=True)
    assert state["done"] == 4
    said = make(tiny_model(), tmp_path / "o.gguf", chat=0.0, own=0.0)
    assert said[0].startswith("going on") and said[-1].startswith("done")
