"""Metrics of a server in Prometheus' text format, under the names that dashboards for vLLM read, and what spans add to them.

https://docs.vllm.ai/en/latest/design/metrics.html. What the scheduler counts is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from selfspan_jax.serving.requests import Stats

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKENS = (1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def _used(stats: Stats) -> float:
    return stats.pages_used / max(1, stats.pages_used + stats.pages_cached + stats.pages_free)  # there is none where all have ended


# Read from the scheduler's stats.
_GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "vllm:num_requests_running": ("Sequences that have a place.", lambda stats: stats.running + stats.reading),
    "vllm:num_requests_waiting": ("Requests that wait for a place.", lambda stats: stats.waiting),
    "vllm:kv_cache_usage_perc": ("Share of the cache's pages that sequences hold, 1 for all.", _used),
    "selfspan:pages_in_use": ("Pages of the cache that sequences hold.", lambda stats: stats.pages_used),
    "selfspan:pages_cached": ("Pages kept for prompts that begin alike.", lambda stats: stats.pages_cached),
    "selfspan:pages_free": ("Pages that hold nothing.", lambda stats: stats.pages_free),
}
_COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "vllm:prefix_cache_queries": ("Prompt tokens looked up.", lambda stats: stats.prompt_tokens + stats.prefix_hit_tokens),
    "vllm:prefix_cache_hits": ("Prompt tokens whose rows were there.", lambda stats: stats.prefix_hit_tokens),
    "vllm:num_preemptions": ("Sequences that lost their pages, and were read again.", lambda stats: stats.preemptions),
    "selfspan:attended_tokens": ("Cache rows that written tokens attended to.", lambda stats: stats.attended_tokens),
    "selfspan:context_tokens": ("Cache rows that dense attention would have read.", lambda stats: stats.context_tokens),
    "selfspan:copied_rows": ("Cache rows copied from host memory, because steps named them.", lambda stats: stats.copied_rows),
    "selfspan:missed_rows": ("Cache rows read in host memory, over the link.", lambda stats: stats.missed_rows),
}


class Metrics:
    """What one server counts."""

    def __init__(self, model: str, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._model = model

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, says, ["model_name"], buckets=buckets, registry=self._registry).labels(model)

        self._finished = counter("vllm:request_success", "Responses by how they ended.", "finished_reason")
        self._prompts = counter("vllm:prompt_tokens", "Prompt tokens of responses that have begun.").labels(model)
        self._written = counter("vllm:generation_tokens", "Tokens of responses.").labels(model)
        self._spans = counter("selfspan:span_tokens", "Written tokens that open or name a span: the overhead of spans.").labels(model)
        self._first = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", _SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between tokens, averaged over those that come together.", _SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _SECONDS)
        self._prompt_size = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._size = histogram("vllm:request_generation_tokens", "Tokens of a response.", _TOKENS)
        self._registry.register(_Stats(model, stats))

    def arrived(self, num_tokens: int, seconds: float, prompt_tokens: int | None = None) -> None:
        """Count tokens that came together, `seconds` after those before them; the first, with those of the prompt, after the request."""
        if prompt_tokens is not None:
            self._prompts.inc(prompt_tokens)
            self._prompt_size.observe(prompt_tokens)
            self._first.observe(seconds)
        else:
            self._between.observe(seconds / num_tokens)

    def written(self, num_tokens: int) -> None:
        """Count tokens that a response has for sure: when it has ended, those of `finished`."""
        self._written.inc(num_tokens)

    def finished(self, reason: str, num_tokens: int, span_tokens: int, seconds: float) -> None:
        """Count a response: "stop", "length", "abort" of a client that went away, or "error"."""
        self._finished.labels(self._model, reason).inc()
        self._spans.inc(span_tokens)
        self._size.observe(num_tokens)
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Write all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Stats(Collector):
    def __init__(self, model: str, stats: Callable[[], Stats]):
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        for kind, families in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (says, value) in families.items():
                family = kind(name, says, labels=["model_name"])
                family.add_metric([self._model], value(stats))
                yield family
