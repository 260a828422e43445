"""A line that lacks nothing but a slot is passed by for max_overtake_s; then nothing delays it."""

from __future__ import annotations

from collections import deque

from jlorax.scheduling.fairness import FairShares
from jlorax.scheduling.overtaking import Admissions, Holds, not_behind, pin_order
from jlorax.scheduling.pins import PinBook
from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.waiting import Line, Waiting
from tests.scheduling.load import DECODE_S, EXTEND_S, Load, load_config
from tests.scheduling.world import sequence, version

NAMES = "ABCD"
TOKENS = {"A": 30, "B": 60, "C": 90, "D": 120}
MAX_STEP_S = DECODE_S + EXTEND_S  # they take turns


def asks(adapter: str, num_new: int) -> Sequence:
    seq = sequence((1, 2), num_new, version(adapter))
    seq.stop_token_ids = frozenset()
    return seq


def test_each_gets_the_slot_that_is_free_first_while_the_other_adapters_go_on() -> None:
    """Four slots, each with a steady stream of requests; two others come."""
    load = Load(Policy(load_config(max_batch=128, num_slots=4)))
    load.step([asks(name, TOKENS[name]) for name in NAMES])
    starved = [asks("X", 5), asks("Y", 5)]
    load.step(starved)
    went_on: set[str] = set()
    for i in range(1000):
        if starved[0].is_started and starved[1].is_started:
            break
        late = [asks(NAMES[i % 4], TOKENS[NAMES[i % 4]])] if i % 8 < 4 else []
        load.step(late)
        if load.now_s > 0.7 and not starved[0].is_started:
            went_on |= {NAMES[i % 4] for s in late if s.is_started}
    max_s = 0.5 + MAX_STEP_S
    assert load.queueing_s(starved[0]) <= max_s + (TOKENS["A"] + 4) * MAX_STEP_S
    assert load.queueing_s(starved[1]) <= max_s + (TOKENS["B"] + 4) * MAX_STEP_S
    assert went_on
    assert went_on <= {"C", "D"}


def test_who_waits_its_turn_for_a_row_is_not_passed_by() -> None:
    load = Load(Policy(load_config(max_batch=2, num_slots=2)))
    first = [asks("A", 100), asks("B", 100)]
    load.step(first)
    second, third = asks("X", 5), asks("A", 5)
    load.step([second, third])
    while not any(s.is_over for s in first):
        load.step()
    assert load.now_s > 0.6
    assert not load.policy.waiting.passed_since_s


# ---- the parts


def line(order: int, adapter: str, tenant: str = "x") -> Line:
    seq = asks(adapter, 4)
    seq.order, seq.tenant = order, tenant
    return Line(tenant, seq.version, True, deque([seq]))


def shares_of(*lines: Line, **charged: int) -> FairShares:
    shares = FairShares()
    for each in lines:
        shares.enter(each.tenant, each.version)
    for tenant, tokens in charged.items():
        shares.tenants.charge(tenant, tokens)
    return shares


def pins_of(ready: str = "", asked: str = "") -> PinBook:
    pins = PinBook(8)
    pins.update(map(version, ready + asked))
    for slot, name in enumerate(ready):
        pins.ready(version(name), slot)
    return pins


A, B = version("A"), version("B")
LEFT = {A: 5, B: 9}


def test_one_overdue_line_holds_the_adapter_that_is_done_first_and_only_later_arrivals() -> None:
    overdue, first, second, earlier = line(5, "X"), line(6, "A"), line(7, "B"), line(4, "A")
    shares = shares_of(overdue, first, second)
    holds = Holds([overdue], shares, pins_of("AB"), LEFT)
    assert [holds.keeps(each, 9) for each in (first, second, earlier)] == [True, False, False]


def test_an_overdue_line_holds_nobody_of_a_tenant_whose_turn_is_earlier() -> None:
    overdue, other = line(5, "X", "hog"), line(6, "A", "light")
    shares = shares_of(overdue, other, hog=10)
    assert not Holds([overdue], shares, pins_of("AB"), LEFT).keeps(other, 9)


def test_the_last_row_is_left_to_an_overdue_line_whose_slot_is_on_its_way() -> None:
    overdue, other = line(5, "X"), line(6, "B")
    shares = shares_of(overdue, other)
    assert Holds([overdue], shares, pins_of("AB", "X"), LEFT).keeps(other, 1)
    assert not Holds([overdue], shares, pins_of("AB", "X"), LEFT).keeps(other, 2)
    assert not Holds([overdue], shares, pins_of("AB"), LEFT).keeps(other, 1)


def test_while_one_is_late_only_the_late_and_earlier_turns_get_slots() -> None:
    waiting = Waiting()
    for name, tenant in (("X", "hog"), ("Y", "light"), ("Z", "hog")):
        seq = asks(name, 3)
        seq.tenant = tenant
        waiting.add(seq)
    late, light, same = waiting.every_line()
    shares = shares_of(late, light, same, hog=10)
    assert list(not_behind([late], waiting, shares)) == [late, light]
    assert list(not_behind([light], waiting, shares)) == [light]
    assert list(not_behind([], waiting, shares)) == [late, light, same]


def test_slots_go_round_the_tenants_and_to_the_late_ones_first() -> None:
    lines = [line(i, name, "hog") for i, name in enumerate("ABC")] + [line(3, "D", "light")]
    shares = shares_of(*lines)
    names = [v.adapter_id for v in pin_order(lines, [], shares, pins_of(), 8)]
    assert names == ["A", "D", "B", "C"]
    names = [v.adapter_id for v in pin_order(lines, [lines[2]], shares, pins_of(), 8)]
    assert names == ["C", "D", "A", "B"]


def test_a_late_line_keeps_the_slot_it_got_until_there_is_a_row() -> None:
    """Else another tenant's line takes it, the late one takes it back, and so on."""
    load = Load(Policy(load_config(max_batch=1, num_slots=3)))
    load.step([asks("A", 200)])
    hog = [asks("X", 5), asks("Y", 5)]
    other = asks("Z", 5)
    other.tenant = "other"
    load.step([*hog, other])
    waiting = load.policy.waiting
    late = [each for each in waiting.every_line() if each.tenant == "default"]
    waiting.note_passed(late, load.now_s)
    load.policy.shares.tenants.charge("other", 1e6)
    load.now_s += 1.0
    for _ in range(5):
        load.step()
        assert {v.adapter_id for v in load.slots} == {"A", "X", "Y"}


def test_only_later_arrivals_pass_a_line_by() -> None:
    waiting = Waiting()
    early, late = asks("X", 3), asks("Y", 3)
    early.order, late.order = 1, 3
    for seq in (early, late):
        waiting.add(seq)
        waiting.at_hand(seq.version, True)
    admitted = line(2, "A", "default")
    shares = shares_of(admitted, *waiting.every_line())
    admissions = Admissions(shares)
    admissions.note(admitted.head)
    assert [each.version for each in admissions.passed(waiting, pins_of("A"))] == [version("X")]


def test_a_line_whose_head_was_taken_is_passed_by_anew() -> None:
    waiting = Waiting()
    first, second = asks("X", 3), asks("X", 3)
    for order, seq in enumerate((first, second)):
        seq.order = order
        waiting.add(seq)
    waiting.at_hand(version("X"), True)
    waiting.note_passed(list(waiting.every_line()), 1.0)
    waiting.take(first)
    assert not waiting.passed_since_s
    waiting.check()
