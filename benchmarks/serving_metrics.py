"""What a server says of itself: Prometheus' text, differences of it, and memory over time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving_targets import Target

TIERS = ("device", "host", "disk", "source")  # the fastest first
_PREFIX = "jlorax_adapter_"
_SAMPLE_EVERY_S = 1.0

Sample = tuple[str, tuple[tuple[str, str], ...]]
Reading = Mapping[Sample, float]


def read(text: str) -> Reading:
    """(name, sorted labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(reading: Reading, name: str, **labels: str) -> float | None:
    """None: there is no such sample."""
    return reading.get((_PREFIX + name, tuple(sorted(labels.items()))))


def grown(before: Reading, after: Reading, name: str, **labels: str) -> float | None:
    """How much a counter rose; one that appeared meanwhile began at 0. None: it is not there."""
    last = value(after, name, **labels)
    return None if last is None else last - (value(before, name, **labels) or 0.0)


def came_from(before: Reading, after: Reading) -> str:
    """The tier that the one adapter asked for meanwhile was in; "unknown" without such counters."""
    uploaded = grown(before, after, "uploaded_bytes_total")
    if uploaded is None:
        return "unknown"
    for tier in ("source", "disk"):
        if grown(before, after, "loads_total", tier=tier):
            return tier
    return "host" if uploaded else "device"


def adapter_figures(before: Reading, after: Reading) -> dict[str, object]:
    """Of the time between the two readings; None stands for what the server does not report."""
    tiers = {tier: _tier_figures(before, after, tier) for tier in TIERS}
    loads = [tier["loads"] for tier in tiers.values() if tier["loads"] is not None]
    return {
        "tiers": tiers,
        "loads": sum(loads) if loads else None,
        "uploaded_bytes": grown(before, after, "uploaded_bytes_total"),
    }


def _tier_figures(before: Reading, after: Reading, tier: str) -> dict[str, float | None]:
    """A load ends with an adapter in the bank, and counts for the tier that it came from."""
    hits = grown(before, after, "tier_hits_total", tier=tier)
    misses = grown(before, after, "tier_misses_total", tier=tier)
    asked = (hits or 0.0) + (misses or 0.0)
    count = grown(before, after, "load_seconds_count", tier=tier)
    total_s = grown(before, after, "load_seconds_sum", tier=tier)
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": (hits or 0.0) / asked if asked else None,
        "evictions": grown(before, after, "tier_evictions_total", tier=tier),
        "bytes": value(after, "tier_bytes", tier=tier),
        "loads": count,
        "swap_ms_mean": 1e3 * total_s / count if count and total_s is not None else None,
        "swap_ms_p99_at_most": _bucket_ms(before, after, tier, 0.99),
    }


def _bucket_ms(before: Reading, after: Reading, tier: str, share: float) -> float | None:
    """The upper edge of the histogram's bucket that the share falls into; None: no loads."""
    name = _PREFIX + "load_seconds_bucket"
    edges = sorted(
        (float(dict(labels)["le"]), number - before.get((sample, labels), 0.0))
        for (sample, labels), number in after.items()
        if sample == name and dict(labels).get("tier") == tier
    )
    if not edges or not edges[-1][1]:
        return None
    return next(1e3 * edge for edge, number in edges if number >= share * edges[-1][1])


# ---- memory


@dataclass
class MemoryLog:
    times_s: list[float] = field(default_factory=list)
    rss_bytes: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float | None]:
        """The slope is of the second half, when caches are full: % of its mean a minute."""
        if not self.rss_bytes:
            return dict.fromkeys(("rss_first_bytes", "rss_last_bytes", "slope_percent_per_min"))
        return {
            "rss_first_bytes": self.rss_bytes[0],
            "rss_last_bytes": self.rss_bytes[-1],
            "slope_percent_per_min": slope_percent_per_min(self.times_s, self.rss_bytes),
        }


def slope_percent_per_min(times_s: list[float], values: list[float]) -> float | None:
    """Least squares over the second half of the samples; None: too few of them."""
    half = len(values) // 2
    x, y = np.asarray(times_s[half:]), np.asarray(values[half:])
    if len(y) < 2:
        return None
    return float(100 * 60 * np.polyfit(x - x[0], y, 1)[0] / y.mean())


@asynccontextmanager
async def memory_log(target: Target) -> AsyncIterator[MemoryLog]:
    """Samples while the body runs: first and last included."""
    log = MemoryLog()

    async def note() -> None:
        rss_bytes = await target.rss_bytes()
        if rss_bytes is not None:
            log.times_s.append(time.perf_counter())
            log.rss_bytes.append(rss_bytes)

    async def keep() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_EVERY_S)
            await note()

    await note()
    sampling = asyncio.create_task(keep())
    try:
        yield log
    finally:
        sampling.cancel()
        await asyncio.wait([sampling])
    await note()
