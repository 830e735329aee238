"""What Prometheus reads: requests, tokens, latency, the batch's mix, tiers; per adapter with a bound on names."""

import threading
from collections.abc import Iterator
from typing import Any

from lorakit.serve.bank import Bank
from lorakit.serve.engine import Engine

BASE, OTHER = "(base)", "(other)"  # no adapter can be called so
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Labels:
    """Adapter names as label values: the first `most` different ones; what comes after counts as OTHER."""

    def __init__(self, most: int) -> None:
        self._most, self._known = most, set[str]()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> str:
        if name is None:
            return BASE
        with self._lock:
            if len(self._known) < self._most:
                self._known.add(name)
            return name if name in self._known else OTHER


class Metrics:
    """Counters of one server, in a registry of their own. most_adapters: names that get a label of their own."""

    def __init__(self, engine: Engine, bank: Bank, *, most_adapters: int = 100) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self._labels = Labels(most_adapters)
        self._requests = Counter(
            "lorakit_requests", "Requests answered by an adapter.", ["adapter", "route"], registry=self.registry
        )
        self._answers = Counter("lorakit_http", "HTTP answers.", ["route", "status"], registry=self.registry)
        self._tokens = Counter(
            "lorakit_tokens", "Tokens read and written.", ["adapter", "kind"], registry=self.registry
        )
        self._seconds = Histogram(
            "lorakit_request_seconds", "Time of a whole request.", ["route"], buckets=BUCKETS, registry=self.registry
        )
        self._first = Histogram(
            "lorakit_first_token_seconds", "Time to a stream's first text.", buckets=BUCKETS, registry=self.registry
        )
        self.registry.register(_Gauges(engine, bank))

    def answered(
        self, adapter: str | None, route: str, *, prompt_tokens: int, new_tokens: int, requests: int = 1
    ) -> None:
        label = self._labels.of(adapter)
        self._requests.labels(label, route).inc(requests)
        self._tokens.labels(label, "prompt").inc(prompt_tokens)
        self._tokens.labels(label, "new").inc(new_tokens)

    def http(self, route: str, status: int, seconds: float) -> None:
        self._answers.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_text(self, seconds: float) -> None:
        self._first.observe(seconds)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _Gauges:
    """What the engine and the bank count themselves, read when Prometheus asks."""

    def __init__(self, engine: Engine, bank: Bank) -> None:
        self._engine, self._bank = engine, bank

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._engine.stats()
        for name in ("running", "adapters_in_batch", "requests_in_batch"):
            yield GaugeMetricFamily(f"lorakit_{name}", f"{name.replace('_', ' ')} now", value=getattr(stats, name))
        for name in ("finished", "failed", "cancelled", "steps"):
            yield CounterMetricFamily(f"lorakit_engine_{name}", f"{name} since the start", value=getattr(stats, name))
        bank = CounterMetricFamily("lorakit_bank", "What the bank of adapters did since the start.", labels=["event"])
        for name, value in self._bank.counters().items():
            if name == "bytes":
                yield GaugeMetricFamily("lorakit_bank_bytes", "Bytes of adapters in memory.", value=value)
            else:
                bank.add_metric([name], value)
        yield bank
        tiers = GaugeMetricFamily("lorakit_adapters", "Loaded adapters by where they are.", labels=["tier"])
        where = [one.tier for one in self._bank.resident()]
        for tier in ("disk", "memory", "device"):
            tiers.add_metric([tier], where.count(tier))
        yield tiers

    def describe(self) -> list[Any]:
        return []  # nothing is known of them before the engine runs
