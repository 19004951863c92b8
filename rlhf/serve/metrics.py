"""What a Prometheus server reads of `prudent serve`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_DISTANCE = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)  # 1 = the 95 % quantile of the reference responses
_STD = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        register: dict[str, Any] = {"registry": self.registry, "namespace": "prudent"}
        self.requests = Counter("requests", "Requests by dialect and status.", ("dialect", "status"), **register)
        self.seconds = Histogram(
            "request_seconds",
            "Seconds from a request's body to its answer.",
            ("dialect",),
            buckets=_SECONDS,
            **register,
        )
        self.queue_items = Gauge("queue_items", "Items waiting or being scored.", **register)
        self.dropped = Counter("dropped_items", "Items whose client went away or whose time was up.", **register)
        self.items = Counter("items", "Items scored.", ("model",), **register)
        self.nonfinite = Counter("nonfinite_items", "Items whose reward is not finite.", ("model",), **register)
        self.truncated = Counter("truncated_items", "Items that lost their beginning.", ("model",), **register)
        self.foreign = Counter("foreign_items", "Items at a distance above 1.", ("model",), **register)
        self.distance = Histogram(
            "distance", "Distance from the reference responses.", ("model",), buckets=_DISTANCE, **register
        )
        self.std = Histogram("head_std", "Mean of the heads' stds.", ("model",), buckets=_STD, **register)
        self.batch_items = Histogram("batch_items", "Items scored together.", buckets=_ITEMS, **register)
        self.batch_tokens = Histogram("batch_tokens", "Tokens scored together.", buckets=_TOKENS, **register)
        self.batch_seconds = Histogram("batch_seconds", "Seconds of scoring them.", buckets=_SECONDS, **register)

    def batch(self, model: str, lengths: Sequence[int], seconds: float) -> None:
        """Count a batch of sequences of these `lengths`."""
        self.items.labels(model).inc(len(lengths))
        self.batch_items.observe(len(lengths))
        self.batch_tokens.observe(sum(lengths))
        self.batch_seconds.observe(seconds)

    def scored(self, model: str, results: Iterable[Mapping[str, Any]]) -> None:
        """Count what the scores of an answer say."""
        for result in results:
            self.nonfinite.labels(model).inc(result["reward"] is None)
            self.truncated.labels(model).inc(result["truncated"])
            if None not in result["std"]:
                self.std.labels(model).observe(sum(result["std"]) / len(result["std"]))
            distance = result.get("distance")
            if distance is not None:
                self.distance.labels(model).observe(distance)
                self.foreign.labels(model).inc(distance > 1)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
