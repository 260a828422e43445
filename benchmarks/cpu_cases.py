"""What ``benchmarks cpu`` measures and what it should find: cases, prompts, promises. Plain."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import RATES, Bound, Measurements, Verdict

OURS, PEFT, LLAMA = "jlorax", "peft", "llama.cpp"
BATCH = 8
NUM_IN = 64  # tokens
RANK = 16
_ORDINARY_TOKENS = range(17, 49_152)  # SmolLM2's, without the special ones


@dataclass(frozen=True)
class Case:
    """``adapters`` has one entry a row (None: the base model); all rows are submitted at once."""

    name: str
    adapters: tuple[str | None, ...]


ADAPTERS = tuple(f"adapter-{i:04d}" for i in range(BATCH))
BASE_1, ONE_1 = "base, batch 1", "one adapter, batch 1"
BASE_8, ONE_8, DIFFERENT_8 = "base, batch 8", "one adapter, batch 8", "8 different, batch 8"
CASES = (
    Case(BASE_1, (None,)),
    Case(ONE_1, ADAPTERS[:1]),
    Case(BASE_8, (None,) * BATCH),
    Case(ONE_8, ADAPTERS[:1] * BATCH),
    Case(DIFFERENT_8, ADAPTERS),
)

_LEAST_RATIO = {
    (ONE_1, PEFT): Bound(low=2.4),
    (ONE_1, LLAMA): Bound(low=0.85),
    (DIFFERENT_8, PEFT): Bound(low=3.0),
    (DIFFERENT_8, LLAMA): Bound(low=3.0),
}
_ADAPTERS_COST = Bound(high=0.20)
_FIRST_START_S, _SECOND_START_S = Bound(high=90.0), Bound(high=10.0)


def prompts(seed: int) -> list[list[int]]:
    """One a row, all different: i[BATCH][NUM_IN] of ordinary tokens."""
    draw = random.Random(seed)
    return [draw.choices(_ORDINARY_TOKENS, k=NUM_IN) for _ in range(BATCH)]


def turns(contestants: Sequence[str], number: int) -> Iterator[tuple[Case, str]]:
    """Case by case; in every round another contestant begins."""
    first = number % len(contestants)
    order = [*contestants[first:], *contestants[:first]]
    return itertools.product(CASES, order)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens before each row's first difference: 1.0 is all equal.

    Float32 sums in another order, and greedy text forks at a near tie: so less than 1.0 is no
    fault, but nothing equal would be a contestant that computes something else.
    """
    pairs = list(zip(ours, theirs, strict=True))
    equal = sum(len(list(itertools.takewhile(lambda t: t[0] == t[1], zip(a, b)))) for a, b in pairs)  # noqa: B905
    return equal / sum(len(a) for a, _ in pairs)


def verdicts(measured: Measurements, ready_s: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Every promise that this run could test, judged by whole requests."""
    rate = RATES["request tokens/s"]
    found = [
        (f"{case}: {OURS} / {peer}", measured.ratio(OURS, peer, case, rate), bound)
        for (case, peer), bound in _LEAST_RATIO.items()
    ]
    cost = measured.extra_cost(OURS, DIFFERENT_8, BASE_8, rate)
    found.append(("8 different adapters over the bare base", cost, _ADAPTERS_COST))
    first, *later = ready_s.get(OURS, ())[:1], *ready_s.get(OURS, ())[1:]
    found += [(f"{OURS}, first start, s", second, _FIRST_START_S) for second in first]
    if later:
        found.append((f"{OURS}, slowest later start, s", max(later), _SECOND_START_S))
    return [Verdict(what, value, bound) for what, value, bound in found if value is not None]
