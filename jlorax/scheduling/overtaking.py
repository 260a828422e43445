"""For how long a line that lacks nothing but a slot is passed by, and what happens then.

Passed by: a sequence is admitted that arrived later, of a tenant whose turn is not earlier. Once
that has gone on for max_overtake_s the line is overdue, and whatever would prolong its wait is held
until its adapter has a slot:

adapters that are not pinned    get no slot before it, unless it is their tenant's turn
adapters that hold a slot       of n overdue ones before a sequence, each needs one slot; the n
                                adapters that will release theirs first admit nothing more, the
                                others may: they would not have been the first anyway
rows                            one is left free while the slot of one is on its way
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from heapq import nsmallest
from itertools import takewhile

from jlorax.scheduling.fairness import FairShares
from jlorax.scheduling.pins import PinBook
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.waiting import Line, Waiting
from jlorax.types import AdapterVersion


def late_lines(waiting: Waiting, max_overtake_s: float, now_s: float) -> list[Line]:
    """Whoever was passed by for the longest first. One that has a slot by now is late until it is
    admitted, or it would lose the slot again."""
    since_s = waiting.passed_since_s
    return list(takewhile(lambda line: now_s - since_s[line] > max_overtake_s, since_s))


def overdue_lines(late: list[Line], pins: PinBook) -> list[Line]:
    """The late ones that lack a slot still; of several lines for one adapter the first."""
    overdue: dict[AdapterVersion | None, Line] = {}
    for line in late:
        if _lacks_slot(line, pins):
            overdue.setdefault(line.version, line)
    return list(overdue.values())


def not_behind(late: list[Line], waiting: Waiting, shares: FairShares) -> Iterable[Line]:
    """All lines; while one is late, only the late and those of tenants whose turn is earlier.

    Late ones that have their slots count too: were the others let in then, they might take a slot
    from a late one, which would take it back, and so on without an end.
    """
    if not late:
        return waiting.every_line()
    counters = {line.tenant: shares.tenants[line.tenant] for line in late}
    earlier = shares.tenants.below(min(counters.values()))
    if not earlier:
        return late
    may = set(late)
    return [line for line in waiting.every_line() if line in may or line.tenant in earlier]


class Holds:
    """What the overdue lines hold back in one plan."""

    def __init__(
        self,
        overdue: list[Line],
        shares: FairShares,
        pins: PinBook,
        tokens_left: Mapping[AdapterVersion, int],
    ) -> None:
        """``tokens_left`` of each started adapter: of its sequence that has the most to go."""
        self._shares = shares
        self._is_expected = any(pins.is_asked(line.version) for line in overdue)
        self._orders: dict[str, list[int]] = {}
        for line in overdue:
            self._orders.setdefault(line.tenant, []).append(line.head.order)
        for orders in self._orders.values():
            orders.sort()
        by_release = sorted(tokens_left, key=tokens_left.__getitem__)
        self._place: dict[AdapterVersion | None, int] = {
            version: i for i, version in enumerate(by_release)
        }

    def keeps(self, line: Line, num_free_rows: int) -> bool:
        """Whether the line's head must not be admitted now. An adapter that nobody uses yet got
        its slot in pin order, and is not asked again."""
        is_started = line.version in self._place
        num_before = self._num_before(line) if is_started or line.version is None else 0
        if not num_before:
            return False
        if self._is_expected and num_free_rows == 1:
            return True
        return is_started and self._place[line.version] < num_before

    def _num_before(self, line: Line) -> int:
        """Overdue lines that its head would pass by."""
        tenants = self._shares.tenants
        counter = tenants[line.tenant]
        return sum(
            bisect_left(orders, line.head.order)
            for tenant, orders in self._orders.items()
            if tenants[tenant] <= counter
        )


class Admissions:
    """What one plan admitted, to tell whom it passed by."""

    def __init__(self, shares: FairShares) -> None:
        self._tenants = shares.tenants
        self._latest: dict[str, tuple[float, int]] = {}  # tenant -> (counter, order)

    def note(self, sequence: Sequence) -> None:
        """Before it is charged."""
        _, order = self._latest.get(sequence.tenant, (0.0, -1))
        counter = self._tenants[sequence.tenant]
        self._latest[sequence.tenant] = (counter, max(order, sequence.order))

    def passed(self, waiting: Waiting, pins: PinBook) -> list[Line]:
        """Of those at hand that nobody had passed by before."""
        if not self._latest:
            return []
        latest = {line.tenant: self._latest_after(line.tenant) for line in waiting.not_passed}
        return [
            line
            for line in waiting.not_passed
            if line.head.order < latest[line.tenant] and _lacks_slot(line, pins)
        ]

    def _latest_after(self, tenant: str) -> int:
        """The latest arrival that was admitted although this tenant's turn was not later."""
        counter = self._tenants[tenant]
        return max(
            (
                order
                for other, (admitted_at, order) in self._latest.items()
                if other == tenant or admitted_at >= counter
            ),
            default=-1,
        )


def _lacks_slot(line: Line, pins: PinBook) -> bool:
    return line.version is not None and pins.slot(line.version) is None


def pin_order(
    lines: Iterable[Line], late: list[Line], shares: FairShares, pins: PinBook, max_pins: int
) -> list[AdapterVersion]:
    """Tenants take turns, by their weights; in a tenant whoever is late comes first.

    Which turn a line has does not follow the tenants' counters, which change with every step: a
    slot would be released, written over and written again for nothing.
    """
    place = {line: i for i, line in enumerate(late)}
    of_tenant: dict[str, list[tuple[int, float, int, Line]]] = {}
    for line in lines:
        is_late = line in place
        counter = 0.0 if is_late else shares.adapters(line.tenant)[line.version]
        key = (place.get(line, len(place)), counter, line.head.order, line)
        of_tenant.setdefault(line.tenant, []).append(key)
    turns: list[tuple[float, bool, bool, float, int, AdapterVersion]] = []
    for tenant, keys in of_tenant.items():
        weight, counter = shares.tenants.weight(tenant), shares.tenants[tenant]
        for turn, (_, _, order, line) in enumerate(nsmallest(max_pins, keys)):
            assert line.version is not None
            is_late, is_held = line in place, pins.holds(line.version)
            turns.append((turn / weight, not is_late, not is_held, counter, order, line.version))
    turns.sort(key=lambda turn: turn[:5])
    return [turn[5] for turn in turns]
