"""Turn a SwiGLU or GeGLU model into a ReLU model: train its FFNs against itself, resumably, and write the new file.

First each layer in turn, in closed form, so that the residual after it meets the teacher's; then all layers together,
so that the student's next-token distribution meets the teacher's while fewer and fewer neurons are active.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError, TrainingError
from ..formats.gguf import GGUFFile
from ..formats.pages import forget
from ..formats.section_file import update_section
from ..formats.tokenizer import load_tokenizer
from ..formats.types import GGMLType
from . import dialogues, relu_adapter, relu_file
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
    from .student import Student

SAVES = 20  # of the training of all layers together
RESERVE = 0.03  # of the minutes given, for writing the file
DIALOGUE_TIME = 0.06  # of the minutes given
MAX_DIALOGUES = 768  # windows; more are repeated
SELF_WINDOWS = 2048  # of text that the model writes where none is brought


@dataclass(frozen=True)
class Report:
    """What was made, measured on the held-out windows in the training's arithmetic."""

    teacher_perplexity: float
    perplexity: float
    densities: list[float]  # by layer
    n_dialogues: int  # windows that the model wrote itself
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
        with memory("the model and what a sweep keeps", "--fit-tokens 16384"):
            run = _Run(source, config, corpus, recipe, effort, work, say, advance)
        try:
            with memory("what a sweep keeps", "--fit-tokens 16384, or --low-rank and another file to write"):
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
        with suppress(Exception):  # the error that brought us here is the one to tell
            if self._training is not None and self._training.whole:
                self._save(self._training)
            self.work.save("seconds", self.seconds)

    def train(self) -> Report:
        """All stages."""
        text, held_out = self._text()
        self._teacher_perplexity, _ = self.student.evaluate(held_out)
        scored = len(held_out) * (WINDOW - 1 - WINDOW // 2)
        self.say(f"teacher: perplexity {self._teacher_perplexity:.2f} on {scored} held-out tokens")
        chats = self._dialogues()
        for sweep in range(self.recipe.sweeps):
            self._fit(sweep, text, chats, held_out)
        tokens = self._distil(text, chats, held_out)
        perplexity, densities = self._say_quality("done", held_out)
        n = 0 if chats is None else len(chats)
        return Report(self._teacher_perplexity, perplexity, densities, n, tokens, self.seconds / 60)

    def _text(self) -> tuple[Tensor, Tensor]:
        """(windows to train on, windows held out), int64 [n, WINDOW]."""
        import torch

        if self.corpus is None:
            written = self._written("text", SELF_WINDOWS, self._opening(), 0.3)
            return written[HELD_OUT:], written[:HELD_OUT]
        windows = torch.from_numpy(_windows(self.corpus, self.recipe.seed)).long()
        return windows[HELD_OUT:], windows[:HELD_OUT]

    def _opening(self) -> list[int]:
        """What text of the model's own begins with: that of its chats, or what begins or ends its documents."""
        if (start := dialogues.opening(self.source, WINDOW)) is not None:
            return start
        tokenizer = load_tokenizer(self.source)
        first = [id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None]
        if not first:
            raise ParameterError("text: got self, but the model has no token that begins a text; wanted text files")
        return first[:1]

    def _dialogues(self) -> Tensor | None:
        """Conversations as windows int64 [n, WINDOW]; None where none are wanted, or the model has no chat template."""
        if not self.recipe.chat or self.corpus is None:
            return None
        if (start := dialogues.opening(self.source, WINDOW)) is None:
            self.say("no dialogues: the model has no chat template")
            return None
        return self._written("dialogues", MAX_DIALOGUES, start, DIALOGUE_TIME)

    def _written(self, name: str, n_windows: int, start: list[int], share: float) -> Tensor:
        """Windows that the teacher writes, as many as there is time for, in rounds that are kept one by one."""
        import torch

        kept = self.work.load(name) or {"windows": torch.zeros(0, WINDOW, dtype=torch.long), "began": self.seconds}
        windows, n_round, least = kept["windows"], dialogues.BATCH * torch.get_num_threads(), MIN_WINDOWS + HELD_OUT
        while not kept.get("whole"):
            n, first = min(n_round, n_windows - len(windows)), len(windows) // dialogues.BATCH
            progress = partial(self.advance, f"writing {name}, {len(windows)}+")
            more = dialogues.write(self.student.teacher, start, n, WINDOW, self.recipe.seed + first, progress)
            windows = torch.cat([windows, more])
            took, minutes = self.seconds - kept["began"], self.effort.minutes
            enough = minutes is not None and took > share * 60 * minutes and len(windows) >= least
            kept |= {"windows": windows, "whole": enough or len(windows) >= n_windows}
            self._save_seconds(name, kept)
        self.say(f"{name}: the model wrote {len(windows)} windows of {WINDOW} tokens")
        return windows

    def _fit(self, sweep: int, text: Tensor, chats: Tensor | None, held_out: Tensor) -> None:
        """Fit layer after layer; those that are kept already are only walked through."""
        from .fit import Fitting
        from .student import Ffn

        recipe, student = self.recipe, self.student
        n_layer, n = student.teacher.config.n_layer, recipe.fit_tokens // WINDOW
        kept = [self.work.load(f"sweep-{sweep}-layer-{layer}") for layer in range(n_layer)]
        streams = None if None not in kept else Fitting(student, _mixed(text, chats, sweep * n, n, recipe.chat))
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

    def _distil(self, text: Tensor, chats: Tensor | None, held_out: Tensor) -> int:
        """Train all layers together, keeping the work some twenty times on the way; returns the tokens trained on."""
        import torch

        from .distill import Distillation, Plan
        from .top_tokens import Teaching

        recipe, effort = self.recipe, self.effort
        windows = text if chats is None else torch.cat([text, chats])
        teaching = Teaching(self.student.teacher, windows, len(text), self.work.folder)
        batch = recipe.batch_size // WINDOW
        steps = None if effort.tokens is None else effort.tokens // recipe.batch_size
        ubatch = min(batch, effort.ubatch_size // WINDOW)
        plan = Plan(effort.density, effort.lr, batch, ubatch, recipe.chat, recipe.seed, steps)
        self._distil_began = self.seconds
        training = Distillation(self.student, teaching, plan, self._time_over)
        if (state := self.work.load("together")) is not None:
            training.load(state)
            self._distil_began = state["began"]
        elif training.progress >= 1 and effort.minutes is not None:
            self.say(f"no time was left to train all layers together; --minutes {2 * self.seconds / 60:.0f} has some")
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


def _mixed(windows: Tensor, dialogues: Tensor | None, start: int, n: int, chat: float) -> Tensor:
    """`n` windows: the share `chat` of dialogues, the rest text from number `start` on; both begin again at the end."""
    import torch

    n_chat = 0 if dialogues is None else round(n * chat)
    parts = [windows[torch.arange(start, start + n - n_chat) % len(windows)]]
    if dialogues is not None:
        parts.append(dialogues[torch.arange(n_chat) % len(dialogues)])
    return torch.cat(parts)


def _notes(corpus: Corpus | None, recipe: Recipe, effort: Effort, report: Report) -> dict[str, Any]:
    """What the file says of its making."""
    name = "text of the model's own" if corpus is None else corpus.name
    made = f"{report.tokens} tokens in {report.minutes:.0f} minutes after a fit on {recipe.fit_tokens} tokens"
    if report.n_dialogues:
        made += f"; {recipe.chat:.0%} of them dialogues of the model's own"
    return {
        "general.description": f"FFNs retrained with ReLU by hotcold relufy on {name}: {made}",
        "hotcold.relufy.texts": name.split(", "),
        "hotcold.relufy.distilled_tokens": report.tokens,
        "hotcold.relufy.density": effort.density,
        **{f"hotcold.relufy.{key}": value for key, value in asdict(recipe).items()},
    }
