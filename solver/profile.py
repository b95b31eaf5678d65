"""The activation profile: how often each neuron is active on a text, and what that says about each layer."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType
from .corpus import N_CTX, Corpus
from .neurons import Rule

if TYPE_CHECKING:
    from ..runtime.engine import Engine

SAVE_S = 30.0
MOST = 0.8  # of all activations: skew is the share of the neurons that give these


@dataclass(frozen=True)
class LayerStats:
    """density: mean share of active neurons; skew: share of neurons that give 80 % of the activations."""

    density: float
    skew: float
    dead: int


def statistics(freq: np.ndarray) -> LayerStats:
    """Of frequencies [n] in 0..1; a skew of 0 where nothing is ever active."""
    x, y = cdf(freq)
    at = np.searchsorted(y, MOST * (1 - 1e-9)) if freq.any() else 0
    return LayerStats(float(freq.mean()), float(x[at]), int((freq == 0).sum()))


def cdf(freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of the neurons, most active first; share of all activations that they give), float64 [n + 1] each."""
    ordered = np.sort(freq.astype(np.float64))[::-1]
    total = ordered.sum() or 1.0
    return np.arange(len(freq) + 1) / len(freq), np.concatenate([[0.0], np.cumsum(ordered) / total])


class Count:
    """A count that survives interruption: windows that were counted whole, kept in a file until `drop`."""

    def __init__(self, file: Path, n_layer: int, n_ff: int) -> None:
        self.file = file
        self.counts = np.zeros((n_layer, n_ff), np.int64)
        self.tokens = 0
        try:
            with np.load(file, allow_pickle=False) as kept:
                if kept["counts"].shape == self.counts.shape:
                    self.counts, self.tokens = kept["counts"].astype(np.int64), int(kept["tokens"])
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            pass  # nothing kept, or nothing that is whole: count from the start

    def save(self) -> None:
        """Write what was counted, under a temporary name first."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out:
                np.savez(out, counts=self.counts, tokens=self.tokens)
            os.replace(temporary, self.file)
        finally:
            temporary.unlink(missing_ok=True)

    def drop(self) -> None:
        """Forget the file: the result is safe elsewhere."""
        self.file.unlink(missing_ok=True)


def kept_name(model: GGUFFile, corpus: Corpus, rule: Rule) -> str:
    """The file name under which a count of this model, text and rule is kept."""
    digest = hashlib.sha256()
    for name in sorted(model.tensors):
        info = model.tensors[name]
        digest.update(f"{name} {info.shape} {info.type}\n".encode())
        if len(info.shape) == 1:  # norms: small, and different in every model
            digest.update(model.data(name).tobytes())
    digest.update(f"{corpus.digest} {rule.name}".encode() + rule.thresholds.tobytes())
    digest.update(np.array(rule.floors, "<f4").tobytes())
    return f"profile-{digest.hexdigest()[:24]}.npz"


def counted(config: ModelConfig) -> int:
    """What is counted in each layer: neurons, or experts."""
    return config.n_expert or config.n_ff


def count(
    engine: Engine, corpus: Corpus, rule: Rule, kept: Count, progress: Callable[[int], object] = lambda tokens: None
) -> np.ndarray:
    """Count on from what is kept to the corpus' end; frequencies float32 [n_layer, counted].

    progress is called with the tokens counted so far. An interrupt leaves `kept` saved, for the next call to go on.
    """
    n_ctx = min(N_CTX, engine.n_ctx)
    look = _chosen if rule.by_expert else partial(_active, rule)
    saved = time.monotonic()
    try:
        for window in corpus.windows(n_ctx, kept.tokens):
            pending = np.zeros_like(kept.counts)
            look(engine, window, pending)
            # in one statement: an interrupt must not come between
            kept.counts, kept.tokens = kept.counts + pending, kept.tokens + len(window)
            progress(kept.tokens)
            if time.monotonic() - saved > SAVE_S:
                kept.save()
                saved = time.monotonic()
    except BaseException:
        if kept.tokens:
            kept.save()
        raise
    return (kept.counts / max(1, kept.tokens)).astype(np.float32)


def _active(rule: Rule, engine: Engine, window: np.ndarray, counts: np.ndarray) -> None:
    """Add how often each neuron is active in a window."""

    def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        counts[layer] += rule.active(layer, gate).sum(axis=0)

    sequence = engine.new_sequence()
    try:
        engine.observe(sequence, window, see)
    finally:
        sequence.close()


def _chosen(engine: Engine, window: np.ndarray, counts: np.ndarray) -> None:
    """Add how often each expert is chosen in a window."""
    before = engine.usage.experts
    sequence = engine.new_sequence()
    try:
        engine.eval(sequence, window)
    finally:
        sequence.close()
    after = engine.usage.experts
    assert before is not None and after is not None
    counts += after - before


def mixed(prior: np.ndarray, weight: int, freq: np.ndarray, tokens: int) -> np.ndarray:
    """Frequencies of `tokens` tokens, with a prior that counts as `weight` more."""
    return ((prior.astype(np.float64) * weight + freq.astype(np.float64) * tokens) / (weight + tokens)).astype(
        np.float32
    )


def contents(freq: np.ndarray, tokens: int, dataset: str, rule: str, per: int = 1) -> Contents:
    """The profile as a part of a section; freq: float32 [n_layer, counted]. per: neurons of each that was counted."""
    freq = np.repeat(freq, per, axis=1)
    tensors = [
        SectionTensor(f"blk.{layer}.ffn_act_freq", row.shape, GGMLType.F32, partial(row.view, np.uint8))
        for layer, row in enumerate(np.ascontiguousarray(freq, "<f4"))
    ]
    metadata = {
        "hotcold.profile.tokens": tokens,
        "hotcold.profile.dataset": dataset,
        "hotcold.profile.rule": rule,
    }
    return Contents(metadata, tensors)
