"""The tables that a serving run ends with; "-" where a figure is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Verdict
from benchmarks.serving_figures import PERCENTILES, Figures, figure
from benchmarks.serving_metrics import TIERS
from benchmarks.serving_presets import Preset, Promise
from benchmarks.text_table import text_table

_TIMES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
_RATES = {
    "requests": "num_requests",
    "errors": "num_errors",
    "versions": "distinct_adapters",
    "s": "seconds",
    "tok/s": "output_tokens_per_s",
    "req/s": "requests_per_s",
    "goodput/s": "goodput_per_s",
    "loads": "adapters.loads",
    "GB uploaded": "adapters.uploaded_bytes",
    "RSS %/min": "memory.slope_percent_per_min",
}
_TIER = {
    "hits": "hits",
    "misses": "misses",
    "hit rate": "hit_rate",
    "evictions": "evictions",
    "MB": "bytes",
    "loads": "loads",
    "swap ms": "swap_ms_mean",
    "p99 at most": "swap_ms_p99_at_most",
}
_SCALES = {"GB uploaded": 1e-9, "MB": 1e-6}


@dataclass(frozen=True)
class Judged:
    """A promise beside what this run found. ``value`` None: not measured."""

    preset: str
    promise: Promise
    value: float | None

    @property
    def verdict(self) -> Verdict | None:
        if self.value is None:
            return None
        return Verdict(f"{self.preset}: {self.promise.what}", self.value, self.promise.bound)

    def fields(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "what": self.promise.what,
            "value": self.value,
            "target": str(self.promise.bound),
            "peer": self.promise.peer,
            "met": None if self.verdict is None else self.verdict.is_met,
        }


def judge(presets: Sequence[Preset], results: Mapping[str, Figures], is_h100: bool) -> list[Judged]:
    """The promises of the presets that ran, as far as they hold on this shape."""
    return [
        Judged(preset.name, promise, promised(promise, preset.name, results))
        for preset in presets
        if preset.name in results
        for promise in preset.promises
        if is_h100 or not promise.is_of_h100
    ]


def promised(promise: Promise, preset: str, results: Mapping[str, Figures]) -> float | None:
    ours = figure(results[preset], promise.figure)
    if promise.over is None or ours is None:
        return ours
    other = figure(results.get(promise.over, {}), promise.figure)
    return ours / other if other else None


def times_text(results: Mapping[str, Figures]) -> str:
    """A row a preset and latency, in ms."""
    columns = ("mean", *(f"p{p}" for p in PERCENTILES))
    rows = [
        (f"{preset} {_label(path)}", *(_cell(figure(figures, f"{path}.{c}")) for c in columns))
        for preset, figures in results.items()
        for path in _time_paths(figures)
    ]
    return text_table(("ms", *columns), rows)


def _time_paths(figures: Figures) -> list[str]:
    """Latencies are by name, or by a further word: a tier, or who came meanwhile."""
    by_word = [name for name in ("itl_ms", "ttft_ms_by_tier") if _is_by_word(figures.get(name))]
    further = [
        f"{name}.{word}" for name in by_word for word in figures[name] if figures[name][word]
    ]
    plain = [name for name in _TIMES if figures.get(name) and name not in by_word]
    return plain + further


def _is_by_word(found: Any) -> bool:
    return isinstance(found, Mapping) and "mean" not in found


def _label(path: str) -> str:
    name, _, word = path.partition(".")
    return f"{name.split('_ms')[0].upper()} {word}".strip()


def rates_text(results: Mapping[str, Figures]) -> str:
    rows = [
        (preset, *(_scaled(figures, label, path) for label, path in _RATES.items()))
        for preset, figures in results.items()
    ]
    return text_table(("", *_RATES), rows)


def tiers_text(results: Mapping[str, Figures]) -> str:
    """A row a preset and tier that the target reports anything of."""
    rows = [
        (
            f"{preset} {tier}",
            *(_scaled(figures, label, f"adapters.tiers.{tier}.{n}") for label, n in _TIER.items()),
        )
        for preset, figures in results.items()
        for tier in TIERS
    ]
    known = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return text_table(("tier", *_TIER), known)


def verdicts_text(judged: Sequence[Judged]) -> str:
    rows = [
        (
            f"{j.preset}: {j.promise.what}",
            _cell(j.value),
            str(j.promise.bound),
            "-" if j.verdict is None else "met" if j.verdict.is_met else "missed",
            j.promise.peer,
        )
        for j in judged
    ]
    return text_table(("", "ours", "target", "", "vLLM"), rows)


def _scaled(figures: Figures, label: str, path: str) -> str:
    found = figure(figures, path)
    return _cell(None if found is None else found * _SCALES.get(label, 1))


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.4g}"
