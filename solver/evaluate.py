"""Quality over density: how well the modes of some models predict texts, beside a reference on the same windows.

Windows and scoring are perplexity.py's. Whatever compares two models is paired by position: the ratio of perplexities
is exp of the mean difference of log-likelihoods, whose standard error is far below that of either perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import FormatError, ParameterError
from ..formats.gguf import GGUFFile
from ..formats.section import find_section
from ..formats.tokenizer import load_tokenizer
from . import conversations, corpus, own_text
from . import perplexity as estimator
from .ffn_reads import read_share
from .neurons import RELUS, Rule
from .perplexity import BLOCK_ROWS, Estimate
from .profile import statistics

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.sparsity import Plan

WINDOWS = 8
CONVERSATIONS = "conversations"
# Share of the neurons that give 80 % of the activations in PowerInfer's models (SOSP 2024, section 3.1).
PUBLISHED_SKEWS = {"OPT-30B": 0.26, "ReGLU-70B": 0.43}
_ROWS = 128  # of logits at a time: an engine returns so many without a copy
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """Windows of token ids, all equally long."""

    name: str
    windows: list[list[int]]


@dataclass(frozen=True)
class Score:
    """How a mode predicts a text.

    ratio: of its perplexity to the reference's. kl: mean of KL(reference || mode) over the whole vocabulary, nats a
    token. same: share of positions at which both think the same token likeliest. densities: share of active neurons by
    layer. read: bytes of FFN weights that a token reads, over those of gate, up and down.
    """

    tokens: int
    perplexity: float
    error: float
    ratio: float
    ratio_error: float
    kl: float
    same: float
    densities: list[float]
    read: float

    @property
    def density(self) -> float:
        return sum(self.densities) / len(self.densities)


@dataclass(frozen=True)
class Row:
    """A model in a mode; series is one of SERIES, skew the share of its neurons that give 80 % of the activations."""

    model: Path
    mode: str
    series: str
    skew: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)  # by text


@dataclass(frozen=True)
class Report:
    """The reference first; notes: what was left out."""

    rows: list[Row]
    texts: list[Text]
    notes: list[str]


def evaluate(
    models: Sequence[Path],
    against: Path | None = None,
    modes: Sequence[str] = (),
    files: Sequence[Path] = (),
    default_text: bool = True,
    n_ctx: int = corpus.N_CTX,
    chunks: int = WINDOWS,
    n_threads: int | None = None,
    progress: Progress = lambda line: None,
) -> Report:
    """Measure each model's modes; against: the reference, which runs dense (None: the first model).

    modes: of every model; without any, those that each can run. files: texts, each measured by itself, to which
    Python's help topics (default_text) and conversations that the reference writes are added. chunks: windows of n_ctx
    tokens of each text; -1: all. Two models' weights are in use at a time, mapped. ParameterError: models of different
    vocabularies, a mode that a model cannot run, a text too short for a window.
    """
    from ..runtime.engine import Engine

    against = against or models[0]
    wanted = [_modes(path, against, modes) for path in models]
    texts, notes = _texts(against, files, default_text, n_ctx, chunks, n_threads, progress)
    total, done = len(models) * sum(len(text.windows) for text in texts), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(f"measured {done} of {total} windows")

    def open_engine(path: Path, mode: str, section: bool = True) -> Engine:
        settings = {"n_ctx": n_ctx, "n_threads": n_threads, "load": "mmap", "progress": progress}
        return Engine(path, sparsity=mode, use_section=section, **settings)  # type: ignore[arg-type]

    with open_engine(against, "dense") as reference:
        rows = [Row(against, "dense", "dense")]
        for path, chosen in zip(models, wanted, strict=True):
            with ExitStack() as stack:
                runs = [stack.enter_context(open_engine(path, mode)) for mode in chosen]
                scores = {text.name: measure([reference, *runs], text, advance) for text in texts}
                if path == models[0]:
                    rows[0].scores.update((name, found[0]) for name, found in scores.items())
                skews = _routed(runs) if runs and runs[0].config.n_expert else None
                plans = [run.plan for run in runs]
                mapped = not reference.file.powerinfer and (not runs or not runs[0].file.powerinfer)
            if skews is None and any(plans) and mapped:
                progress("counting activations")
                with open_engine(path, "dense", False) as engine:
                    skews = _skews(engine, texts, plans)
            for number, mode in enumerate(chosen):
                found = {name: each[number + 1] for name, each in scores.items()}
                series = _series(mode, runs[number].config, reference.config)
                rows.append(Row(path, mode, series, skews[number] if skews else None, found))
    return Report(rows, texts, notes)


def measure(engines: Sequence[Engine], text: Text, advance: Callable[[], object] = lambda: None) -> list[Score]:
    """Scores of several engines on a text, of which the first is the reference; all see a window before the next."""
    tallies = [_Tally() for _ in engines]
    before = [engine.usage for engine in engines]
    for window in text.windows:
        for parts in zip(*(estimator.blocks(engine, window, _ROWS) for engine in engines), strict=True):
            targets = parts[0][1]
            for start in range(0, len(targets), BLOCK_ROWS):
                rows = slice(start, start + BLOCK_ROWS)
                _take(tallies, [logits[rows] for logits, _ in parts], targets[rows])
        advance()
    found = []
    for tally, engine, earlier in zip(tallies, engines, before, strict=True):
        layers = (engine.usage - earlier).layers
        densities = np.ones(engine.config.n_layer) if layers is None else layers[1] / np.maximum(1, layers[0])
        own, paired, n = tally.own, tally.paired, tally.own.count
        if not np.isfinite([own.ppl, paired.ppl, tally.kl]).all():
            mode = "dense" if engine.plan is None else str(engine.plan.sparsity)
            raise FormatError(engine.file.path, f"logits on {text.name} ({mode})", "no numbers", "finite ones")
        found.append(
            Score(
                n, own.ppl, own.error, paired.ppl, paired.error, max(0.0, tally.kl / n), tally.same / n,
                densities.tolist(), read_share(engine, densities),
            )
        )  # fmt: skip
    return found


@dataclass
class _Tally:
    """Sums over the scored tokens; paired: of the differences to the reference's log-likelihoods."""

    own: Estimate = field(default_factory=Estimate)
    paired: Estimate = field(default_factory=Estimate)
    kl: float = 0.0
    same: int = 0


