"""Prompts that are scored: their own steps, in turn with the others', and what comes of chunks."""

from __future__ import annotations

from typing import Any

from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from jlorax.types import FinishReason
from tests.scheduling.world import World, alone, config, sequence, version


def world(**changes: object) -> World:
    return World(Policy(config(num_pages=60, max_pages_per_sequence=30, **changes)))


def prompt_of(num_tokens: int) -> tuple[int, ...]:
    return tuple(range(1, num_tokens + 1))


def scored(num_tokens: int, max_new_tokens: int = 2, **changes: Any) -> Sequence:
    values: dict[str, Any] = {"wants_prompt_logprobs": True, "num_alternatives": 3, **changes}
    seq = sequence(prompt_of(num_tokens), max_new_tokens, **values)
    seq.stop_token_ids = frozenset()
    return seq


def steps(w: World) -> list[tuple[bool, int]]:
    """Runs it all: of every extend step whether it scored, and its tokens."""
    found = []
    while not w.policy.is_idle:
        while w.asked:
            w.grant()
        plan = w.launch()
        if plan is None:
            w.read()
        elif not plan.shape.is_decode:
            found.append((plan.shape.scores, plan.num_tokens))
    return found


def test_a_long_prompt_is_scored_in_chunks_of_the_scoring_shape() -> None:
    w = world()
    seq = w.add(scored(19))
    assert steps(w) == [(True, 8), (True, 8), (True, 3)]
    w.check_scores(seq)
    assert w.answer(seq) == alone(seq)
    w.check_empty()


def test_others_take_turns_with_a_long_prompt_that_is_scored() -> None:
    w = world()
    seq = w.add(scored(40))
    others = [w.add(sequence(prompt_of(16), 1)) for _ in range(3)]
    assert [kind for kind, _ in steps(w)][:6] == [True, False, True, False, True, False]
    w.check_scores(seq)
    for other in others:
        assert w.answer(other) == alone(other)
        w.check_scores(other)
    w.check_empty()


def test_no_more_scored_prompts_are_admitted_than_their_steps_hold() -> None:
    w = world()
    first, second, late = scored(20), scored(4), sequence((1, 2), 1)
    late.tenant = "another"
    for seq in (first, second, late):
        w.add(seq)
    w.launch()
    assert first.row is not None
    assert second.row is None
    while late.row is None:
        w.launch()
        w.read()
    assert second.row is None  # nor did it hold up whom a step of the other kind had room for
    w.run()
    w.check_scores(second)


def test_an_embedding_ends_without_a_token() -> None:
    w = world()
    seq = w.add(sequence(prompt_of(11), 0, version("A"), wants_embedding=True))
    beside = w.add(scored(5))
    w.run()
    assert w.answer(seq) == []
    assert seq.finish_reason is FinishReason.LENGTH
    w.check_scores(seq)
    w.check_scores(beside)
    w.check_empty()


def test_an_embedding_may_fill_the_context() -> None:
    w = World(Policy(config(num_pages=9, max_pages_per_sequence=8)))
    seq = w.add(sequence(prompt_of(32), 0, wants_embedding=True))
    w.run()
    w.check_scores(seq)


def test_what_preemption_cuts_off_is_scored_anew() -> None:
    """Preempted in its prompt, while a chunk's scores are still to be read."""
    w = World(Policy(config(num_pages=8, max_pages_per_sequence=7)))
    first, seq = w.add(sequence((1, 2, 3), 16)), w.add(scored(22))
    first.stop_token_ids = frozenset()
    w.run()
    assert w.policy.num_preemptions > 0
    w.check_scores(seq)
    assert w.answer(seq) == alone(seq)


def test_one_that_lost_its_pages_after_its_prompt_is_not_scored_again() -> None:
    w = World(Policy(config(num_pages=6, max_pages_per_sequence=5)))
    first, seq = w.add(sequence((1, 2, 3), 14)), w.add(scored(3, 14))
    first.stop_token_ids = frozenset()
    kinds = [kind for kind, _ in steps(w)]
    assert w.policy.num_preemptions > 0
    assert kinds.count(True) == 1
    w.check_scores(seq)
    assert w.answer(seq) == alone(seq)
