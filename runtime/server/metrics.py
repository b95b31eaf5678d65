"""What /metrics tells: counts of requests and tokens, what runs and waits, KV blocks, times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from ..llm import LLM
    from ..stats import Stats

LEVELS: dict[str, tuple[str, Callable[[LLM], int]]] = {
    "running": ("Answers that are being computed.", lambda llm: len(llm.scheduler.running)),
    "waiting": ("Answers that wait for their turn.", lambda llm: len(llm.scheduler.waiting)),
    "kv_blocks_total": ("Blocks of the KV cache.", lambda llm: llm.engine.cache.n_blocks),
    "kv_blocks_used": (
        "Blocks of the KV cache that answers hold.", lambda llm: llm.engine.cache.n_used - llm.engine.cache.n_idle
    ),
    "kv_blocks_cached": (
        "Blocks of beginnings that may come again, given up where room is wanted.",
        lambda llm: llm.engine.cache.n_idle,
    ),
}  # fmt: skip
TYPE = CONTENT_TYPE_LATEST
FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
EACH_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, models: Mapping[str, LLM]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "hotcold_requests", "Requests that were answered.", ("path", "status"), registry=registry
        )
        per_model: dict[str, Any] = {"labelnames": ("model",), "registry": registry}
        self.prompt_tokens = Counter("hotcold_prompt_tokens", "Tokens of prompts.", **per_model)
        self.cached_tokens = Counter("hotcold_cached_tokens", "Tokens of prompts that were cached.", **per_model)
        self.generated_tokens = Counter("hotcold_generated_tokens", "Tokens of answers.", **per_model)
        self.first_token = Histogram(
            "hotcold_time_to_first_token_seconds", "From the request to its first token.", buckets=FIRST_S, **per_model
        )
        self.each_token = Histogram(
            "hotcold_time_per_token_seconds", "Between an answer's tokens, its mean.", buckets=EACH_S, **per_model
        )
        registry.register(_Levels(models))

    def asked(self, model: str, usage: Mapping[str, Any]) -> None:
        """Count the prompts of a reply that has ended, each once, of its usage."""
        self.prompt_tokens.labels(model).inc(usage["prompt_tokens"])
        self.cached_tokens.labels(model).inc(usage["prompt_tokens_details"]["cached_tokens"])

    def answered(self, model: str, stats: Stats) -> None:
        """Count an answer that has ended."""
        self.generated_tokens.labels(model).inc(stats.decode_tokens)
        if stats.decode_tokens:
            self.first_token.labels(model).observe(stats.first_s)
        if stats.decode_tokens > 1 and stats.total_s:
            self.each_token.labels(model).observe((stats.total_s - stats.first_s) / (stats.decode_tokens - 1))

    def embedded(self, model: str, n_tokens: int) -> None:
        """Count texts that were embedded."""
        self.prompt_tokens.labels(model).inc(n_tokens)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)


class _Levels:
    """What is so at the moment it is asked for."""

    def __init__(self, models: Mapping[str, LLM]) -> None:
        self.models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family a figure, one sample a model."""
        for name, (help, level) in LEVELS.items():
            family = GaugeMetricFamily(f"hotcold_{name}", help, labels=["model"])
            for model, llm in list(self.models.items()):
                family.add_metric([model], level(llm))
            yield family