def _take(tallies: Sequence[_Tally], logits: Sequence[np.ndarray], targets: np.ndarray) -> None:
    """Take in some positions; logits: float32 [n, n_vocab] of each engine."""
    first = _log_softmax(logits[0])
    shares, best = np.exp(first), logits[0].argmax(axis=1)
    places = np.arange(len(targets)), targets
    for tally, own in zip(tallies, logits, strict=True):
        scores = first if own is logits[0] else _log_softmax(own)
        tally.own.add(-scores[places])
        tally.paired.add(first[places] - scores[places])
        tally.kl += float((shares * (first - scores)).sum())
        tally.same += int((own.argmax(axis=1) == best).sum())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In double precision."""
    moved = logits.astype(np.float64)
    moved -= moved.max(axis=1, keepdims=True)
    moved -= np.log(np.exp(moved).sum(axis=1, keepdims=True))
    return moved


def _modes(path: Path, against: Path, wanted: Sequence[str]) -> list[str]:
    """The modes to measure of a model: those wanted, or all that it has; the reference's own is left out."""
    from ..runtime.sparsity import Sparsity, plan

    asked = [Sparsity.parse(mode) for mode in wanted]
    with GGUFFile(path) as file, GGUFFile(against) as other:
        config = ModelConfig.from_gguf(file)
        _check_vocabulary(file, config, other)
        section = find_section(file, config)
        try:
            for mode in asked:
                plan(mode, config, section)
            zeros = config.activation in RELUS and not config.n_expert
            found = [str(mode) if mode.kind != "auto" else "exact" if zeros else "dense" for mode in asked]
            if not asked:
                found = ["exact" if zeros else "dense"]
                limits = section.thresholds() if section else None
                found += [] if limits is None else [f"threshold={d:g}" for d in limits.densities if d < 1]
                if section and section.predictors() and not config.n_expert:
                    found.append("predict")
        except ParameterError as error:
            raise ParameterError(f"{path}: {error}") from None
        finally:
            if section:
                section.close()
    return [mode for mode in dict.fromkeys(found) if mode != "dense" or path != against]


