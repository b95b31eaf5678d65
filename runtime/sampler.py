"""From a row of logits to a token id: bias, penalties, top-k, typical, top-p, min-p, temperature, draw.

The order is llama.cpp's. The first cut is a partition, so no stage sorts the vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import HotcoldError, ParameterError

# general.sampling.* names that differ from ours; equal names need no row
_METADATA_NAMES = {
    "temp": "temperature",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
}
_HEIGHT = 64  # scores whose largest is looked at first
_METADATA_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> float:
    """A finite real number in [low, high], as float; ParameterError otherwise."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ParameterError(f"{name}: got {value!r:.60}, wanted a finite number")
    if not low <= number <= high:
        raise ParameterError(f"{name}: got {value}, wanted {low:g} to {high:g}")
    return number


def check_ids(ids: object, n_vocab: int) -> list[int]:
    """Token ids as a list of int; ParameterError for anything else or an id out of range."""
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ParameterError(f"token ids: got {type(ids).__name__}, wanted a flat list of integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_vocab:
        raise ParameterError(f"token ids: got {low if low < 0 else high}, wanted 0 to {n_vocab - 1}")
    found: list[int] = array.tolist()
    return found


def check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An integer in [low, high] (None = no bound), as int; ParameterError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ParameterError(f"{name}: got {value!r:.60}, wanted an integer")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ParameterError(f"{name}: got {number}, wanted {bounds}")
    return number


def reject_unknown(given: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise ParameterError for the first keyword in `given` that `known` lacks, with the nearest name."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ParameterError(f"{name}: unknown argument; {hint}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; `temperature <= 0` is greedy, `top_k <= 0` and `repeat_last_n` 0 are off.

    `repeat_last_n` -1 looks at the whole context; `seed` None or -1 draws a fresh one for every call.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        self._put("temperature", check_number("temperature", self.temperature, -math.inf))
        for name in ("presence_penalty", "frequency_penalty"):
            self._put(name, check_number(name, getattr(self, name), -1e30, 1e30))
        for name in ("top_p", "min_p", "typical_p"):
            self._put(name, check_number(name, getattr(self, name), 0.0, 1.0))
        # the bound keeps logit * penalty finite
        self._put("repeat_penalty", check_number("repeat_penalty", self.repeat_penalty, 1e-3, 1e3))
        self._put("top_k", check_int("top_k", self.top_k))
        self._put("repeat_last_n", check_int("repeat_last_n", self.repeat_last_n, -1))
        self._put("logit_bias", _checked_bias(self.logit_bias))
        if self.seed is not None:
            self._put("seed", check_int("seed", self.seed, -1))

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_metadata(cls, sampling: Mapping[str, float | int], **overrides: Any) -> SamplingParams:
        """The file's general.sampling.* values (short names as keys) under the caller's, None = not given.

        Keys of the file that hotcold has no sampler for (mirostat, xtc, ...) are left out.
        """
        reject_unknown(overrides, PARAM_NAMES)
        values: dict[str, Any] = {}
        for key, value in sampling.items():
            short = key.rsplit(".", 1)[-1]
            name = _METADATA_NAMES.get(short, short)
            if name in _METADATA_FIELDS:
                values[name] = value
        values.update((name, value) for name, value in overrides.items() if value is not None)
        return cls(**values)


PARAM_NAMES: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams))


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ParameterError(f"logit_bias: got {type(bias).__name__}, wanted a mapping of token id to number")
    checked = {}
    for key, value in bias.items():
        # OpenAI requests come as JSON, whose keys are strings
        token = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
        token = check_int("logit_bias token id", token, 0)
        banned = isinstance(value, Real) and value == -math.inf
        checked[token] = -math.inf if banned else check_number(f"logit_bias[{token}]", value, -1e30, 1e30)
    return checked


