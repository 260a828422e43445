"""The scheduler and constrained sequences; runner, cache and grammars are only mailboxes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

import numpy as np

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    AcceptToken,
    AcceptTokens,
    Admit,
    CacheMessage,
    GrammarAnswers,
    GrammarEnded,
    GrammarFailed,
    GrammarMessage,
    MaskReady,
    RunnerMessage,
    RunStep,
    SchedulerMessage,
    StepDone,
    Wake,
)
from jlorax.actors.scheduler import Scheduler
from jlorax.actors.stream import Scored, StreamToken, TokenStream
from jlorax.errors import GrammarDeadEnd
from jlorax.metrics import Metrics
from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import StepPlan
from jlorax.types import FinishReason
from tests.scheduling.world import FakeDevice, FakeGrammar, config, constrained, sequence

_TURNS = 20  # of the loop: more than any chain of messages here takes


class Rig:
    """Steps are computed when they are launched, and read when a test says so."""

    def __init__(self, clock: Callable[[], float] | None) -> None:
        self.now_s = 0.0
        self.inbox: Mailbox[SchedulerMessage] = Mailbox(64)
        self.cache: Mailbox[CacheMessage] = Mailbox(64)
        self.runner: Mailbox[RunnerMessage] = Mailbox(64)
        self.grammars: Mailbox[GrammarMessage] = Mailbox(64)
        self.policy = Policy(config(num_pages=60, max_pages_per_sequence=20))
        self.device = FakeDevice(self.policy.config)
        self.launched: deque[tuple[StepPlan, Any]] = deque()
        self.scheduler = Scheduler(
            self.inbox,
            self.cache,
            self.runner,
            self.grammars,
            self.policy,
            Metrics(),
            masks_within=0.5,
            clock=clock or (lambda: self.now_s),
        )

    async def settle(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        while len(self.runner):
            message = await anext(self.runner)
            assert isinstance(message, RunStep)
            self.launched.append((message.plan, self.device.launch(message.plan)))

    async def admit(self, *sequences: Sequence) -> None:
        for seq in sequences:
            seq.stream = TokenStream()
            seq.stop_token_ids = frozenset()
            self.inbox.post(Admit(seq))
        await self.settle()

    async def read(self) -> StepPlan:
        plan, results = self.launched.popleft()
        self.inbox.post(StepDone(plan, results))
        await self.settle()
        return plan

    async def asked(self) -> AcceptToken:
        """What a step drew under a grammar, where that is one token."""
        message = await anext(self.grammars)
        assert isinstance(message, AcceptTokens)
        [drawn] = message.tokens
        return drawn

    async def wake(self) -> None:
        self.inbox.post(Wake())
        await self.settle()

    async def hear(self, *answers: MaskReady | GrammarEnded | GrammarFailed) -> None:
        self.inbox.post(GrammarAnswers(answers))
        await self.settle()


def run(
    test: Callable[[Rig], Coroutine[Any, Any, None]], clock: Callable[[], float] | None = None
) -> None:
    """``clock`` None: time passes when the test says so."""

    async def whole() -> None:
        rig = Rig(clock)
        actor = asyncio.create_task(rig.scheduler.run())
        try:
            async with asyncio.timeout(20):
                await test(rig)
            rig.policy.check()
        finally:
            actor.cancel()
            await asyncio.wait([actor])
        assert actor.cancelled()

    asyncio.run(whole())


def under(grammar: FakeGrammar, max_new_tokens: int = 9) -> Sequence:
    return sequence((1, 2), max_new_tokens, **constrained(grammar))


def next_mask(seq: Sequence) -> MaskReady:
    return MaskReady(seq, seq.matcher.mask(seq.tokens[len(seq.prompt) :]))


def items(seq: Sequence) -> list[Any]:
    return list(cast(TokenStream, seq.stream)._items)


def test_a_token_is_shown_when_its_grammar_has_seen_it() -> None:
    async def test(rig: Rig) -> None:
        seq = under(FakeGrammar(1))
        await rig.admit(seq)
        await rig.read()
        asked = await rig.asked()
        assert asked.sequence is seq
        assert [asked.token] == seq.tokens[2:]
        assert items(seq) == []
        assert not rig.launched
        await rig.hear(next_mask(seq))
        assert [item.token for item in items(seq)] == [asked.token]
        assert [plan.outputs for plan, _ in rig.launched] == [(seq,)]

    run(test)


def test_the_end_of_a_grammar_is_the_last_tokens_reason() -> None:
    async def test(rig: Rig) -> None:
        seq = under(FakeGrammar(1))
        await rig.admit(seq)
        await rig.read()
        await rig.hear(GrammarEnded((await rig.asked()).sequence))
        [item] = items(seq)
        assert item.finish_reason is FinishReason.EOS_TOKEN
        assert seq.stream.is_ended
        assert rig.policy.is_idle

    run(test)


def test_a_dead_end_comes_after_the_token_that_led_there() -> None:
    async def test(rig: Rig) -> None:
        seq = under(FakeGrammar(1))
        await rig.admit(seq)
        await rig.read()
        await rig.hear(GrammarFailed((await rig.asked()).sequence, GrammarDeadEnd(1)))
        token, error = items(seq)
        assert isinstance(token, StreamToken)
        assert isinstance(error, GrammarDeadEnd)
        assert rig.policy.is_idle

    run(test)


def test_the_last_token_by_length_asks_no_grammar() -> None:
    async def test(rig: Rig) -> None:
        seq = under(FakeGrammar(1), max_new_tokens=1)
        await rig.admit(seq)
        await rig.read()
        assert len(rig.grammars) == 0
        assert items(seq)[0].finish_reason is FinishReason.LENGTH

    run(test)


def test_an_answer_for_whoever_went_away_harms_nobody() -> None:
    async def test(rig: Rig) -> None:
        seq, other = under(FakeGrammar(1)), sequence((5, 6), 9)
        await rig.admit(seq, other)
        await rig.read()
        seq.stream.is_cancelled = True
        await rig.wake()
        assert rig.policy.running == [other]
        await rig.hear(next_mask(seq))
        assert rig.policy.running == [other]
        while not other.is_over:
            await rig.read()
        assert len(items(other)) == 9

    run(test)


def test_a_step_waits_a_moment_for_masks_while_another_runs() -> None:
    """Then both are in it; without the moment's wait one of them would be left out each time."""

    async def test(rig: Rig) -> None:
        seq, other = under(FakeGrammar(1)), sequence((5, 6), 9)
        await rig.admit(seq, other)
        assert len(rig.launched) == 2  # the prompts', and a decode of the other alone
        await rig.read()
        assert len(rig.launched) == 1
        await rig.hear(next_mask((await rig.asked()).sequence))
        assert set(rig.launched[-1][0].outputs) == {seq, other}

    run(test)


