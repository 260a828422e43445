"""Who waits: preempted sequences, and a line for each tenant and adapter.

Nothing here walks over all that wait but the iterator, which cancelling needs.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import chain

from jlorax.scheduling.fairness import FairShares
from jlorax.scheduling.sequence import Sequence
from jlorax.types import AdapterVersion


@dataclass(eq=False)
class Line:
    """Sequences of one tenant and adapter that never started, in order of arrival."""

    tenant: str
    version: AdapterVersion | None
    is_at_hand: bool = False  # the weights are in RAM or in the bank
    sequences: deque[Sequence] = field(default_factory=deque)

    @property
    def head(self) -> Sequence:
        return self.sequences[0]


class Waiting:
    """Iterates over the preempted ones, then line by line."""

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []  # by order of arrival
        self.lines: dict[AdapterVersion | None, dict[str, Line]] = {}
        # At hand, and nobody has passed it by yet; and those who were, since when, oldest first.
        self.not_passed: dict[Line, None] = {}
        self.passed_since_s: dict[Line, float] = {}
        self._num_in_lines = 0

    def __len__(self) -> int:
        return len(self.preempted) + self._num_in_lines

    def __iter__(self) -> Iterator[Sequence]:
        in_lines = (line.sequences for line in self.every_line())
        return chain(self.preempted, chain.from_iterable(in_lines))

    def every_line(self) -> Iterator[Line]:
        return chain.from_iterable(lines.values() for lines in self.lines.values())

    def lines_of(self, version: AdapterVersion | None) -> Iterable[Line]:
        return self.lines.get(version, {}).values()

    # ---- entering and leaving

    def add(self, sequence: Sequence) -> None:
        lines = self.lines.setdefault(sequence.version, {})
        if sequence.tenant not in lines:
            is_at_hand = any(line.is_at_hand for line in lines.values())
            lines[sequence.tenant] = Line(sequence.tenant, sequence.version, is_at_hand)
            if is_at_hand:
                self.not_passed[lines[sequence.tenant]] = None
        lines[sequence.tenant].sequences.append(sequence)
        self._num_in_lines += 1

    def put_back(self, sequence: Sequence) -> None:
        """A preempted one."""
        insort(self.preempted, sequence, key=lambda s: s.order)

    def take(self, sequence: Sequence) -> None:
        """A preempted one, or the head of its line, which is no longer passed by then."""
        if sequence.is_started:
            self.preempted.remove(sequence)
            return
        line = self.lines[sequence.version][sequence.tenant]
        assert line.head is sequence
        line.sequences.popleft()
        self._num_in_lines -= 1
        if not line.sequences:
            self._close(line)
        elif self.passed_since_s.pop(line, None) is not None:
            self.not_passed[line] = None

    def remove(self, over: list[Sequence]) -> None:
        """Wherever they stand."""
        self.preempted = [s for s in self.preempted if not s.is_over]
        shorter = {(s.version, s.tenant) for s in over if not s.is_started}
        for line in [self.lines[version][tenant] for version, tenant in shorter]:
            left = deque(s for s in line.sequences if not s.is_over)
            self._num_in_lines -= len(line.sequences) - len(left)
            line.sequences = left
            if not left:
                self._close(line)

    def _close(self, line: Line) -> None:
        self.not_passed.pop(line, None)
        self.passed_since_s.pop(line, None)
        del self.lines[line.version][line.tenant]
        if not self.lines[line.version]:
            del self.lines[line.version]

    # ---- slots

    def at_hand(self, version: AdapterVersion | None, is_at_hand: bool) -> None:
        """A line whose weights are on their way is not passed by: it could not run anyway."""
        for line in self.lines_of(version):
            if line.is_at_hand == is_at_hand:
                continue
            line.is_at_hand = is_at_hand
            if is_at_hand:
                self.not_passed[line] = None
            else:
                self.not_passed.pop(line, None)
                self.passed_since_s.pop(line, None)

    def note_passed(self, lines: Iterable[Line], now_s: float) -> None:
        for line in lines:
            del self.not_passed[line]
            self.passed_since_s[line] = now_s

    def check(self) -> None:
        lines = list(self.every_line())
        assert self._num_in_lines == sum(len(line.sequences) for line in lines)
        assert all(line.sequences for line in lines)
        at_hand = [line for line in lines if line.is_at_hand]
        assert set(at_hand) == {*self.not_passed, *self.passed_since_s}
        assert len(at_hand) == len(self.not_passed) + len(self.passed_since_s)
        assert list(self.passed_since_s.values()) == sorted(self.passed_since_s.values())
        assert self.preempted == sorted(self.preempted, key=lambda s: s.order)
        assert all(s.is_started for s in self.preempted)
        for line in lines:
            orders = [s.order for s in line.sequences]
            assert orders == sorted(orders)
            assert not any(s.is_started for s in line.sequences)
            assert {(s.tenant, s.version) for s in line.sequences} == {(line.tenant, line.version)}


def in_turn(lines: Iterable[Line], shares: FairShares) -> Iterator[Line]:
    """Lines by their turn, as shares are when each is due: tenants first, then a tenant's adapters.

    A line comes again when its head was taken, and is left out for good when it was not.
    """
    of_tenant: dict[str, list[tuple[float, int, Line]]] = {}
    for line in lines:
        counter = shares.adapters(line.tenant)[line.version]
        of_tenant.setdefault(line.tenant, []).append((counter, line.head.order, line))
    tenants = []
    for tenant, turns in of_tenant.items():
        heapify(turns)
        tenants.append((shares.tenants[tenant], turns[0][1], tenant))
    heapify(tenants)
    while tenants:
        tenant = tenants[0][2]
        turns = of_tenant[tenant]
        line = turns[0][2]
        head = line.head
        yield line
        if line.sequences and line.head is not head:
            counter = shares.adapters(tenant)[line.version]
            heapreplace(turns, (counter, line.head.order, line))
        else:
            heappop(turns)
        if turns:
            heapreplace(tenants, (shares.tenants[tenant], turns[0][1], tenant))
        else:
            heappop(tenants)
