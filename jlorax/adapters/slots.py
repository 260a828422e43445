"""The bank's bookkeeping: which version has which slot and which pages, and who must go.

slot   0 .. max_slots - 1, one per resident adapter
page   1 .. n - 1 of each pool; page 0 is the zero page and is never dealt
pinned by a count: a version that a running request names is never evicted
kept   by the operator: as good as pinned, with no request
Others go by what they are worth, and those last that a request waits for or that were written a
moment ago: a bank too small for what is asked must not write the same adapters over and over.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jlorax.adapters.worth import Worth
from jlorax.errors import ConfigError
from jlorax.layout import ZERO_PAGE, LoraReach, PoolKey
from jlorax.types import AdapterVersion

Need = Mapping[PoolKey, int]
SETTLING_S = 1.0


@dataclass(frozen=True)
class Assignment:
    """Where an adapter lives. ``evicted``: who made room for it, for the owner's books."""

    slot: int
    pages: Mapping[PoolKey, tuple[int, ...]]
    evicted: tuple[AdapterVersion, ...] = ()
    reach: LoraReach = LoraReach.ALL


@dataclass
class _Resident:
    assignment: Assignment
    since_s: float
    num_pins: int = 0
    is_kept: bool = False

    @property
    def may_go(self) -> bool:
        return not self.num_pins and not self.is_kept


