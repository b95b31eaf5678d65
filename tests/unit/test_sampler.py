"""Each sampler stage against a slow oracle that sorts everything, written from the definitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from hotcold.formats.errors import HotcoldError, ParameterError
from hotcold.runtime.sampler import Sampler, SamplingParams, log_softmax, top_ids

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def softmax(pairs: list[tuple[int, float]]) -> list[float]:
    peak = max(x for _, x in pairs)
    e = [math.exp(x - peak) for _, x in pairs]
    return [v / sum(e) for v in e]


def until(pairs: list[tuple[int, float]], p: list[float], order: list[int], mass: float, past: bool) -> list[int]:
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if total > mass or (not past and total == mass):
            break
    return kept


def oracle(logits: np.ndarray, params: SamplingParams, recent: list[int] = ()) -> dict[int, float]:
    """Token id -> probability by llama.cpp's chain, one plain step after another."""
    x = [float(v) for v in logits]
    for token, bias in params.logit_bias.items():
        x[token] += bias
    n = params.repeat_last_n
    last = list(recent) if n < 0 else list(recent)[-n:] if n else []
    for token in set(last):
        x[token] = x[token] * params.repeat_penalty if x[token] <= 0 else x[token] / params.repeat_penalty
        x[token] -= last.count(token) * params.frequency_penalty + params.presence_penalty
    pairs = sorted(enumerate(x), key=lambda pair: (-pair[1], pair[0]))
    if params.temperature <= 0:
        return {pairs[0][0]: 1.0}
    if params.top_k > 0:
        pairs = pairs[: params.top_k]
    if params.typical_p < 1:
        p = softmax(pairs)
        entropy = -sum(v * math.log(v) for v in p if v > 0)
        shift = [abs(-math.log(max(v, 1e-300)) - entropy) for v in p]
        order = sorted(range(len(p)), key=lambda i: (shift[i], pairs[i][0]))
        kept = until(pairs, p, order, params.typical_p, past=True)
        pairs = [pairs[i] for i in sorted(kept)]
    if params.top_p < 1:
        p = softmax(pairs)
        pairs = [pairs[i] for i in until(pairs, p, list(range(len(p))), params.top_p, past=False)]
    if params.min_p > 0:
        p = softmax(pairs)
        pairs = [pair for pair, v in zip(pairs, p, strict=True) if v >= params.min_p * max(p)]
    p = softmax([(i, v / params.temperature) for i, v in pairs])
    return {i: v for (i, _), v in zip(pairs, p, strict=True)}


def logits_row(seed: int, n: int = 700, spread: float = 2.5) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 13},
        {"top_k": 5000},
        {"top_p": 0.0},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"typical_p": 0.4},
        {"typical_p": 0.95},
        {"repeat_penalty": 1.3},
        {"repeat_penalty": 0.8, "repeat_last_n": -1},
        {"repeat_penalty": 1.3, "repeat_last_n": 0},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repeat_last_n": 7},
        {"frequency_penalty": -0.9},
        {"logit_bias": {3: 8.0, 5: -100.0, 699: -math.inf}},
        {
            "top_k": 40,
            "top_p": 0.8,
            "min_p": 0.05,
            "typical_p": 0.9,
            "temperature": 0.8,
            "repeat_penalty": 1.1,
        },
        {"top_p": 0.9, "min_p": 0.02, "typical_p": 0.97, "logit_bias": {1: 4.0}, "presence_penalty": 1.0},
        {"temperature": 0.0, "repeat_penalty": 1.5},
    ],
)
def test_distribution_equals_the_oracle(settings: dict, seed: int) -> None:
    params = SamplingParams(**{**OFF, **settings})
    logits = logits_row(seed)
    before = logits.copy()
    recent = [int(i) for i in np.random.default_rng(seed + 100).integers(0, 30, 90)]
    recent += [int(logits.argmax())] * 2
    ids, p = Sampler(params, len(logits), 1).probabilities(logits, recent)
    wanted = oracle(logits, params, recent)
    assert sorted(ids.tolist()) == sorted(wanted)
    np.testing.assert_allclose(p, [wanted[i] for i in ids.tolist()], rtol=2e-5)
    assert np.array_equal(logits, before), "sample must not touch its input"


def test_top_p_and_typical_grow_past_their_first_guess() -> None:
    flat = logits_row(4, n=6000, spread=0.05)
    for settings in ({"top_p": 0.9}, {"typical_p": 0.9}):
        params = SamplingParams(**{**OFF, **settings})
        ids, _ = Sampler(params, len(flat), 1).probabilities(flat)
        assert sorted(ids.tolist()) == sorted(oracle(flat, params))
        assert 5000 < len(ids) < 6000


