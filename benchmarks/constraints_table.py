"""From a run's samples to figures beside their targets. Plain: no clock, no engine.

Ratios and differences are taken round by round, for a round's cases follow each other closely. A
step is that of the same round without a schema. Grammars may cost 5 % of it, and a constrained row
sits out one: its gap may be longer by 1.05 steps, a free row's by 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np

from benchmarks.constraints_cases import Case, Gaps, Sample, mixes
from benchmarks.constraints_masks import MaskTimes, Upload
from benchmarks.report import Bound, Spread, spread
from benchmarks.text_table import text_table

_MAY_COST = 0.05  # of a step
_GAPS: Mapping[str, Callable[[Gaps], float]] = {
    "p50": lambda gaps: gaps.p50_ms,
    "p99": lambda gaps: gaps.p99_ms,
}


@dataclass(frozen=True)
class Figure:
    """``bound`` None: nothing was promised."""

    what: str
    unit: str
    found: Spread
    bound: Bound | None = None

    @property
    def is_missed(self) -> bool:
        return self.bound is not None and not self.bound.holds(self.found.median)


@dataclass
class Findings:
    """What a run has found so far."""

    samples: list[Sample] = field(default_factory=list)
    masks: MaskTimes = field(default_factory=MaskTimes)  # of the served hold's cases
    upload: Upload | None = None
    firsts_ms: dict[str, list[float]] = field(default_factory=dict)  # by kind

    def at(self, hold: float) -> Found:
        return Found([s for s in self.samples if s.hold == hold])


@dataclass(frozen=True)
class Found:
    """The samples of one hold."""

    samples: Sequence[Sample]

    def of(self, case: Case) -> list[Sample]:
        return [s for s in self.samples if s.case == case.name]

    def beside(self, case: Case, other: Case) -> list[tuple[Sample, Sample]]:
        """Of each round that has both."""
        others = {s.round: s for s in self.of(other)}
        return [(s, others[s.round]) for s in self.of(case) if s.round in others]


def figures(findings: Findings, batch: int, hold: float) -> list[Figure]:
    found = findings.at(hold)
    base = Case(batch, 0)
    steps = [s.step_ms for s in found.of(base)]
    return [
        *_steps(found, batch),
        *_gaps(found, Case(batch, batch // 2), base),
        *_gaps(found, Case(batch, batch), base),
        *_gaps(found, Case(batch, 0, "new"), Case(batch, 0, "free")),
        *(_masks(findings, batch, mean(steps)) if steps else ()),
        *_firsts(findings.firsts_ms),
    ]


def _steps(found: Found, batch: int) -> Iterable[Figure]:
    base = Case(batch, 0)
    for case in mixes(batch):
        pairs = found.beside(case, base)
        if not pairs:
            continue
        yield Figure(f"step, {case.name}", "ms", spread(s.step_ms for s, _ in pairs))
        if case != base:
            ratios = spread(s.step_ms / other.step_ms for s, other in pairs)
            bound = Bound(high=(2 if case.num_constrained == batch else 1) + _MAY_COST)
            yield Figure(f"step, {case.name}, over none", "", ratios, bound)


def _gaps(found: Found, case: Case, other: Case) -> Iterable[Figure]:
    """Of its rows beside the free rows of the other."""
    pairs = found.beside(case, other)
    for rows, steps in (("free", 0), ("constrained", 1)):
        known = [
            (ours, theirs.free, theirs.step_ms)
            for s, theirs in pairs
            if (ours := getattr(s, rows)) is not None and theirs.free is not None
        ]
        for name, of in _GAPS.items() if known else ():
            what = f"ITL {name}, {case.name}, {rows} rows"
            longer = [of(ours) - of(theirs) for ours, theirs, _ in known]
            in_steps = [ms / step_ms for ms, (_, _, step_ms) in zip(longer, known, strict=True)]
            yield Figure(what, "ms", spread(of(ours) for ours, _, _ in known))
            yield Figure(f"{what}, longer than {other.name} by", "ms", spread(longer))
            bound = Bound(high=steps + _MAY_COST)
            yield Figure(f"{what}, longer than {other.name} by", "steps", spread(in_steps), bound)


def _masks(findings: Findings, batch: int, step_ms: float) -> Iterable[Figure]:
    """A token's part of an upload is a row's."""
    upload_us = 0.0
    if findings.upload is not None:
        yield Figure(f"upload of {batch} rows' masks", "us", findings.upload.thread_us)
        yield Figure(f"upload of {batch} rows' masks, until there", "us", findings.upload.ready_us)
        upload_us = findings.upload.thread_us.median / findings.upload.num_rows
    for name, seconds in (
        ("by the clock", findings.masks.clock_s),
        ("of a processor", findings.masks.processor_s),
    ):
        if not seconds:
            continue
        us = 1e6 * np.array(seconds)
        for p in (50, 99):
            yield _one(f"mask of a token, p{p} {name}", "us", float(np.percentile(us, p)))
        yield _one(f"mask of a token, mean {name}", "us", float(us.mean()))
        share = (float(us.mean()) + upload_us) / (1e3 * step_ms)
        bound = Bound(high=_MAY_COST)
        yield _one(f"mask and upload of a token, {name}", "steps", share, bound)
        yield _one(f"masks and upload of {batch} rows, {name}", "steps", batch * share)


def _firsts(firsts_ms: Mapping[str, Sequence[float]]) -> Iterable[Figure]:
    for kind, found in firsts_ms.items():
        yield Figure(f"first token, {kind}", "ms", spread(found))
    for kind in ("kept", "new"):
        if firsts_ms.get(kind) and firsts_ms.get("free"):
            longer = [a - b for a, b in zip(firsts_ms[kind], firsts_ms["free"], strict=True)]
            yield Figure(f"first token, {kind}, later than free by", "ms", spread(longer))


def _one(what: str, unit: str, value: float, bound: Bound | None = None) -> Figure:
    return Figure(what, unit, Spread(value, value, value), bound)


def figures_text(found: Sequence[Figure]) -> str:
    rows = [
        (
            figure.what,
            _number(figure.found.median),
            figure.unit,
            _range(figure.found),
            "" if figure.bound is None else str(figure.bound),
            "missed" if figure.is_missed else "",
        )
        for figure in found
    ]
    return text_table(("", "ours", "", "low..high", "target", ""), rows)


def cases_text(samples: Sequence[Sample]) -> str:
    """A row a hold and case: medians of the rounds."""
    headings = ("hold, case", "step", "free p50", "p99", "constrained p50", "p99", "rows/step")
    known = sorted({(s.hold, s.case): None for s in samples})
    return text_table(headings, [_case_row(samples, *key) for key in known])


def _case_row(samples: Sequence[Sample], hold: float, case: str) -> tuple[str, ...]:
    ours = [s for s in samples if (s.hold, s.case) == (hold, case)]
    cells = [_median(s.step_ms for s in ours)]
    for rows in ("free", "constrained"):
        cells += [_median(of(g) for s in ours if (g := getattr(s, rows))) for of in _GAPS.values()]
    return (f"{hold:g}, {case}", *cells, _median(s.rows_a_step for s in ours))


def _median(values: Iterable[float]) -> str:
    known = list(values)
    return _number(spread(known).median) if known else ""


def _range(found: Spread) -> str:
    return "" if found.low == found.high else f"{_number(found.low)}..{_number(found.high)}"


def _number(value: float) -> str:
    return (
        f"{value:.0f}"
        if abs(value) >= 1000
        else f"{value:.3g}"
        if abs(value) < 1
        else f"{value:.2f}"
    )
