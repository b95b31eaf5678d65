"""Turn a SwiGLU or GeGLU model into a ReLU model: train its FFNs against itself, resumably, and write the new file.

First each layer in turn, in closed form, so that the residual after it meets the teacher's; then all layers together,
so that the student's next-token distribution meets the teacher's while fewer and fewer neurons are active.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError, TrainingError
from ..formats.gguf import GGUFFile
from ..formats.pages import forget
from ..formats.section_file import update_section
from ..formats.types import GGMLType
from . import own_text, relu_adapter, relu_file
from .conversations import TEMPERATURE
from .corpus import Corpus
from .relufy_checks import (
    HELD_OUT,
    MIN_WINDOWS,
    WINDOW,
    Effort,
    Recipe,
    check,
    check_model,
    check_out,
    memory,
    require_torch,
    work_folder,
)
from .work import Work

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .distill import Distillation
    from .pool import Pool
    from .student import Student

SAVES = 20  # of the training of all layers together
RESERVE = 0.03  # of the minutes given, for writing the file
OWN_WINDOWS, OWN_TIME = 768, 0.04  # of dialogues and of documents that the model writes itself; more are repeated
SELF_WINDOWS, SELF_TIME = 2048, 0.25  # where no text is brought; the times are shares of the minutes given
DOCUMENT_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Report:
    """What was made, measured on the held-out windows in the training's arithmetic."""

    teacher_perplexity: float
    perplexity: float
    densities: list[float]  # by layer
    tokens: int  # that all layers were trained on together, repeated ones included
    minutes: float  # of work, without interruptions

    @property
    def density(self) -> float:
        return sum(self.densities) / len(self.densities)


Say = Callable[[str], None]
Advance = Callable[[str, int, int], None]  # what, done, of


def relufy(
    source: GGUFFile,
    corpus: Corpus | None,
    out: Path,
    recipe: Recipe,
    effort: Effort,
    kind: GGMLType,
    say: Say,
    advance: Advance,
) -> Report:
    """Train and write OUT; work is kept in `OUT.relufy/` until then, and taken up from there by the next call.

    corpus: None is text that the model writes itself. UnsupportedError: no PyTorch, or a model that is ReLU already or
    of another kind; ParameterError: too little text; TrainingError: losses that are no numbers, or memory is out;
    StorageError: OUT or its folder cannot be written.
    """
    config = ModelConfig.from_gguf(source)
    check_model(source, config)
    check(config, corpus, recipe, effort)
    check_out(out, [source.path])
    require_torch()
    work = work_folder(out, source, corpus, recipe)
    with work.locked():
        if work.begin():
            say(f"going on with the work kept in {work.folder}")
        with memory("the weights in PyTorch", "more of it, or for a smaller model"):
            run = _Run(source, config, corpus, recipe, effort, work, say, advance)
        try:
            report = run.train()
            _write(source, config, out, kind, run.student, _notes(corpus, recipe, effort, report))
        except BaseException:
            run.keep()
            raise
        work.drop()
    return report