def test_an_idle_device_waits_for_no_mask() -> None:
    async def test(rig: Rig) -> None:
        seq, other = under(FakeGrammar(1)), sequence((5, 6), 9)
        await rig.admit(seq, other)
        await rig.read()
        await rig.read()
        assert rig.launched[0][0].outputs == (other,)

    run(test)


def test_a_slow_grammar_is_waited_for_once_a_token() -> None:
    async def test(rig: Rig) -> None:
        first, second = under(FakeGrammar(1)), under(FakeGrammar(2))
        await rig.admit(first, second)
        await rig.read()
        await rig.hear(next_mask(first))
        assert not rig.launched  # the other's is still to come
        rig.now_s = 1.0
        await rig.wake()
        for _ in range(3):
            rig.now_s += 1.0
            plan = await rig.read()
            assert plan.outputs == (first,)
            assert not rig.launched
            await rig.hear(next_mask(first))
            assert len(rig.launched) == 1

    run(test)


def test_how_long_it_is_waited_for_follows_the_steps() -> None:
    async def test(rig: Rig) -> None:
        first, second = under(FakeGrammar(1)), under(FakeGrammar(2))
        await rig.admit(first, second)
        await rig.read()
        for seq in (first, second):
            await rig.hear(next_mask(seq))
        rig.now_s = 10.0
        await rig.read()
        await rig.hear(next_mask(first))
        rig.now_s += 4.9
        await rig.wake()
        assert not rig.launched
        rig.now_s += 0.2
        await rig.wake()
        assert rig.launched[0][0].outputs == (first,)

    run(test)


def test_time_is_up_by_itself() -> None:
    async def test(rig: Rig) -> None:
        first, second = under(FakeGrammar(1)), under(FakeGrammar(2))
        await rig.admit(first, second)
        for _ in range(2):
            await rig.read()
            await rig.hear(next_mask(first))
            while not rig.launched:
                await rig.settle()
            assert rig.launched[0][0].outputs == (first,)

    run(test, time.monotonic)


def test_scores_come_before_the_first_token_or_alone() -> None:
    async def test(rig: Rig) -> None:
        scored = sequence((1, 2, 3), 2, wants_prompt_logprobs=True)
        embedded = sequence((1, 2), 0, wants_embedding=True)
        await rig.admit(scored, embedded)
        while not scored.is_over or not embedded.is_over:
            await rig.read()
        first, *tokens = items(scored)
        assert isinstance(first, Scored)
        assert not first.is_last
        assert len(tokens) == 2
        [only] = items(embedded)
        assert isinstance(only, Scored)
        assert only.is_last
        assert embedded.stream.is_ended
        assert np.isfinite(only.scores.mean_hidden).all()

    run(test)
