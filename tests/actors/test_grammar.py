"""The grammar actor between an ingress and a scheduler that are only mailboxes and futures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from jlorax.actors.grammar import Grammars
from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    AcceptToken,
    AcceptTokens,
    CompileGrammar,
    GrammarAnswers,
    GrammarEnded,
    GrammarFailed,
    GrammarMessage,
    GrammarStart,
    MaskReady,
    SchedulerMessage,
)
from jlorax.errors import GrammarDeadEnd, InvalidParameter, InvalidRequest, JLoraxError
from jlorax.scheduling.sequence import Sequence
from jlorax.types import Constraint, ConstraintKind, SamplingParams

MASK = np.array([6], np.int32)
Answer = MaskReady | GrammarEnded | GrammarFailed


class Countdown:
    """A matcher: so many tokens, then the end, or none."""

    def __init__(self, length: int, is_deadly: bool = False) -> None:
        self.length = length
        self.is_deadly = is_deadly
        self.accepted: list[int] = []
        self.threads: set[str] = set()
        self.is_slow = False

    def mask(self) -> np.ndarray:
        return MASK + len(self.accepted)

    def accept(self, token_id: int) -> None:
        self.threads.add(threading.current_thread().name)
        if token_id < 0:
            raise ZeroDivisionError("secret words of the answer")
        self.accepted.append(token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.accepted) == self.length and not self.is_deadly

    @property
    def is_dead(self) -> bool:
        return len(self.accepted) == self.length and self.is_deadly


class Compiler:
    """Its sources say what comes of them; "slow" waits for the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def compile(self, constraint: Constraint) -> Any:
        match constraint.source:
            case "slow":
                assert self.gate.wait(30)
            case "bad":
                raise InvalidParameter("regex", "is refused")
            case "broken":
                raise ZeroDivisionError("secret words of the grammar")
        return GrammarOf(0 if constraint.source == "empty" else 2)


class GrammarOf:
    def __init__(self, length: int) -> None:
        self.length = length

    def matcher(self) -> Countdown:
        return Countdown(self.length)


class Rig:
    def __init__(self) -> None:
        self.inbox: Mailbox[GrammarMessage] = Mailbox(8)
        self.scheduler: Mailbox[SchedulerMessage] = Mailbox(8)
        self.compiler = Compiler()

    def compiled(self, source: str) -> asyncio.Future[GrammarStart]:
        reply: asyncio.Future[GrammarStart] = asyncio.get_running_loop().create_future()
        self.inbox.post(CompileGrammar(Constraint(ConstraintKind.REGEX, source), reply))
        return reply

    async def accepted(self, matcher: Countdown, token: int) -> Answer:
        return (await self.answers(AcceptToken(sequence_under(matcher), token)))[0]

    async def answers(self, *tokens: AcceptToken) -> tuple[Answer, ...]:
        """Those that come together first."""
        self.inbox.post(AcceptTokens(tokens))
        message = await anext(self.scheduler)
        assert isinstance(message, GrammarAnswers)
        return message.answers


def sequence_under(matcher: Countdown) -> Sequence:
    return Sequence(
        (1, 2), SamplingParams(), 0, 9, frozenset(), None, matcher=matcher, mask=matcher.mask()
    )