def _check_vocabulary(file: GGUFFile, config: ModelConfig, other: GGUFFile) -> None:
    key = "tokenizer.ggml.tokens"
    ours, theirs, n_theirs = file.get(key, []), other.get(key, []), ModelConfig.from_gguf(other).n_vocab
    if ours == theirs and config.n_vocab == n_theirs:
        return
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    got = f"{config.n_vocab} tokens" if at is None else f"{config.n_vocab} tokens, of which number {at} is another"
    raise ParameterError(
        f"{file.path}: vocabulary: got {got}, wanted the {n_theirs} of {other.path}; "
        f"only models of one vocabulary can be compared"
    )


def _texts(
    against: Path,
    files: Sequence[Path],
    default_text: bool,
    n_ctx: int,
    chunks: int,
    n_threads: int | None,
    progress: Progress,
) -> tuple[list[Text], list[str]]:
    with GGUFFile(against) as file:
        tokenizer, start = load_tokenizer(file), own_text.opening(file, n_ctx)
        templated = bool(file.metadata.get("tokenizer.chat_template"))
    texts: list[Text] = []
    for paths in [*([path] for path in files), *([[]] if default_text else [])]:
        read = corpus.load(paths, tokenizer, None if chunks < 0 else chunks * n_ctx, 0)
        if len(read) < n_ctx:
            raise ParameterError(f"{read.name}: got {len(read)} tokens, wanted at least one window of {n_ctx} (-c)")
        windows = [window.tolist() for window in read.windows(n_ctx)]
        taken = {CONVERSATIONS, *(text.name for text in texts)}
        names = chain([read.name], (f"{read.name} ({n})" for n in count(2)))
        name = next(name for name in names if name not in taken)
        texts.append(Text(name, [window for window in windows if len(window) == n_ctx]))
    if start is None:
        if not texts:
            raise ParameterError(f"texts: got none, and {against} cannot write conversations; wanted --text FILE")
        lacks = "a chat template whose opening fits half a window" if templated else "a chat template"
        return texts, [f"no conversations: {against} has not {lacks}"]
    texts.append(Text(CONVERSATIONS, _written(against, start, n_ctx, chunks, n_threads, progress)))
    return texts, []


def _written(
    against: Path, start: list[int], n_ctx: int, chunks: int, n_threads: int | None, progress: Progress
) -> list[list[int]]:
    from ..runtime.engine import Engine

    n = WINDOWS if chunks < 0 else chunks

    def tell(written: int, total: int) -> None:
        progress(f"writing conversations, {written} of {total} tokens")

    with Engine(
        against, n_ctx=n_ctx, n_threads=n_threads, sparsity="dense", n_parallel=min(n, 32), progress=progress
    ) as engine:
        return conversations.write(engine, start, n, n_ctx, progress=tell)


def _skews(engine: Engine, texts: Sequence[Text], plans: Sequence[Plan | None]) -> list[float | None]:
    """Of each plan, by its rule for active neurons; engine: the model, dense and without its section."""
    limits = {plan.thresholds for plan in plans if plan}
    rules = {each: Rule(engine.config.activation, 1.0, np.asarray(each, np.float32)) for each in limits}
    counts = {each: np.zeros((engine.config.n_layer, engine.config.n_ff), np.int64) for each in limits}

    def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        for each, rule in rules.items():
            counts[each][layer] += rule.active(layer, gate).sum(axis=0)

    total = 0
    for window in (window for text in texts for window in text.windows):
        sequence = engine.new_sequence()
        try:
            engine.observe(sequence, window, see)
        finally:
            sequence.close()
        total += len(window)
    return [statistics(np.ravel(counts[plan.thresholds] / total)).skew if plan else None for plan in plans]


def _routed(runs: Sequence[Engine]) -> list[float | None]:
    """Of mixtures of experts: the share of the experts that gives 80 % of the choices."""
    found = [run.usage.experts for run in runs]
    return [None if experts is None else statistics(np.ravel(experts)).skew for experts in found]


def _series(mode: str, config: ModelConfig, reference: ModelConfig) -> str:
    """What a mode is in a plot of quality over density."""
    kind = mode.partition("=")[0]
    relufied = config.activation in RELUS and reference.activation not in RELUS
    return {
        "exact": "relufied (exact)" if relufied else "exact",
        "threshold": "relufied (threshold)" if relufied else "threshold",
        "predict": "relufied + predictors" if relufied else "predictors",
    }.get(kind, kind)
