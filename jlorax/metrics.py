"""Counters, in Prometheus' words. One registry per engine; the text is made on request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jlorax.types import EngineStats, FinishReason, Tier

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


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
        self._adapter_lookups = counter("adapter_lookups", "Slots asked for", "result")
        self._adapter_loads = counter("adapter_loads", "Adapters loaded, by where from", "tier")
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

    def adapter_hit(self) -> None:
        self._adapter_lookups.labels("hit").inc()

    def adapter_miss(self) -> None:
        self._adapter_lookups.labels("miss").inc()

    def adapter_loaded(self, tier: Tier) -> None:
        self._adapter_loads.labels(tier.value).inc()

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
        return generate_latest(self._registry)
