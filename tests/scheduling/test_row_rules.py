"""Sequences with rules: what is written and when, who waits for a mask, and who does not."""

from __future__ import annotations

import numpy as np

from jlorax.layout import RowWrites, mask_without
from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from jlorax.types import FinishReason
from tests.scheduling.world import (
    EOS,
    VOCAB,
    FakeGrammar,
    World,
    alone,
    config,
    constrained,
    sequence,
)


def world(**changes: object) -> World:
    return World(Policy(config(**changes)))


def plain(prompt: tuple[int, ...] = (1, 2, 3), max_new_tokens: int = 8) -> Sequence:
    seq = sequence(prompt, max_new_tokens)
    seq.stop_token_ids = frozenset()
    return seq


def under(grammar: FakeGrammar, max_new_tokens: int = 8) -> Sequence:
    seq = sequence((1, 2), max_new_tokens, **constrained(grammar))
    seq.stop_token_ids = frozenset()
    return seq


def test_a_sequence_without_rules_writes_nothing() -> None:
    w = world()
    w.add(plain())
    plan = w.launch()
    assert plan is not None
    assert plan.writes == RowWrites()
    w.run()
    assert w.device.num_mask_writes == 0


def test_a_grammar_is_followed_one_token_at_a_time() -> None:
    w = world()
    seq = w.add(under(FakeGrammar(1)))
    w.run()
    assert w.answer(seq) == alone(seq)
    assert w.answer(seq) != alone(plain((1, 2)))
    assert w.device.num_mask_writes == 8
    w.check_empty()


def test_it_sits_out_until_its_token_is_read_and_its_mask_is_there() -> None:
    w = world()
    seq = w.add(under(FakeGrammar(1)))
    assert w.launch() is not None
    assert w.launch() is None  # its token is on the device
    w.read()
    assert w.launch() is None  # its grammar has not seen it
    w.hear_grammar()
    plan = w.launch()
    assert plan is not None
    assert plan.outputs == (seq,)


def test_others_never_wait_for_a_mask() -> None:
    w = world()
    slow, other = w.add(under(FakeGrammar(1))), w.add(plain(max_new_tokens=12))
    while not other.is_over:
        while w.launch() is not None:
            pass
        w.read()
    assert w.answer(other) == alone(other)
    assert len(w.answer(slow)) == 1
    assert w.kinds.count("decode") == 11
    w.run()
    assert w.answer(slow) == alone(slow)


def out_of_step(w: World) -> tuple[Sequence, Sequence]:
    """Two under grammars: the first is in a decode step in flight, the second could be in the
    next."""
    first = w.add(under(FakeGrammar(1)))
    w.launch()
    w.read()
    w.hear_grammar()
    w.launch()
    second = w.add(under(FakeGrammar(2)))
    w.launch()
    w.read()
    w.hear_grammar()
    plan = w.launch()
    assert plan is not None
    assert plan.outputs == (first,)  # it waits for no prompt's step
    w.read()
    w.hear_grammar()
    return first, second


def test_rows_under_grammars_decode_together_when_nobody_else_does() -> None:
    w = world()
    first, second = out_of_step(w)
    assert w.launch() is None
    w.read()
    w.hear_grammar()
    plan = w.launch()
    assert plan is not None
    assert set(plan.outputs) == {first, second}
    w.run()
    assert w.answer(second) == alone(second)


def test_rows_under_grammars_may_take_turns_in_company() -> None:
    w = world()
    first, second = out_of_step(w)
    other = w.add(plain())
    w.launch()
    w.read()
    plan = w.launch()
    assert plan is not None
    assert set(plan.outputs) == {second, other}
    w.hear_grammar()
    w.read()
    plan = w.launch()
    assert plan is not None
    assert set(plan.outputs) == {first, other}


def test_the_last_step_of_others_is_not_waited_for() -> None:
    w = world()
    seq, other = w.add(under(FakeGrammar(1))), w.add(plain(max_new_tokens=2))
    w.launch()
    w.launch()
    w.read()
    w.hear_grammar()
    assert [plan.outputs for plan, _ in w.in_flight] == [(other,)]
    plan = w.launch()
    assert plan is not None
    assert plan.outputs == (seq,)


