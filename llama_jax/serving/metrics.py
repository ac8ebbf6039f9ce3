"""Metrics of a server in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from llama_jax.serving.batcher import Batcher

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of requests, and what the batcher counts, read when they are asked for."""

    def __init__(self, batcher: Batcher) -> None:
        """A registry of its own: several servers in one process do not meet."""
        self._registry = CollectorRegistry()
        self._registry.register(_OfBatcher(batcher))
        own: dict[str, Any] = {"registry": self._registry, "namespace": "llama_jax"}
        self.responses = Counter("http_responses", "Responses, by path and status", ["path", "status"], **own)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
            **own,
        )
        self.request = Histogram(
            "request_seconds", "From a request's arrival to its end", buckets=_SECONDS, **own
        )

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self._registry)


class _OfBatcher(Collector):
    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[Any]:
        batcher, totals = self._batcher, self._batcher.totals
        for name, help, value in (
            ("batch_size", "Rows of the batch", batcher.batch_size),
            ("requests_running", "Requests in rows, or whose prompt is being run", batcher.running),
            ("requests_waiting", "Requests in the queue", batcher.waiting),
        ):
            yield GaugeMetricFamily(f"llama_jax_{name}", help, value)
        for name, help, value in (
            ("requests", "Texts that have ended, in whatever way", totals.requests),
            ("prompt_tokens", "Tokens of prompts", totals.prompt_tokens),
            ("shared_tokens", "Tokens of prompts that were copied from another row", totals.shared_tokens),
            ("new_tokens", "Generated tokens", totals.new_tokens),
            ("steps", "Decoding steps of the whole batch", totals.steps),
        ):
            yield CounterMetricFamily(f"llama_jax_{name}", help, value)
