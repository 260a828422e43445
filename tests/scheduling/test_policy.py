"""Who runs: order, preemption, slots, and the promise that company changes nobody's tokens."""

from __future__ import annotations

import pytest

from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from jlorax.types import FinishReason
from tests.scheduling.world import World, alone, config, sequence, shapes, version

A, B, C, D = map(version, "ABCD")


def world(**changes: object) -> World:
    return World(Policy(config(**changes)))


def unending(prompt: tuple[int, ...], max_new_tokens: int, adapter: str | None = None) -> Sequence:
    seq = sequence(prompt, max_new_tokens, None if adapter is None else version(adapter))
    seq.stop_token_ids = frozenset()
    return seq


def test_one_request_runs_alone_to_its_length() -> None:
    w = world()
    seq = w.add(unending((1, 2, 3), 9))
    w.run()
    assert w.answer(seq) == alone(seq)
    assert seq.finish_reason is FinishReason.LENGTH
    w.check_empty()


def test_two_steps_are_planned_ahead_and_a_planned_stop_launches_none_too_many() -> None:
    w = world()
    w.add(unending((1, 2, 3), 3))
    assert w.launch() is not None
    assert w.launch() is not None
    assert w.launch() is None  # depth 2
    w.run()
    assert w.kinds == ["extend", "decode", "decode"]


def test_a_stop_token_is_noticed_one_step_late_and_the_extra_token_thrown_away() -> None:
    w = world()
    seq = unending((1, 2, 3), 9)
    third = alone(seq)[2]
    seq.stop_token_ids = frozenset({third})
    w.add(seq)
    w.run()
    assert w.answer(seq) == alone(seq)
    assert w.answer(seq)[-1] == third
    assert seq.finish_reason is FinishReason.EOS_TOKEN
    assert len(w.kinds) == len(alone(seq)) + 1
    w.check_empty()


def test_a_long_prompt_is_computed_in_chunks_and_decodes_take_turns_with_them() -> None:
    w = world(num_pages=40, max_pages_per_sequence=30)
    first = w.add(unending((1, 2), 12))
    w.launch()
    long = w.add(unending(tuple(range(70)), 2))
    w.run()
    assert w.kinds[:10] == ["extend", "decode"] * 5  # 70 tokens in chunks of 16
    assert w.answer(first) == alone(first)
    assert w.answer(long) == alone(long)


def test_a_stream_of_prompts_does_not_starve_a_decode() -> None:
    w = world(num_pages=40)
    first = w.add(unending((1, 2), 12))
    while not first.is_over:
        if len(w.policy.waiting) < 2:
            w.add(unending(tuple(range(16)), 1))
        w.launch()
        w.launch()
        w.read()
    assert len(w.kinds) <= 2 * 12 + 2


def test_prompts_share_an_extend_step_up_to_its_bucket() -> None:
    w = world()
    for _ in range(3):
        w.add(unending((1, 2, 3, 4, 5), 1))
    plan = w.launch()
    assert plan is not None
    assert plan.shape.num_tokens == 16
    assert plan.num_tokens == 5 + 5  # two tiles of four each: the third finds no room
    w.run()
    w.check_empty()


def test_an_extend_step_that_would_be_mostly_padding_is_cut_into_full_ones() -> None:
    w = world(shapes=shapes(extend=(8, 32)), num_pages=30)
    sequences = [w.add(unending(tuple(range(1, n)), 1)) for n in (7, 6, 6)]  # 8 of 32 each, padded
    sizes = []
    while (plan := w.launch()) is not None:
        sizes.append((plan.shape.num_tokens, plan.num_tokens))
        w.read()
    assert sizes == [(32, 6 + 5 + 5)]
    w.add(unending(tuple(range(1, 13)), 1))  # 12 of 32
    sizes = []
    while (plan := w.launch()) is not None:
        sizes.append((plan.shape.num_tokens, plan.num_tokens))
        w.read()
    assert sizes == [(8, 8), (8, 4)]
    assert [w.answer(seq) for seq in sequences] == [alone(seq) for seq in sequences]
    w.check_empty()


