"""What the benchmark of a kernel finds. Plain: no jax."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report import Spread

OURS = "ours"  # names of our contestants begin so
EMPTY = "empty"  # and of a chain on an op that does nothing
HOST_BOUND = "host-bound"


@dataclass(frozen=True)
class Result:
    """One contestant in one case. ``us`` None: not timed, and ``note`` says why."""

    op: str
    case: str
    floor_us: float
    target_us: float | None
    contestant: str
    us: Spread | None = None  # a call
    error: float | None = None  # relative to the largest; None: not compared
    note: str = ""