class _Run:
    """The stages, one after the other; what each made is kept in the work folder."""

    def __init__(
        self,
        source: GGUFFile,
        config: ModelConfig,
        corpus: Corpus | None,
        recipe: Recipe,
        effort: Effort,
        work: Work,
        say: Say,
        advance: Advance,
    ) -> None:
        import torch

        from .predictor_torch import device as best_device
        from .student import Student
        from .torch_model import TorchModel, fastest_dtype

        self.source, self.config, self.corpus, self.recipe, self.effort = source, config, corpus, recipe, effort
        self.work, self.say, self.advance = work, say, advance
        self._before, self._began = float(work.load("seconds") or 0.0), time.monotonic()
        self._training: Distillation | None = None
        device = best_device()
        kept = work.load("dtype")  # the two types differ in their last digits, and a machine's speed may change
        dtype = getattr(torch, kept) if kept else fastest_dtype(device)
        work.save("dtype", str(dtype).removeprefix("torch."))
        teacher = TorchModel(source, config, WINDOW, dtype, device)
        self.student = Student(teacher, [], effort.checkpointing)

    @property
    def seconds(self) -> float:
        """Spent so far, earlier runs of the same work included."""
        return self._before + time.monotonic() - self._began

    def keep(self) -> None:
        """Keep what is not kept yet; after an interruption there may be some steps."""
        try:
            if self._training is not None and self._training.whole:
                self._save(self._training)
            self.work.save("seconds", self.seconds)
        except Exception as error:  # the one that brought us here is the one to raise
            self.say(f"the last steps could not be kept: {error}")

    def train(self) -> Report:
        """All stages."""
        text, held_out = self._text()
        self._teacher_perplexity, _ = self.student.evaluate(held_out)
        scored = len(held_out) * (WINDOW - 1 - WINDOW // 2)
        self.say(f"teacher: perplexity {self._teacher_perplexity:.2f} on {scored} held-out tokens")
        pool = self._pool(text)
        fit_tokens, least = self.recipe.fit_tokens, MIN_WINDOWS * WINDOW
        fits = f"--fit-tokens {least}" if fit_tokens > least else "--low-rank"
        with memory(f"what a sweep keeps of {fit_tokens} tokens", f"{fits} and another file to write"):
            for sweep in range(self.recipe.sweeps):
                self._fit(sweep, pool, held_out)
        tokens = self._distil(pool, held_out)
        perplexity, densities = self._say_quality("done", held_out)
        if not self.recipe.low_rank:
            self.student.put_hot_first(text[: len(held_out)])
        return Report(self._teacher_perplexity, perplexity, densities, tokens, self.seconds / 60)

    def _text(self) -> tuple[Tensor, Tensor]:
        """(windows to train on, windows held out), int64 [n, WINDOW]."""
        import torch

        if self.corpus is None:
            start = own_text.document_start(self.source)
            if start is None:
                raise ParameterError("text: got self, but the model has no token that begins a text; wanted text files")
            written = self._written("text", SELF_WINDOWS, start, DOCUMENT_TEMPERATURE, SELF_TIME)
            return written[HELD_OUT:], written[:HELD_OUT]
        windows = torch.from_numpy(_windows(self.corpus, self.recipe.seed)).long()
        return windows[HELD_OUT:], windows[:HELD_OUT]

    def _pool(self, text: Tensor) -> Pool:
        """The text, and what the model writes itself; StorageError where what is kept of them has no room."""
        from .pool import Pool
        from .top_tokens import check_room

        recipe, source = self.recipe, self.source
        dialogues = ("dialogues", recipe.chat, own_text.opening(source, WINDOW), "chat template", TEMPERATURE)
        own = 0.0 if self.corpus is None else recipe.own
        start = own_text.document_start(source)
        documents = ("documents", own, start, "token that begins a text", DOCUMENT_TEMPERATURE)
        wanted = []
        for name, share, begins, beginning, temperature in (dialogues, documents):
            if share and begins is None:
                self.say(f"no {name}: the model has no {beginning}")
            elif share and begins is not None:
                wanted.append((name, share, begins, temperature))
        if self.effort.tokens != 0:
            check_room(self.work.folder, (len(text) + len(wanted) * OWN_WINDOWS) * WINDOW)
        kinds = [(text, 1.0)]
        for name, share, begins, temperature in wanted:
            kinds.append((self._written(name, OWN_WINDOWS, begins, temperature, OWN_TIME), share))
        return Pool(kinds, self.recipe.seed)

    def _written(self, name: str, n_windows: int, start: list[int], temperature: float, share: float) -> Tensor:
        """Windows that the teacher writes, as many as there is time for, in rounds that are kept one by one."""
        import torch

        kept = self.work.load(name) or {"windows": torch.zeros(0, WINDOW, dtype=torch.long), "began": self.seconds}
        windows, least = kept["windows"], MIN_WINDOWS + HELD_OUT
        n_round = own_text.BATCH * own_text.writers(self.student.teacher)
        while not kept.get("whole"):
            n, first = min(n_round, n_windows - len(windows)), len(windows) // own_text.BATCH
            progress = partial(self.advance, f"writing {name}, {len(windows)}+")
            seed = self.recipe.seed + first
            more = own_text.write(self.student.teacher, start, n, WINDOW, temperature, seed, progress)
            windows = torch.cat([windows, more])
            took, minutes = self.seconds - kept["began"], self.effort.minutes
            enough = minutes is not None and took > share * 60 * minutes and len(windows) >= least
            kept |= {"windows": windows, "whole": enough or len(windows) >= n_windows}
            self._save_seconds(name, kept)
        self.say(f"{name}: the model wrote {len(windows)} windows of {WINDOW} tokens")
        return windows

    def _fit(self, sweep: int, pool: Pool, held_out: Tensor) -> None:
        """Fit layer after layer; those that are kept already are only walked through."""
        from .fit import Fitting
        from .student import Ffn

        recipe, student = self.recipe, self.student
        n_layer, n = student.teacher.config.n_layer, recipe.fit_tokens // WINDOW
        kept = [self.work.load(f"sweep-{sweep}-layer-{layer}") for layer in range(n_layer)]
        streams = None if None not in kept else Fitting(student, pool.windows[pool.draw(sweep * n, n)])
        for layer in range(n_layer):
            what = f"sweep {sweep + 1} of {recipe.sweeps}, layer {layer}"
            self.advance(what, layer, n_layer)
            if streams is not None:
                streams.attend()
            if sweep == 0:
                rank = recipe.low_rank
                new = Ffn.low_rank(student.teacher, layer, rank, recipe.seed) if rank else None
                student.ffns.append(new or Ffn.whole(student.teacher, layer))
            ffn = student.ffns[layer]
            if kept[layer] is not None:
                ffn.load(kept[layer])
            elif streams is not None:
                error = streams.fit(ffn)
                self._save_seconds(f"sweep-{sweep}-layer-{layer}", ffn.state())
                self.say(f"{what}: {error:.1%} of what ReLU leaves out is left")
            if streams is not None and layer + 1 < n_layer:
                streams.pass_through(ffn)
        if streams is not None:
            self._say_quality(f"sweep {sweep + 1} of {recipe.sweeps}", held_out)

    def _distil(self, pool: Pool, held_out: Tensor) -> int:
        """Train all layers together, keeping the work some twenty times on the way; returns the tokens trained on."""
        from .distill import Distillation, Plan
        from .top_tokens import Teaching

        recipe, effort = self.recipe, self.effort
        teaching = Teaching(self.student.teacher, pool, self.work.folder)
        batch = recipe.batch_size // WINDOW
        steps = None if effort.tokens is None else effort.tokens // recipe.batch_size
        ubatch = min(batch, effort.ubatch_size // WINDOW)
        plan = Plan(effort.density, effort.lr, batch, ubatch, steps)
        self._distil_began = self.seconds
        training = Distillation(self.student, teaching, plan, self._time_over)
        if (state := self.work.load("together")) is not None:
            training.load(state)
            self._distil_began = state["began"]
        elif training.progress >= 1 and effort.minutes is not None:
            enough = math.ceil(2 * self.seconds / 60)
            self.say(f"no time was left to train all layers together; --minutes {enough} has some")
        self._training, saved = training, training.progress
        while training.progress < 1:
            nats, density = training.step()
            at = training.progress
            self.advance(f"all layers: {nats:.3f} nats, {density:.1%} active", round(at * 1000), 1000)
            if at >= min(1.0, saved + 1 / SAVES):
                saved = at
                self._say_quality(f"all layers, {at:.0%}, step {training.done}", held_out)
                self._save(training)
        return training.done * recipe.batch_size

    def _time_over(self) -> float:
        """The share of the time for all layers together that is over."""
        assert self.effort.minutes is not None
        end = self.effort.minutes * 60 * (1 - RESERVE)
        return (self.seconds - self._distil_began) / max(1e-9, end - self._distil_began)

    def _save(self, training: Distillation) -> None:
        self._save_seconds("together", training.state() | {"began": self._distil_began})

    def _save_seconds(self, name: str, value: object) -> None:
        self.work.save(name, value)
        self.work.save("seconds", self.seconds)

    def _say_quality(self, stage: str, held_out: Tensor) -> tuple[float, list[float]]:
        """(perplexity, density by layer); TrainingError where they are no numbers."""
        perplexity, densities = self.student.evaluate(held_out)
        if not math.isfinite(perplexity):
            if self._training is not None:
                self._training.whole = False  # what was kept last is better
            raise TrainingError(
                f"{stage}: held-out perplexity is {perplexity}; run the same command with a lower --lr "
                f"(it was {self.effort.lr:g}) to go on from what was kept last"
            )
        mean, ratio = sum(densities) / len(densities), perplexity / self._teacher_perplexity
        quality = f"held-out perplexity {perplexity:.2f}, {ratio:.3f} x the teacher's"
        self.say(f"{stage}: {mean:.1%} active, {quality} ({self.seconds / 60:.0f} min)")
        return perplexity, densities


def _write(
    source: GGUFFile, config: ModelConfig, out: Path, kind: GGMLType, student: Student, notes: Mapping[str, Any]
) -> None:
    """The new file: a model with a section, or an adapter."""
    floors = [ffn.floor for ffn in student.ffns]
    if student.ffns[0].base is not None:
        relu_adapter.write(source, config, out, lambda layer: student.ffns[layer].factors(), floors, notes)
        return

    def weights(layer: int) -> Mapping[str, np.ndarray]:
        return student.ffns[layer].arrays()

    relu_file.write(source, config, out, kind, weights, floors, notes)
    update_section(out, relu_file.section(config, kind, weights))
    forget(out)


def _windows(corpus: Corpus, seed: int) -> np.ndarray:
    """All whole windows of the text, shuffled; int32 [n, WINDOW]."""
    import numpy as np

    windows = corpus.ids[: len(corpus) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
    if corpus.bos is not None:
        windows[:, 0] = corpus.bos
    return np.random.default_rng(seed).permutation(windows)


def _notes(corpus: Corpus | None, recipe: Recipe, effort: Effort, report: Report) -> dict[str, Any]:
    """What the file says of its making."""
    name = "text of the model's own" if corpus is None else corpus.name
    minutes = "" if effort.minutes is None else f" in {report.minutes:.0f} minutes"  # not in what --tokens makes again
    made = f"{report.tokens} tokens{minutes} after a fit on {recipe.fit_tokens} tokens"
    return {
        "general.description": f"FFNs retrained with ReLU by hotcold relufy on {name}: {made}",
        "hotcold.relufy.texts": name.split(", "),
        "hotcold.relufy.distilled_tokens": report.tokens,
        "hotcold.relufy.density": effort.density,
        **{f"hotcold.relufy.{key}": value for key, value in asdict(recipe).items()},
    }