def test_chunks_of_one_adapter_stand_together_in_an_extend_step() -> None:
    w = world(num_pages=30)
    sequences = [w.add(unending((1, 2, 3), 1, name)) for name in ("A", "B", "A", "B")]
    w.settle()
    assert w.grant() and w.grant()
    plan = w.launch()
    assert plan is not None
    assert [seq.version for seq in plan.outputs] == [A, A, B, B]
    w.run()
    assert [w.answer(seq) for seq in sequences] == [alone(seq) for seq in sequences]


def test_the_latest_arrival_gives_its_pages_up_and_gets_the_same_tokens() -> None:
    w = world(num_pages=6)  # five pages of four tokens
    first, second = w.add(unending((1, 2, 3), 14)), w.add(unending((4, 5, 6), 14))
    w.run()
    assert w.policy.num_preemptions > 0
    assert w.answer(first) == alone(first)
    assert w.answer(second) == alone(second)
    assert w.over == [first, second]
    w.check_empty()


def test_a_preempted_sequence_waits_for_its_last_tokens_and_lets_nobody_new_pass() -> None:
    w = world(num_pages=6)
    first, second = w.add(unending((1, 2, 3), 14)), w.add(unending((4, 5, 6), 14))
    while not w.policy.num_preemptions:
        if w.launch() is None:
            w.read()
    late = w.add(unending((7,), 1))
    assert second.num_in_flight
    while second in w.policy.waiting:
        assert late in w.policy.waiting
        if w.launch() is None:
            w.read()
    w.run()
    assert w.answer(second) == alone(second)
    assert w.answer(first) == alone(first)


def test_a_preempted_sequence_waits_for_its_last_tokens_even_when_pages_are_free() -> None:
    w = world(num_pages=6)
    first, second = w.add(unending((1, 2, 3), 14)), w.add(unending((4, 5, 6), 14))
    while not w.policy.num_preemptions:
        if w.launch() is None:
            w.read()
    first.is_cancelled = True
    w.settle()
    assert second.num_in_flight
    assert w.policy.plan(w.now_s) is None
    w.run()
    assert w.answer(second) == alone(second)
    w.check_empty()


def test_nobody_passes_a_request_that_lacks_pages() -> None:
    w = world(num_pages=6)
    w.add(unending((1,) * 9, 5))
    large, small = unending((2,) * 15, 2), unending((3,), 1)
    w.add(large)
    w.add(small)
    w.run()
    assert w.over.index(large) < w.over.index(small)
    assert w.policy.num_preemptions == 0


def test_a_cancelled_sequence_gives_all_back_at_once_and_its_row_may_be_used() -> None:
    w = world(max_batch=1)
    first, second = w.add(unending((1, 2, 3), 20)), w.add(unending((4, 5), 3))
    w.launch()
    w.launch()
    first.is_cancelled = True
    w.settle()
    assert w.policy.pool.num_free == w.policy.pool.num_usable
    w.run()
    assert w.answer(first) == []
    assert w.answer(second) == alone(second)
    w.check_empty()


# ---- adapters


def test_a_request_is_admitted_when_its_adapter_has_a_slot() -> None:
    w = world()
    seq = w.add(unending((1, 2), 3, "A"))
    assert w.asked == [A]
    assert w.launch() is None
    w.grant()
    w.run()
    assert w.answer(seq) == alone(seq)
    w.check_empty()


def test_more_adapters_than_slots_are_acquired_in_order() -> None:
    w = world()
    for name in "ABCD":
        w.add(unending((1, 2), 3, name))
    assert w.asked == [A, B]
    seqs = list(w.policy.waiting)
    w.run()
    assert [w.answer(seq) for seq in seqs] == [alone(seq) for seq in seqs]
    assert w.over == seqs
    w.check_empty()


def test_an_adapter_at_hand_never_waits_for_those_still_loading() -> None:
    w = world()
    for name in "ABC":
        w.add(unending((1, 2), 3, name), at_hand=False)
    resident = w.add(unending((1, 2), 3, "D"))
    assert set(w.asked) <= {A, B, D}
    assert D in w.asked
    w.grant(w.asked.index(D))
    while not resident.is_over:
        if w.launch() is None:
            w.read()
    assert w.answer(resident) == alone(resident)


