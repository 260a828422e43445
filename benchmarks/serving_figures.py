"""From answers to the field's figures. Plain.

TTFT      meant to be sent -> first token          ITL   between two tokens of an answer
TPOT      (last - first token) / (tokens - 1)      E2E   meant to be sent -> last token
output tokens/s, requests/s   of whole answers, over the time from the first arrival to the last
                              token
steady requests/s             whole answers while the middle 80 % of them ended
goodput                       requests/s whose TTFT and TPOT are within what is stated
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.serving_load import LOAD_KINDS, Answer, Answers, Beside, Probe
from benchmarks.serving_metrics import TIERS
from benchmarks.workload import HOG

Figures = Mapping[str, Any]
PERCENTILES = (50, 90, 99)
_MIDDLE = (0.1, 0.9)


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count for goodput; ``itl_ms`` bounds its mean, TPOT."""

    ttft_ms: float
    itl_ms: float


def summary(values_s: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in ms. None: there are no values."""
    if not len(values_s):
        return None
    ms = 1e3 * np.asarray(values_s)
    return {
        "mean": float(ms.mean()),
        **{f"p{p}": float(np.percentile(ms, p)) for p in PERCENTILES},
    }


def ttft_s(answer: Answer) -> float:
    return answer.token_times_s[0] - answer.start_s


def e2e_s(answer: Answer) -> float:
    return answer.token_times_s[-1] - answer.start_s


def tpot_s(answer: Answer) -> float | None:
    """None: one token has no gap."""
    times_s = answer.token_times_s
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else None


def of_workload(answers: Answers, slo: Slo) -> dict[str, Any]:
    whole = [answer for answer in answers.found if answer.error is None]
    errors = Counter(answer.error for answer in answers.found if answer.error is not None)
    ends_s = sorted(answer.token_times_s[-1] for answer in whole)
    seconds = ends_s[-1] - answers.start_s if ends_s else 0.0
    num_tokens = sum(len(answer.token_times_s) for answer in whole)

    def per_s(number: float) -> float | None:
        return number / seconds if seconds else None

    others = [answer for answer in whole if answer.arrival.tenant != HOG]
    return {
        "num_requests": len(answers.found),
        "num_errors": sum(errors.values()),
        "errors": dict(errors),
        "distinct_adapters": len({answer.arrival.adapter for answer in answers.found}),
        "seconds": seconds,
        "output_tokens_per_s": per_s(num_tokens),
        "requests_per_s": per_s(len(whole)),
        "steady_requests_per_s": _steady_rate(ends_s),
        "goodput_per_s": per_s(sum(_is_good(answer, slo) for answer in whole)),
        **_latencies(whole),
        "others_ttft_ms": summary([ttft_s(answer) for answer in others]),
        "others_e2e_ms": summary([e2e_s(answer) for answer in others]),
    }


def _latencies(whole: Sequence[Answer]) -> dict[str, Any]:
    gaps = [np.diff(answer.token_times_s) for answer in whole]
    tpots = [tpot_s(answer) for answer in whole]
    return {
        "ttft_ms": summary([ttft_s(answer) for answer in whole]),
        "itl_ms": summary(np.concatenate(gaps).tolist() if gaps else []),
        "tpot_ms": summary([tpot for tpot in tpots if tpot is not None]),
        "e2e_ms": summary([e2e_s(answer) for answer in whole]),
    }


def _is_good(answer: Answer, slo: Slo) -> bool:
    tpot = tpot_s(answer) or 0.0
    return 1e3 * ttft_s(answer) <= slo.ttft_ms and 1e3 * tpot <= slo.itl_ms


def _steady_rate(ends_s: Sequence[float]) -> float | None:
    """Without the time when the first have not ended and the last run alone."""
    if len(ends_s) < 3:
        return None
    first, last = (round(share * (len(ends_s) - 1)) for share in _MIDDLE)
    span_s = ends_s[last] - ends_s[first]
    return (last - first) / span_s if span_s > 0 else None


def of_loads(beside: Beside) -> dict[str, Any]:
    gaps = {kind: summary(beside.gaps_s[kind]) for kind in LOAD_KINDS}
    none = gaps["none"]
    return {
        "num_errors": len(beside.errors),
        "errors": dict(Counter(beside.errors)),
        "itl_ms": gaps,
        "num_visits": beside.num_visits,
        "num_cold_adapters_left": beside.num_cold_adapters_left,
        "itl_p99_over_none": {
            kind: found["p99"] / none["p99"] if none and found else None
            for kind, found in gaps.items()
        },
    }


def of_probes(probes: Sequence[Probe]) -> dict[str, Any]:
    errors = [probe.error for probe in probes if probe.error is not None]
    found = {
        tier: [p.ttft_s for p in probes if p.tier == tier and p.ttft_s is not None]
        for tier in (*TIERS, "unknown")
    }
    ttfts = {tier: summary(values) for tier, values in found.items()}
    resident = ttfts["device"]
    return {
        "num_requests": len(probes),
        "num_errors": len(errors),
        "errors": dict(Counter(errors)),
        "num_probes": {tier: len(values) for tier, values in found.items()},
        "ttft_ms_by_tier": ttfts,
        "above_resident_ms": {
            tier: of_tier["p50"] - resident["p50"] if of_tier and resident else None
            for tier, of_tier in ttfts.items()
        },
    }


def figure(figures: Figures, path: str) -> float | None:
    """By its path: "ttft_ms.p99". None where this run has no such figure."""
    found: Any = figures
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return None if found is None else float(found)
