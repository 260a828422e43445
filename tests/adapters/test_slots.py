"""The slot table: who goes among those that may, no page twice, nothing lost, in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jlorax.adapters.slots import SlotTable
from jlorax.errors import ConfigError
from jlorax.layout import PoolKey
from jlorax.types import AdapterVersion

SMALL, LARGE = PoolKey(2, 8), PoolKey(2, 64)


def v(name: str, generation: int = 1) -> AdapterVersion:
    return AdapterVersion("default", name, generation)


def table(
    max_slots: int = 3,
    small: int = 5,
    large: int = 5,
    clock: Callable[[], float] = lambda: 0.0,
) -> SlotTable:
    return SlotTable(max_slots, {SMALL: small, LARGE: large}, clock)


def test_assign_look_up_evict() -> None:
    slots = table()
    given = slots.assign(v("a"), {SMALL: 2, LARGE: 1})
    assert given is not None and slots.lookup(v("a")) == given
    assert len(given.pages[SMALL]) == 2 and 0 not in given.pages[SMALL] and not given.evicted
    assert slots.lookup(v("b")) is None and slots.lookup(v("a", 2)) is None
    with pytest.raises(ValueError, match="resident already"):
        slots.assign(v("a"), {SMALL: 1})
    slots.evict(v("a"))
    assert slots.lookup(v("a")) is None
    slots.check()


def test_the_least_recently_used_goes() -> None:
    slots = table()
    for name in "abc":
        slots.assign(v(name), {SMALL: 1})
    slots.lookup(v("a"))
    given = slots.assign(v("d"), {SMALL: 1})
    assert given is not None and given.evicted == (v("b"),)
    slots.check()


def test_the_often_used_outlives_the_recently_used_until_it_is_forgotten() -> None:
    slots = table(max_slots=2)
    slots.assign(v("often"), {SMALL: 1})
    for _ in range(3):
        slots.lookup(v("often"))
    survived = 0
    for i in range(9):
        given = slots.assign(v(f"once {i}"), {SMALL: 1})
        assert given is not None
        if v("often") in given.evicted:
            break
        survived += 1
    assert 2 <= survived <= 6
    slots.check()


def test_what_is_dear_to_load_again_stays() -> None:
    slots = table(max_slots=2)
    slots.assign(v("dear"), {SMALL: 1}, reload_s=1.0, size_bytes=100)
    slots.assign(v("cheap"), {SMALL: 1}, reload_s=0.1, size_bytes=100)
    given = slots.assign(v("new"), {SMALL: 1}, reload_s=0.1, size_bytes=100)
    assert given is not None and given.evicted == (v("cheap"),)


def test_who_was_written_a_moment_ago_goes_last() -> None:
    now = [0.0]
    slots = table(max_slots=2, clock=lambda: now[0])
    slots.assign(v("old"), {SMALL: 1})
    slots.lookup(v("old"))
    now[0] = 5.0
    slots.assign(v("fresh"), {SMALL: 1})
    given = slots.assign(v("new"), {SMALL: 1})
    assert given is not None and given.evicted == (v("old"),)
    given = slots.assign(v("newer"), {SMALL: 1})  # only fresh ones are left
    assert given is not None and len(given.evicted) == 1


def test_whom_a_request_waits_for_goes_last() -> None:
    slots = table(max_slots=2)
    slots.assign(v("wanted"), {SMALL: 1})
    slots.assign(v("other"), {SMALL: 1})
    slots.lookup(v("other"))
    slots.is_wanted = lambda version: version == v("wanted")
    given = slots.assign(v("new"), {SMALL: 1})
    assert given is not None and given.evicted == (v("other"),)


def test_kept_ones_stay_and_leave_room_for_any_other() -> None:
    slots = table(max_slots=3, small=5)
    slots.assign(v("kept"), {SMALL: 2})
    assert slots.can_keep(v("kept"), {SMALL: 2}, {SMALL: 2})
    assert not slots.can_keep(v("kept"), {SMALL: 2}, {SMALL: 3})
    slots.keep(v("kept"), True)
    assert slots.is_kept(v("kept"))
    for name in "abcdef":
        assert slots.assign(v(name), {SMALL: 1}) is not None
        assert slots.holds(v("kept"))
    assert not slots.can_keep(v("f"), {SMALL: 1}, {SMALL: 2})  # with the one that is kept
    assert slots.can_keep(v("f"), {SMALL: 1}, {SMALL: 1})
    assert slots.assign(v("wide"), {SMALL: 3}) is None
    slots.keep(v("kept"), False)
    assert slots.assign(v("wide"), {SMALL: 3}) is not None
    slots.check()


def test_pins_are_counted() -> None:
    slots = table(max_slots=1)
    slots.assign(v("a"), {SMALL: 1})
    slots.pin(v("a"))
    slots.pin(v("a"))
    slots.release(v("a"))
    assert slots.num_pins(v("a")) == 1 and slots.num_pinned == 1
    assert slots.assign(v("b"), {SMALL: 1}) is None
    with pytest.raises(ValueError, match="1 pins"):
        slots.evict(v("a"))
    slots.release(v("a"))
    with pytest.raises(ValueError, match="not pinned"):
        slots.release(v("a"))
    given = slots.assign(v("b"), {SMALL: 1})
    assert given is not None and given.evicted == (v("a"),)


def test_only_who_helps_goes() -> None:
    slots = table(max_slots=9)
    slots.assign(v("small"), {SMALL: 4})
    slots.assign(v("large"), {LARGE: 4})
    given = slots.assign(v("new"), {LARGE: 1})
    assert given is not None and given.evicted == (v("large"),)


def test_a_victim_that_a_larger_one_made_needless_stays() -> None:
    slots = table(max_slots=9)
    slots.assign(v("little"), {SMALL: 1})
    slots.assign(v("much"), {SMALL: 3})
    given = slots.assign(v("new"), {SMALL: 3})
    assert given is not None and given.evicted == (v("much"),)


def test_a_failed_assign_changes_nothing() -> None:
    slots = table()
    slots.assign(v("a"), {SMALL: 2})
    slots.assign(v("b"), {SMALL: 2})
    slots.pin(v("b"))
    before = slots.versions, slots.free_pages()
    assert slots.assign(v("c"), {SMALL: 3}) is None
    assert (slots.versions, slots.free_pages()) == before


def test_what_can_never_fit() -> None:
    slots = table()
    assert slots.can_ever_fit({SMALL: 4, LARGE: 4})
    assert not slots.can_ever_fit({SMALL: 5})  # page 0 is the zero page
    assert not slots.can_ever_fit({PoolKey(1, 1): 1})
    assert slots.assign(v("a"), {SMALL: 5}) is None
    with pytest.raises(ConfigError, match="max_slots is 0"):
        table(max_slots=0)


VERSIONS = st.builds(v, st.sampled_from("abcdefg"))


class Interleavings(RuleBasedStateMachine):
    """Any order of operations, against a plain list in LRU order and a dict of pins."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = table(max_slots=4, small=9, large=4)
        self.order: list[AdapterVersion] = []
        self.pins: dict[AdapterVersion, int] = {}

    @rule(version=VERSIONS, small=st.integers(0, 9), large=st.integers(0, 4))
    def assign(self, version: AdapterVersion, small: int, large: int) -> None:
        if version in self.order:
            return
        need = {pool: n for pool, n in ((SMALL, small), (LARGE, large)) if n}
        unpinned = [x for x in self.order if not self.pins.get(x)]
        held = {x: self.slots._residents[x].assignment.pages for x in unpinned}
        free = self.slots.free_pages()
        could = 4 - len(self.order) + len(unpinned) > 0 and all(
            n <= free[pool] + sum(len(pages.get(pool, ())) for pages in held.values())
            for pool, n in need.items()
        )
        given = self.slots.assign(version, need)
        assert (given is not None) == could
        if given is None:
            return
        assert {pool: len(pages) for pool, pages in given.pages.items()} == need
        for spared in given.evicted:  # without any one of them it would not have fitted
            gone = [x for x in given.evicted if x != spared]
            assert 4 - len(self.order) + len(gone) < 1 or any(
                n > free[pool] + sum(len(held[x].get(pool, ())) for x in gone)
                for pool, n in need.items()
            )
        assert set(given.evicted) <= set(unpinned)
        self.order = [x for x in self.order if x not in given.evicted] + [version]

    @rule(version=VERSIONS)
    def lookup(self, version: AdapterVersion) -> None:
        found = self.slots.lookup(version)
        assert (found is not None) == (version in self.order)
        if found:
            self.order = [x for x in self.order if x != version] + [version]

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.order))
        self.slots.pin(version)
        self.pins[version] = self.pins.get(version, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([x for x, n in self.pins.items() if n]))
        self.slots.release(version)
        self.pins[version] -= 1

    @rule(version=VERSIONS)
    def evict(self, version: AdapterVersion) -> None:
        if version in self.order and not self.pins.get(version):
            self.slots.evict(version)
            self.order.remove(version)

    @invariant()
    def holds(self) -> None:
        self.slots.check()
        assert list(self.slots.versions) == self.order
        assert self.slots.num_pinned == sum(n > 0 for n in self.pins.values())


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