class Sampler:
    """Draws tokens by one SamplingParams from its own PCG64 generator; `seed` overrides the params' seed."""

    def __init__(self, params: SamplingParams, n_vocab: int, seed: int | None = None) -> None:
        outside = [token for token in params.logit_bias if token >= n_vocab]
        if outside:
            raise ParameterError(f"logit_bias: got token id {outside[0]}, wanted 0 to {n_vocab - 1}")
        self.params = params
        self.n_vocab = n_vocab
        chosen = params.seed if seed is None else seed
        self._rng = np.random.Generator(np.random.PCG64(None if chosen is None or chosen < 0 else chosen))
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))

    def sample(self, logits: NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """The next token id for `logits` float32 (n_vocab,), which stays as it is; `recent` is penalised."""
        if self.params.temperature <= 0:
            scores = self._adjusted(logits, recent)
            token = int(scores.argmax())
            _check_peak(float(scores[token]))
            return token
        ids, p = self.probabilities(logits, recent)
        draws = p.cumsum()
        return int(ids[min(int(draws.searchsorted(self._rng.random() * draws[-1], "right")), len(ids) - 1)])

    def probabilities(
        self, logits: NDArray[np.float32], recent: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The distribution that `sample` draws from: surviving token ids and their float64 probabilities."""
        q = self.params
        scores = self._adjusted(logits, recent)
        peak = int(scores.argmax())
        _check_peak(float(scores[peak]))
        if q.temperature <= 0:
            return np.array([peak]), np.ones(1)
        ids = _largest(scores, q.top_k)
        x = scores[ids].astype(np.float64)
        if q.typical_p < 1:
            p = _softmax(x)
            surprise = -np.log(np.maximum(p, 1e-300))
            keep = _lead(np.abs(surprise - p @ surprise), p, q.typical_p, "right")
            ids, x = ids[keep], x[keep]
        if q.top_p < 1 or q.min_p > 0:
            # both keep a head of the same order, so the cheap cut may go first if p is from before it
            p = _softmax(x)
            if q.min_p > 0:
                keep = np.flatnonzero(x >= x.max() + math.log(q.min_p))
                ids, x, p = ids[keep], x[keep], p[keep]
            if q.top_p < 1:
                keep = _lead(-p, p, q.top_p, "left")
                ids, x = ids[keep], x[keep]
        # the peak goes first: a tiny temperature must not divide it to infinity
        return ids, _softmax((x - x.max()) / q.temperature)

    def _adjusted(self, logits: NDArray[np.float32], recent: Sequence[int]) -> NDArray[np.float32]:
        q = self.params
        if logits.shape != (self.n_vocab,):
            raise ParameterError(f"logits: got shape {logits.shape}, wanted ({self.n_vocab},)")
        last = recent if q.repeat_last_n < 0 else recent[max(0, len(recent) - q.repeat_last_n) :]
        penalised = len(last) > 0 and not (
            q.repeat_penalty == 1 and q.presence_penalty == 0 and q.frequency_penalty == 0
        )
        if not penalised and not len(self._bias_ids):
            return logits
        scores = logits.astype(np.float32, copy=True)
        scores[self._bias_ids] += self._bias
        if penalised:
            counts = Counter(last)
            ids = np.fromiter(counts.keys(), np.int64, len(counts))
            times = np.fromiter(counts.values(), np.float32, len(counts))
            x = scores[ids]
            x = np.where(x <= 0, x * np.float32(q.repeat_penalty), x / np.float32(q.repeat_penalty))
            scores[ids] = x - times * np.float32(q.frequency_penalty) - np.float32(q.presence_penalty)
        return scores


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities of one row of logits, float32 (n_vocab,)."""
    peak = float(logits.max())
    _check_peak(peak)
    shifted = logits - np.float32(peak)
    return shifted - np.float32(math.log(float(np.exp(shifted).sum(dtype=np.float64))))


def top_ids(row: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """The ids of the n largest entries, largest first; equal entries by id."""
    if n <= 0:
        return np.empty(0, np.int64)
    ids = _largest(row, n)
    return ids[np.argsort(-row[ids], kind="stable")]


def _check_peak(peak: float) -> None:
    # max and argmax both surface a NaN, so looking at the peak covers the row
    if math.isnan(peak) or peak == math.inf:
        raise HotcoldError(f"logits: got {peak}, wanted finite numbers; the model file or a logits_processor is broken")
    if peak == -math.inf:
        raise HotcoldError("logits: every token is ruled out; loosen logit_bias or the logits_processor")


def _largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k largest scores in id order (all for k <= 0); ties at the edge go to the lower ids."""
    n = len(scores)
    if k <= 0 or k >= n:
        return np.arange(n)
    ids = _above(scores, k)
    found = scores[ids]
    edge = np.partition(found, len(ids) - k)[len(ids) - k]
    ids = ids[found >= edge]
    if len(ids) > k:
        above = int((scores[ids] > edge).sum())
        tied = np.flatnonzero(scores[ids] == edge)
        ids = np.delete(ids, tied[k - above :])
    return ids


def _above(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids, in order, of few scores among which are the k largest and all that equal these."""
    n = len(scores) // _HEIGHT  # columns of a table of the scores
    if k > n // 4:
        return np.arange(len(scores))
    tops = scores[: n * _HEIGHT].reshape(_HEIGHT, n).max(axis=0)
    # k columns have a score that is at least this, so the k-th largest of all is no less
    bound = np.partition(tops, n - k)[n - k]
    columns = np.flatnonzero(tops >= bound)
    if len(columns) > n // 4:  # many are equal
        return np.arange(len(scores))
    ids = (np.arange(0, n * _HEIGHT, n)[:, None] + columns).ravel()
    ids = np.concatenate([ids[scores[ids] >= bound], np.arange(n * _HEIGHT, len(scores))])
    ids.sort()
    return ids


def _lead(key: NDArray[np.float64], p: NDArray[np.float64], mass: float, side: Any) -> NDArray[np.int64]:
    """Positions in ascending order of key until p sums up to ("left") or past ("right") mass; never none."""
    n, take = len(key), 256
    while True:
        if take >= n:
            picked = np.argsort(key, kind="stable")
        else:
            picked = np.flatnonzero(key <= np.partition(key, take - 1)[take - 1])
            picked = picked[np.argsort(key[picked], kind="stable")]
        cut = int(p[picked].cumsum().searchsorted(mass, side))
        if cut < len(picked) or take >= n:
            return picked[: cut + 1]
        take *= 8


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max())
    return e / e.sum()