def run(test: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        rig = Rig()
        actor = asyncio.create_task(Grammars(rig.inbox, rig.scheduler, rig.compiler).run())
        try:
            async with asyncio.timeout(20):
                await test(rig)
        finally:
            rig.compiler.gate.set()
            actor.cancel()
            await asyncio.wait([actor])
        assert actor.cancelled()
        assert rig.compiler.is_closed

    asyncio.run(whole())


def test_each_compiled_grammar_comes_with_its_own_matcher_and_first_mask() -> None:
    async def test(rig: Rig) -> None:
        first, second = await asyncio.gather(rig.compiled("a"), rig.compiled("a"))
        assert first.matcher is not second.matcher
        np.testing.assert_array_equal(first.mask, MASK)

    run(test)


@pytest.mark.parametrize(
    ("source", "kind"),
    [("bad", InvalidParameter), ("empty", InvalidRequest), ("broken", JLoraxError)],
)
def test_what_cannot_be_compiled_is_answered_and_the_next_is_served(
    source: str, kind: type[JLoraxError]
) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(kind) as caught:
            await rig.compiled(source)
        assert "secret" not in str(caught.value)
        assert (await rig.compiled("a")).matcher is not None

    run(test)


def test_a_slow_grammar_holds_up_neither_another_nor_a_mask() -> None:
    async def test(rig: Rig) -> None:
        slow = [rig.compiled("slow")]
        start = await rig.compiled("a")
        slow += [rig.compiled("slow") for _ in range(20)]  # every thread that compiles is busy
        for _ in range(20):
            await asyncio.sleep(0)
        assert isinstance(await rig.accepted(start.matcher, 5), MaskReady)
        assert not any(reply.done() for reply in slow)
        rig.compiler.gate.set()
        assert all(made.matcher is not None for made in await asyncio.gather(*slow))

    run(test)


def test_whoever_gave_up_waiting_harms_nobody() -> None:
    async def test(rig: Rig) -> None:
        gone = rig.compiled("slow")
        gone.cancel()
        rig.compiler.gate.set()
        assert (await rig.compiled("a")).matcher is not None

    run(test)


def test_a_token_is_answered_by_the_next_mask_or_the_end() -> None:
    async def test(rig: Rig) -> None:
        matcher = Countdown(2)
        answer = await rig.accepted(matcher, 5)
        assert isinstance(answer, MaskReady)
        np.testing.assert_array_equal(answer.mask, MASK + 1)
        assert isinstance(await rig.accepted(matcher, 7), GrammarEnded)
        assert matcher.accepted == [5, 7]
        assert all(name.startswith("grammar-mask") for name in matcher.threads)

    run(test)


def test_a_dead_end_says_after_how_many_tokens() -> None:
    async def test(rig: Rig) -> None:
        sequence = sequence_under(Countdown(1, is_deadly=True))
        sequence.accept(5)
        [answer] = await rig.answers(AcceptToken(sequence, 5))
        assert isinstance(answer, GrammarFailed)
        assert answer.sequence is sequence
        assert isinstance(answer.error, GrammarDeadEnd)
        assert answer.error.num_tokens == 1

    run(test)


def test_a_matcher_that_breaks_fails_its_sequence_alone() -> None:
    async def test(rig: Rig) -> None:
        drawn = [AcceptToken(sequence_under(Countdown(9)), token) for token in (4, -1, 4)]
        first, answer, last = await rig.answers(*drawn)
        assert isinstance(answer, GrammarFailed)
        assert answer.sequence is drawn[1].sequence
        assert "ZeroDivisionError" in str(answer.error)
        assert "secret" not in str(answer.error)
        assert isinstance(first, MaskReady)
        assert isinstance(last, MaskReady)

    run(test)


def test_a_steps_tokens_are_shared_by_threads_when_there_are_many() -> None:
    async def test(rig: Rig) -> None:
        drawn = [AcceptToken(sequence_under(Countdown(9)), i) for i in range(50)]
        rig.inbox.post(AcceptTokens(tuple(drawn)))
        answers: list[Answer] = []
        num_messages = 0
        while len(answers) < len(drawn):
            message = await anext(rig.scheduler)
            assert isinstance(message, GrammarAnswers)
            answers += message.answers
            num_messages += 1
        assert num_messages == 4
        assert {id(answer.sequence) for answer in answers} == {id(d.sequence) for d in drawn}
        assert all(d.sequence.matcher.accepted == [d.token] for d in drawn)

    run(test)


class Gated(Countdown):
    """Its next mask comes when the gate opens."""

    def __init__(self, gate: threading.Event, is_slow: bool) -> None:
        super().__init__(9)
        self.gate = gate
        self.is_slow = is_slow

    def mask(self) -> np.ndarray:
        assert not self.accepted or self.gate.wait(30)
        return super().mask()


def test_nobody_stands_behind_a_slow_matcher() -> None:
    async def test(rig: Rig) -> None:
        gate = threading.Event()
        slow = [Gated(gate, is_slow=True) for _ in range(9)]  # more than there are threads
        quick = Countdown(9)
        answers = await rig.answers(
            *(AcceptToken(sequence_under(matcher), 1) for matcher in (*slow, quick))
        )
        assert [answer.sequence.matcher for answer in answers] == [quick]
        gate.set()
        for _ in slow:
            message = await anext(rig.scheduler)
            assert isinstance(message, GrammarAnswers)
            [answer] = message.answers
            assert isinstance(answer, MaskReady)

    run(test)
