"""From timings to medians, ratios and a table. Plain: no clock, no process.

Two rates, the same for every contestant; B rows of ``num_out`` tokens each:
  request tokens/s = B * num_out / whole_s                     (prompts included)
  decode tokens/s  = B * (num_out - 1) / (whole_s - first_s)   (first_s: the same with 1 token out)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """One contestant, case and round. Seconds count from the requests' start to the last token."""

    contestant: str
    case: str
    round: int
    batch: int
    num_out: int
    first_s: float  # with one token out
    whole_s: float  # with num_out tokens out

    @property
    def request_tokens_per_s(self) -> float:
        return self.batch * self.num_out / self.whole_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.batch * (self.num_out - 1) / (self.whole_s - self.first_s)


Rate = Callable[[Measurement], float]
RATES: dict[str, Rate] = {
    "request tokens/s": lambda m: m.request_tokens_per_s,
    "decode tokens/s": lambda m: m.decode_tokens_per_s,
}


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.1f}"
        return f"{self.median:.1f} ({self.low:.1f}..{self.high:.1f})"


def spread(values: Iterable[float]) -> Spread:
    known = list(values)
    return Spread(statistics.median(known), min(known), max(known))


@dataclass(frozen=True)
class Bound:
    """What a figure should be: at least ``low``, or below ``high``."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value < self.high)

    def __str__(self) -> str:
        return f">= {self.low:g}" if self.low is not None else f"< {self.high:g}"


@dataclass(frozen=True)
class Verdict:
    """One promise, and whether this run kept it."""

    what: str
    value: float
    bound: Bound

    @property
    def is_met(self) -> bool:
        return self.bound.holds(self.value)

    def __str__(self) -> str:
        mark = "[green]met[/]" if self.is_met else "[red]missed[/]"
        return f"{self.what}: {self.value:.2f} ({self.bound}) {mark}"


class Measurements:
    """All rounds, to be asked by contestant and case."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        self._measured = measured

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(m.case for m in self._measured))

    @property
    def contestants(self) -> list[str]:
        return list(dict.fromkeys(m.contestant for m in self._measured))

    def spread(self, contestant: str, case: str, rate: Rate) -> Spread | None:
        """None when this contestant did not run the case."""
        found = [m for m in self._measured if (m.contestant, m.case) == (contestant, case)]
        return spread(rate(m) for m in found) if found else None

    def ratio(self, ours: str, theirs: str, case: str, rate: Rate) -> float | None:
        """Our median over theirs."""
        a, b = self.spread(ours, case, rate), self.spread(theirs, case, rate)
        return None if a is None or b is None else a.median / b.median

    def extra_cost(self, contestant: str, case: str, base_case: str, rate: Rate) -> float | None:
        """How much longer a token of ``case`` takes than one of ``base_case``: 0.2 is 20 %."""
        a, b = self.spread(contestant, case, rate), self.spread(contestant, base_case, rate)
        return None if a is None or b is None else b.median / a.median - 1


def rate_table(title: str, measurements: Measurements, ours: str) -> Table:
    """Cases and rates down, contestants across, then our ratio to each peer."""
    peers = [name for name in measurements.contestants if name != ours]
    table = Table(title=title, caption="median (lowest..highest) of the rounds")
    table.add_column("")
    for name in (ours, *peers, *(f"{ours} / {peer}" for peer in peers)):
        table.add_column(name, justify="right")
    for label, rate in RATES.items():
        table.add_section()
        table.add_row(f"[bold]{label}[/]")
        for case in measurements.cases:
            spreads = [measurements.spread(name, case, rate) for name in (ours, *peers)]
            ratios = [measurements.ratio(ours, peer, case, rate) for peer in peers]
            table.add_row(case, *(_cell(s) for s in spreads), *(_ratio(r) for r in ratios))
    return table


def add_figures(table: Table, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Further rows below the rates: a label, and one cell a contestant."""
    table.add_section()
    for label, cells in rows:
        table.add_row(label, *cells)


def _cell(value: Spread | None) -> str:
    return "-" if value is None else str(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


class JsonLines:
    """A file of results that is whole after every line."""

    def __init__(self, path: Path, run: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._run = run

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "run": self._run, **values}) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