def test_a_preempted_sequence_whose_mask_is_late_comes_back_and_waits_alone() -> None:
    w = world(num_pages=6)
    first, late = w.add(plain(max_new_tokens=14)), w.add(under(FakeGrammar(2), 12))
    while not w.policy.num_preemptions:
        while w.in_grammars and len(w.answer(late)) < 4:
            w.hear_grammar()
        if w.launch() is None:
            w.read()
    while w.in_flight:
        w.read()
    assert late.row is None
    assert w.in_grammars == [late]
    while not first.is_over:
        while w.launch() is not None:
            pass
        w.read()
    assert w.answer(first) == alone(first)
    assert w.launch() is None
    assert late.row is not None  # it has its place, though it cannot draw yet
    assert w.launch() is None
    w.run()
    assert w.answer(late) == alone(late)
    w.check_empty()


def test_the_last_token_of_a_grammar_ends_the_answer_and_a_dead_one_the_sequence() -> None:
    w = world()
    ended, dead = w.add(under(FakeGrammar(1, 3))), w.add(under(FakeGrammar(1, 4, True)))
    w.run()
    assert ended.finish_reason is FinishReason.EOS_TOKEN
    assert w.answer(ended) == alone(ended)
    assert len(w.answer(ended)) == 3
    assert dead.is_cancelled
    assert len(w.answer(dead)) == 4
    w.check_empty()


def eager_to_stop(min_new_tokens: int, **rules: object) -> Sequence:
    return sequence(
        (1, 2, 3), 9, logit_bias=((EOS, 200.0),), min_new_tokens=min_new_tokens, **rules
    )


def test_no_stop_token_is_drawn_before_so_many() -> None:
    w = world()
    soon, later = w.add(eager_to_stop(0)), w.add(eager_to_stop(5))
    w.run()
    assert w.answer(soon) == [EOS]
    assert w.answer(later) == alone(later)
    assert w.answer(later).index(EOS) == 5
    assert w.device.num_mask_writes == 1  # the same for all its tokens


def test_the_longest_answer_has_no_stop_token() -> None:
    w = world()
    seq = w.add(eager_to_stop(9))
    w.run()
    assert EOS not in w.answer(seq)
    assert len(w.answer(seq)) == 9


def test_a_grammars_mask_and_the_least_length_hold_together() -> None:
    grammar = FakeGrammar(0)
    assert EOS in grammar.allowed([])
    w = world()
    seq = w.add(eager_to_stop(1, **constrained(grammar)))
    w.run()
    first = w.answer(seq)[0]
    assert first != EOS
    assert first in grammar.allowed([])
    assert w.answer(seq) == alone(seq)


class OnlyTheEnd(FakeGrammar):
    def allowed(self, answer: list[int]) -> list[int]:
        return [EOS]


def test_a_grammar_that_is_complete_ends_an_answer_that_is_too_short() -> None:
    w = world()
    seq = w.add(eager_to_stop(5, **constrained(OnlyTheEnd(0))))
    w.run()
    assert w.answer(seq) == [EOS]


def test_a_bias_is_written_once_and_again_in_another_row() -> None:
    w = world(num_pages=6)
    biased = sequence((4, 5, 6), 14, logit_bias=((7, 50.0), (EOS, -200.0)))
    first, second = w.add(plain(max_new_tokens=14)), w.add(biased)
    writes = []
    while not w.policy.is_idle:
        plan = w.launch()
        if plan is None:
            w.read()
            continue
        writes += plan.writes.biases
    assert w.policy.num_preemptions > 0
    assert len(writes) == 1 + w.policy.num_preemptions
    assert {tokens for _, tokens in writes} == {biased.logit_bias}
    assert w.answer(second) == alone(second)
    assert w.answer(first) == alone(first)


def test_a_row_that_had_rules_holds_none_for_its_next_owner() -> None:
    w = world(max_batch=1)
    ruled = w.add(eager_to_stop(4, **constrained(FakeGrammar(2))))
    next_one = w.add(sequence((5, 6), 6))
    w.run()
    assert w.answer(ruled) == alone(ruled)
    assert w.answer(next_one) == alone(next_one)


def test_a_mask_without_some_tokens() -> None:
    bits = np.unpackbits(mask_without((0, 31, 32, 96), VOCAB).view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits == 0).tolist() == [0, 31, 32, 96]