def test_equal_logits_go_by_id() -> None:
    flat = np.zeros(50, np.float32)
    flat[7] = 1
    assert Sampler(SamplingParams(temperature=0), 50).sample(np.zeros(50, np.float32)) == 0
    ids, _ = Sampler(SamplingParams(**{**OFF, "top_k": 4}), 50).probabilities(flat)
    assert ids.tolist() == [0, 1, 2, 7]
    assert top_ids(flat, 3).tolist() == [7, 0, 1]
    assert top_ids(flat, 0).tolist() == []


def test_drawn_frequencies_follow_the_distribution() -> None:
    logits = logits_row(9, n=60, spread=1.5)
    params = SamplingParams(top_k=12, top_p=0.95, min_p=0.02, temperature=0.9, seed=11)
    sampler = Sampler(params, 60)
    wanted = oracle(logits, params)
    n = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=60)
    assert set(np.flatnonzero(counts).tolist()) <= set(wanted)
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in wanted.items())
    assert chi2 < 2.5 * len(wanted), chi2


def test_same_seed_same_draws() -> None:
    logits = logits_row(1)

    def draws(seed: int | None, argument: int | None = None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.5, top_k=0, min_p=0, seed=seed), len(logits), argument)
        return [sampler.sample(logits) for _ in range(30)]

    assert draws(5) == draws(5) == draws(None, 5) == draws(6, 5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)
    assert draws(-1) != draws(-1)


def test_tiny_temperature_is_the_argmax_without_overflow() -> None:
    logits = logits_row(2)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        sampler = Sampler(SamplingParams(**{**OFF, "temperature": 1e-30}), len(logits), 0)
        assert sampler.sample(logits) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad, word", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "ruled out")])
def test_broken_logits_are_a_clear_error(temperature: float, bad: float, word: str) -> None:
    logits = np.full(100, bad if bad == -math.inf else 0.5, np.float32)
    logits[42] = bad
    sampler = Sampler(SamplingParams(temperature=temperature), 100, 0)
    with pytest.raises(HotcoldError, match=word):
        sampler.sample(logits)
    with pytest.raises(HotcoldError, match=word):
        log_softmax(logits)


def test_log_softmax_sums_to_one() -> None:
    row = logits_row(3)
    p = np.exp(log_softmax(row).astype(np.float64))
    assert abs(p.sum() - 1) < 1e-5
    assert int(p.argmax()) == int(row.argmax())


def test_metadata_gives_defaults_and_the_caller_wins() -> None:
    file = {
        "temp": 0.3,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.1,
        "penalty_last_n": 9,
        "penalty_repeat": 1.2,
        "mirostat": 2,
    }
    params = SamplingParams.from_metadata(file, top_k=3, top_p=None, seed=4)
    assert params == SamplingParams(
        temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, repeat_last_n=9, repeat_penalty=1.2, seed=4
    )
    assert SamplingParams.from_metadata({"general.sampling.temp": 0.5}).temperature == 0.5
    assert SamplingParams.from_metadata({}) == SamplingParams()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 2.5},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2},
        {"typical_p": -1},
        {"repeat_penalty": 0},
        {"repeat_last_n": -2},
        {"presence_penalty": math.inf},
        {"frequency_penalty": None},
        {"logit_bias": [1, 2]},
        {"logit_bias": {"x": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"seed": -2},
        {"seed": 1.5},
    ],
)
def test_bad_parameters_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ParameterError, match=f"^{next(iter(settings))}"):
        SamplingParams(**settings)


def test_unknown_parameters_get_a_hint() -> None:
    with pytest.raises(ParameterError, match="did you mean temperature"):
        SamplingParams.from_metadata({}, temperatur=0.5)
    with pytest.raises(ParameterError, match="known: temperature, top_k"):
        SamplingParams.from_metadata({}, zzz=0.5)


def test_params_are_values() -> None:
    params = SamplingParams(logit_bias={"5": 1}, top_k=np.int64(3), temperature=np.float32(0.5))
    assert params.logit_bias == {5: 1.0} and params.top_k == 3 and params.temperature == 0.5
    assert hash(SamplingParams()) == hash(SamplingParams())
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 4  # type: ignore[misc]


def test_sampler_checks_what_it_is_given() -> None:
    with pytest.raises(ParameterError, match="logit_bias: got token id 100, wanted 0 to 99"):
        Sampler(SamplingParams(logit_bias={100: 1.0}), 100)
    with pytest.raises(ParameterError, match="logits: got shape"):
        Sampler(SamplingParams(), 100).sample(np.zeros(99, np.float32))


def test_the_largest_of_many_are_those_of_a_sort() -> None:
    """Ties at the edge and everywhere, what is ruled out, lengths that fill no whole table."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        n, k = int(rng.integers(1, 9000)), int(rng.integers(1, 50))
        row = rng.integers(0, int(rng.integers(1, 2000)), n).astype(np.float32)
        if rng.random() < 0.3:
            row[rng.random(n) < 0.99] = -np.inf
        if rng.random() < 0.3:
            row.sort()
        wanted = np.lexsort((np.arange(n), -row))[:k]
        np.testing.assert_array_equal(top_ids(row, k), wanted)
