"""Counters, in Prometheus' words. One registry per engine; the text is made on request."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jlorax.types import EngineStats, FinishReason, Tier, TierStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_SWAP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


class _TierCollector:
    """What the tiers' own books count, shown as it is."""

    def __init__(self) -> None:
        self.stats: tuple[TierStats, ...] = ()

    def collect(self) -> Iterator[Metric]:
        for name, text in {
            "hits": "Requests whose adapter was found in this tier first",
            "misses": "Requests whose adapter was not in this tier",
            "evictions": "Adapters that made room for others",
        }.items():
            family = CounterMetricFamily(f"jlorax_adapter_tier_{name}", text, labels=["tier"])
            for tier in self.stats:
                family.add_metric([tier.tier.value], getattr(tier, name))
            yield family
        for name, field, text in (
            ("bytes", "used_bytes", "Bytes of adapters in this tier"),
            ("adapters", "num_adapters", "Adapters in this tier"),
        ):
            gauge = GaugeMetricFamily(f"jlorax_adapter_tier_{name}", text, labels=["tier"])
            for tier in self.stats:
                gauge.add_metric([tier.tier.value], getattr(tier, field))
            yield gauge


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"jlorax_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"jlorax_{name}", text, registry=self._registry, buckets=_SECONDS)

        self._requests = counter("requests", "Requests by outcome", "outcome")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests")
        self._generated_tokens = counter("generated_tokens", "Tokens generated")
        self._steps = counter("steps", "Device steps by kind", "kind")
        self._step_tokens = counter("step_tokens", "Tokens computed by steps", "kind")
        self._adapter_loads = counter("adapter_loads", "Adapters loaded, by where from", "tier")
        self._uploaded_bytes = counter("adapter_uploaded_bytes", "Written into the adapter bank")
        self._usable = Histogram(
            "jlorax_adapter_load_seconds",
            "From a miss noticed to an adapter usable, by where it came from",
            ("tier",),
            registry=self._registry,
            buckets=_SWAP_SECONDS,
        )
        self._tiers = _TierCollector()
        self._registry.register(self._tiers)
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token")
        self._e2e = histogram("request_seconds", "Arrival to last token")
        self._gauges = {
            name: Gauge(f"jlorax_{name}", text, registry=self._registry)
            for name, text in {
                "num_queued": "Requests that wait",
                "num_running": "Sequences that run",
                "free_pages": "KV pages free",
                "total_pages": "KV pages in all",
                "pinned_slots": "Adapter slots in use by running sequences",
                "used_slots": "Adapter slots that hold an adapter",
                "executables_compiled_after_ready": "Executables compiled while serving: 0",
            }.items()
        }

    def step(self, kind: str, num_tokens: int) -> None:
        self._steps.labels(kind).inc()
        self._step_tokens.labels(kind).inc(num_tokens)

    def adapter_loaded(self, tier: Tier) -> None:
        self._adapter_loads.labels(tier.value).inc()

    def adapter_uploaded(self, num_bytes: int) -> None:
        self._uploaded_bytes.inc(num_bytes)

    def adapter_usable(self, tier: Tier, seconds: float) -> None:
        self._usable.labels(tier.value).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def finished(
        self, reason: FinishReason, num_prompt: int, num_generated: int, seconds: float
    ) -> None:
        self._requests.labels(reason.value).inc()
        self._prompt_tokens.inc(num_prompt)
        self._generated_tokens.inc(num_generated)
        self._e2e.observe(seconds)

    def failed(self, code: str) -> None:
        self._requests.labels(code).inc()

    def render(self, stats: EngineStats) -> bytes:
        """Prometheus exposition text, with the gauges of this moment."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        self._tiers.stats = stats.tiers
        return generate_latest(self._registry)