class SlotTable:
    """Slots and pages of one bank. ``pool_pages`` counts the zero page of each pool too."""

    def __init__(
        self,
        max_slots: int,
        pool_pages: Mapping[PoolKey, int],
        clock: Callable[[], float] = time.monotonic,
        is_wanted: Callable[[AdapterVersion], bool] = lambda version: False,
    ) -> None:
        if max_slots < 1:
            raise ConfigError(f"max_slots is {max_slots}, must be at least 1")
        self.max_slots = max_slots
        self.pool_pages = dict(pool_pages)
        self.evictions = 0
        self._free_slots = list(reversed(range(max_slots)))
        self._free_pages = {
            pool: list(reversed(range(ZERO_PAGE + 1, count))) for pool, count in pool_pages.items()
        }
        self.is_wanted = is_wanted
        self._clock = clock
        # From the least to the most recently used.
        self._residents: OrderedDict[AdapterVersion, _Resident] = OrderedDict()
        self._worth: Worth[AdapterVersion] = Worth()

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """Resident ones, from the least to the most recently used."""
        return tuple(self._residents)

    @property
    def num_pinned(self) -> int:
        """Resident adapters that may not go."""
        return sum(resident.num_pins > 0 for resident in self._residents.values())

    def free_pages(self) -> dict[PoolKey, int]:
        return {pool: len(pages) for pool, pages in self._free_pages.items()}

    def can_ever_fit(self, need: Need) -> bool:
        """Whether an empty bank would hold it."""
        return all(count < self.pool_pages.get(pool, 1) for pool, count in need.items())

    def lookup(self, version: AdapterVersion) -> Assignment | None:
        """Where it lives, and it counts as used now. None: not resident."""
        resident = self._residents.get(version)
        if resident is None:
            return None
        self._residents.move_to_end(version)
        self._worth.use(version)
        return resident.assignment

    def holds(self, version: AdapterVersion) -> bool:
        """Whether it is resident; this is no use."""
        return version in self._residents

    def assign(
        self,
        version: AdapterVersion,
        need: Need,
        reach: LoraReach = LoraReach.ALL,
        *,
        reload_s: float = 1.0,
        size_bytes: int = 1,
    ) -> Assignment | None:
        """Gives it a slot and pages, evicting those that are worth least and may go.

        ``reload_s``: what it would take to have it here again.
        None, and nothing changed: too much is pinned, wait for a release.
        """
        if version in self._residents:
            raise ValueError(f"{version} is resident already")
        victims = self._victims(need)
        if victims is None:
            return None
        for victim in victims:
            self._worth.evict(victim)
            self._vacate(victim)
            self.evictions += 1
        pages = {pool: self._take(pool, count) for pool, count in need.items() if count}
        assignment = Assignment(self._free_slots.pop(), pages, victims, reach)
        self._residents[version] = _Resident(assignment, self._clock())
        self._worth.enter(version, reload_s, size_bytes)
        return assignment

    def pin(self, version: AdapterVersion) -> None:
        self._residents[version].num_pins += 1

    def release(self, version: AdapterVersion) -> None:
        resident = self._residents[version]
        if resident.num_pins == 0:
            raise ValueError(f"{version} is not pinned")
        resident.num_pins -= 1

    def keep(self, version: AdapterVersion, kept: bool) -> None:
        """Whether it stays, used or not."""
        self._residents[version].is_kept = kept

    def can_keep(self, version: AdapterVersion, need: Need, largest: Need) -> bool:
        """Whether the bank would still hold any other adapter if this one were kept too."""
        kept = [r.assignment for v, r in self._residents.items() if r.is_kept and v != version]
        taken = [need, *({p: len(pages) for p, pages in a.pages.items()} for a in kept)]
        return len(taken) < self.max_slots and all(
            sum(pages.get(pool, 0) for pages in taken) + count < self.pool_pages.get(pool, 1)
            for pool, count in largest.items()
        )

    def is_kept(self, version: AdapterVersion) -> bool:
        resident = self._residents.get(version)
        return resident is not None and resident.is_kept

    def num_pins(self, version: AdapterVersion) -> int:
        resident = self._residents.get(version)
        return resident.num_pins if resident else 0

    def evict(self, version: AdapterVersion) -> None:
        """Takes back its slot and pages, for no other's sake."""
        resident = self._residents[version]
        if resident.num_pins:
            raise ValueError(f"{version} has {resident.num_pins} pins")
        self._worth.leave(version)
        self._vacate(version)

    def _vacate(self, version: AdapterVersion) -> None:
        resident = self._residents.pop(version)
        self._free_slots.append(resident.assignment.slot)
        for pool, pages in resident.assignment.pages.items():
            self._free_pages[pool].extend(reversed(pages))

    def check(self) -> None:
        """Every slot and page is free or owned by one, and page 0 by none."""
        owned = [resident.assignment for resident in self._residents.values()]
        slots = self._free_slots + [a.slot for a in owned]
        assert sorted(slots) == list(range(self.max_slots)), slots
        for pool, count in self.pool_pages.items():
            pages = self._free_pages[pool] + [p for a in owned for p in a.pages.get(pool, ())]
            assert sorted(pages) == list(range(ZERO_PAGE + 1, count)), (pool, sorted(pages))
        assert all(resident.num_pins >= 0 for resident in self._residents.values())

    def _victims(self, need: Need) -> tuple[AdapterVersion, ...] | None:
        """Those that have to go, and no more than needed. None: not enough."""
        if not self.can_ever_fit(need):
            return None
        missing = self._missing(need, ())
        victims: list[AdapterVersion] = []
        for version in self._candidates():
            if not missing:
                break
            if self._helps(version, missing):
                victims.append(version)
                missing = self._missing(need, victims)
        if missing:
            return None
        # A later, larger victim may have made an earlier one needless; spare the most recent first.
        for version in reversed(victims.copy()):
            others = [v for v in victims if v != version]
            if not self._missing(need, others):
                victims = others
        return tuple(victims)

    def _candidates(self) -> list[AdapterVersion]:
        """Who may go, whoever should go first in front."""
        settled_s = self._clock() - SETTLING_S
        free = (version for version, r in self._residents.items() if r.may_go)
        by_worth = self._worth.cheapest_first(free)

        def reluctance(version: AdapterVersion) -> tuple[bool, bool]:
            return self.is_wanted(version), self._residents[version].since_s > settled_s

        return sorted(by_worth, key=reluctance)

    def _missing(self, need: Need, victims: Iterable[AdapterVersion]) -> dict[PoolKey | None, int]:
        """What would still be short after these go; the key None stands for the slot."""
        gone = [self._residents[version].assignment for version in victims]
        short: dict[PoolKey | None, int] = {}
        if not self._free_slots and not gone:
            short[None] = 1
        for pool, count in need.items():
            free = len(self._free_pages[pool]) + sum(len(a.pages.get(pool, ())) for a in gone)
            if count > free:
                short[pool] = count - free
        return short

    def _helps(self, version: AdapterVersion, missing: Mapping[PoolKey | None, int]) -> bool:
        pages = self._residents[version].assignment.pages
        return any(pool is None or pages.get(pool) for pool in missing)

    def _take(self, pool: PoolKey, count: int) -> tuple[int, ...]:
        return tuple(self._free_pages[pool].pop() for _ in range(count))