def busy_with_two_adapters(w: World) -> None:
    for name in "AB":
        w.add(unending((1, 2), 6, name))
        w.grant()
    w.launch()
    w.launch()


def test_waiting_too_long_for_a_slot_stops_later_adapters_but_not_the_base() -> None:
    w = world(max_batch=8, num_pages=40)
    busy_with_two_adapters(w)
    starved = w.add(unending((1, 2), 3, "C"))
    w.now_s = 0.4
    overtaker = w.add(unending((1, 2), 6, "A"))
    w.launch()
    w.read()
    w.launch()
    assert overtaker in w.policy.running  # nobody had passed the starved one before
    w.now_s = 0.8
    w.read()
    again = w.add(unending((1, 2), 3, "A"))
    w.launch()
    w.read()
    w.launch()
    assert again in w.policy.running  # it was passed for less than its time
    w.now_s = 1.0
    late, base = w.add(unending((1, 2), 3, "B")), w.add(unending((1, 2), 3))
    w.read()
    w.launch()
    w.read()
    w.launch()
    assert late in w.policy.waiting
    assert base in w.policy.running
    w.run()
    assert w.over.index(starved) < w.over.index(late)
    for seq in (starved, overtaker, again, late, base):
        assert w.answer(seq) == alone(seq)
    w.check_empty()


def test_a_steady_stream_of_resident_adapters_cannot_starve_another() -> None:
    w = world(max_batch=8, num_pages=40)
    busy_with_two_adapters(w)
    starved = w.add(unending((1, 2), 3, "C"))
    for i in range(200):
        if starved.is_over:
            break
        w.now_s += 0.05
        w.add(unending((1, 2), 6, "AB"[i % 2]))
        w.grant()
        w.launch()
        w.launch()
        if w.in_flight:
            w.read()
    assert starved.is_over
    assert w.now_s < 5.0


@pytest.mark.parametrize("reloaded", [False, True])
def test_waiting_for_a_load_holds_up_nobody(reloaded: bool) -> None:
    w = world(max_batch=8, num_pages=40)
    busy_with_two_adapters(w)
    w.add(unending((1, 2), 3, "C"), at_hand=reloaded)
    if reloaded:
        w.policy.not_at_hand(C)
    w.now_s = 60.0
    late = w.add(unending((1, 2), 3, "A"))
    for _ in range(4):
        w.read()
        w.launch()
    assert late in w.policy.running or late.is_over


def test_a_preempted_sequence_keeps_its_slot() -> None:
    w = world(num_pages=6, num_slots=2)
    w.add(unending((1, 2, 3), 14, "A"))
    second = w.add(unending((4, 5, 6), 14, "B"))
    w.grant()
    w.grant()
    w.add(unending((7,), 2, "C"))
    while not w.policy.num_preemptions:
        if w.launch() is None:
            w.read()
    w.now_s = 100.0  # C waited its time; B must come back before it all the same
    w.settle()
    assert second in w.policy.waiting
    assert B in w.slots
    w.run()
    assert w.answer(second) == alone(second)
    w.check_empty()


def test_a_failed_adapter_ends_its_requests_and_no_others() -> None:
    w = world()
    broken, fine = w.add(unending((1, 2), 3, "A")), w.add(unending((1, 2), 3, "B"))
    w.fail()
    assert w.over == [broken]
    w.run()
    assert w.answer(fine) == alone(fine)
    w.check_empty()


def test_a_cancelled_request_gives_its_slot_back_once_it_is_ready() -> None:
    w = world()
    seq = w.add(unending((1, 2), 3, "A"))
    seq.is_cancelled = True
    w.settle()
    assert w.asked == [A]
    w.grant()
    w.check_empty()


def test_a_step_takes_no_more_rows_than_its_largest_bucket() -> None:
    w = world(max_batch=8, num_pages=60, shapes=shapes(decode=(1, 2)))
    seqs = [w.add(unending((i, i + 1), 6)) for i in range(5)]
    w.run()
    assert [w.answer(seq) for seq in seqs] == [alone(seq) for seq in seqs]
    w.check_empty()
