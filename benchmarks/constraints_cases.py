"""What ``benchmarks constraints`` asks the engine for, and how figures follow from times. Plain.

A case is a batch of which some rows answer under a JSON schema, and all draw at temperature 1: the
masks are the only difference. Figures are of the time in which every row decodes (its window).

step       ms between tokens, the mean over rows that are in every step: those without a schema, or
           all where there are none
ITL        ms between one row's tokens: p50 and p99 over the free rows, and over the constrained
visitors   the batch but one row is free, and in the last others come for one token each: free ones,
           or each under a schema that was never compiled
first      ms to the first token of a request by itself: free, under a schema that is kept, and
           under one that is new
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jlorax.types import Constraint, ConstraintKind, GenerateRequest, SamplingParams

GROUPS = ("mix", "visitors", "first")
FIRST_KINDS = ("free", "kept", "new")
FIRST_OF_ALL = "the process's first schema"  # which also prepares the vocabulary
VISITOR_KINDS = ("free", "new")
_SETTLE_TOKENS = 4  # of every row, after which all of them decode
_MIN_ITEMS = 64  # of the answer's list: more than any answer here has room for
_MAKER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "since": {"type": ["integer", "null"], "minimum": 1800, "maximum": 2026},
    },
    "required": ["name", "country", "since"],
    "additionalProperties": False,
}
_ITEM = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99999},
        "name": {"type": "string", "maxLength": 40},
        "category": {"enum": ["fruit", "tool", "book", "garden"]},
        "price": {"type": "number", "minimum": 0, "maximum": 1000},
        "in_stock": {"type": "boolean"},
        "tags": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "maxItems": 4,
        },
        "maker": _MAKER,
    },
    "required": ["id", "name", "category", "price", "in_stock", "tags", "maker"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens, and of requests by themselves a kind and round."""

    num_out: int = 256
    num_firsts: int = 10


QUICK = Sizes(num_out=24, num_firsts=2)


@dataclass(frozen=True)
class Case:
    """``visitors`` None: nobody comes; then every row of the batch is one of ours."""

    batch: int
    num_constrained: int
    visitors: str | None = None

    @property
    def name(self) -> str:
        if self.visitors is not None:
            return f"visitors {self.visitors}"
        return f"{self.num_constrained} of {self.batch}"

    @property
    def constrained(self) -> tuple[bool, ...]:
        """Of each row, whether it has a schema."""
        num_rows = self.batch - (self.visitors is not None)
        return tuple(row < self.num_constrained for row in range(num_rows))

    def num_out(self, num_out: int, is_constrained: bool) -> int:
        """A constrained row in company draws in every second step: all are to end together."""
        in_company = self.num_constrained < self.batch
        return num_out // 2 if is_constrained and in_company else num_out


def mixes(batch: int) -> list[Case]:
    return [Case(batch, n) for n in sorted({0, 1, batch // 2, batch})]


def visited(batch: int) -> list[Case]:
    return [Case(batch, 0, kind) for kind in VISITOR_KINDS]


def schema(title: str) -> Constraint:
    """A list of nested objects, longer than any answer here; another schema for every title."""
    shape: dict[str, Any] = {
        "title": title,
        "type": "object",
        "properties": {
            "order": {"type": "string", "maxLength": 20},
            "items": {"type": "array", "items": _ITEM, "minItems": _MIN_ITEMS},
        },
        "required": ["order", "items"],
        "additionalProperties": False,
    }
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(shape))


KEPT = schema("order")


def request(
    prompt: tuple[int, ...], num_out: int, constraint: Constraint | None, seed: int
) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        sampling=SamplingParams(temperature=1.0, seed=seed),
        max_new_tokens=num_out,
        ignore_eos=True,
        detokenize=False,
        constraint=constraint,
    )


@dataclass(frozen=True)
class Gaps:
    """Between one row's tokens, over several rows; ms."""

    p50_ms: float
    p99_ms: float
    mean_ms: float


@dataclass(frozen=True)
class Sample:
    """One round of a case. ``free``, ``constrained``: None where there are no such rows."""

    case: str
    hold: float
    round: int
    step_ms: float
    free: Gaps | None
    constrained: Gaps | None
    rows_a_step: float  # of all decode steps


def sample(
    case: Case, hold: float, number: int, times_s: Sequence[Sequence[float]], rows_a_step: float
) -> Sample:
    """``times_s``: when each row's tokens came. Raises ValueError when too few came together."""
    within = _window(times_s)
    free = _gaps_of([t for t, bound in zip(within, case.constrained, strict=True) if not bound])
    bound = _gaps_of([t for t, bound in zip(within, case.constrained, strict=True) if bound])
    every = free or bound
    assert every is not None
    return Sample(case.name, hold, number, every.mean_ms, free, bound, rows_a_step)


def _window(times_s: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of every row the tokens that came while all rows decoded."""
    begin_s = max(times[_SETTLE_TOKENS] for times in times_s)
    end_s = min(times[-1] for times in times_s)
    within = [[t for t in times if begin_s <= t <= end_s] for times in times_s]
    fewest = min(map(len, within))
    if fewest < 2:
        raise ValueError(f"a row has {fewest} tokens while all decode; longer answers are needed")
    return within


def _gaps_of(times_s: Sequence[Sequence[float]]) -> Gaps | None:
    if not times_s:
        return None
    gaps_ms = 1e3 * np.concatenate([np.diff(times) for times in times_s])
    p50, p99 = np.percentile(gaps_ms, (50, 99))
    return Gaps(float(p50), float(p99), float(gaps_ms.mean()))
