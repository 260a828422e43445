"""Scheduler: owns the sequences and the KV pages; plans a step while another runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    AcceptToken,
    AcceptTokens,
    Acquire,
    AdapterAtHand,
    AdapterFailed,
    AdapterLoading,
    AdapterReady,
    AdapterUnloadable,
    Admit,
    CacheMessage,
    Forget,
    GrammarAnswers,
    GrammarEnded,
    GrammarFailed,
    GrammarMessage,
    MaskReady,
    Prefetch,
    Release,
    RunnerMessage,
    RunStep,
    SchedulerMessage,
    StepDone,
    Wake,
)
from jlorax.actors.stream import Scored, StreamToken, TokenStream
from jlorax.errors import JLoraxError
from jlorax.metrics import Metrics
from jlorax.scheduling.patience import Patience
from jlorax.scheduling.policy import Emission, Policy, StepResults
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import StepPlan
from jlorax.types import AdapterVersion, FinishReason

_TURNS_TO_GATHER = 4
MAX_STEPS_IN_FLIGHT = 2  # one runs, one is queued behind it


class _Held(NamedTuple):
    emission: Emission
    since_s: float


class Scheduler:
    def __init__(
        self,
        inbox: Mailbox[SchedulerMessage],
        cache: Mailbox[CacheMessage],
        runner: Mailbox[RunnerMessage],
        grammars: Mailbox[GrammarMessage],
        policy: Policy,
        metrics: Metrics,
        masks_within: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox = inbox
        self._cache = cache
        self._runner = runner
        self._grammars = grammars
        self._policy = policy
        self._metrics = metrics
        self._patience = Patience(masks_within)
        self._clock = clock
        self._num_in_flight = 0
        self._held: dict[Sequence, _Held] = {}  # tokens that their grammars have to see first
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        async for message in self._inbox:
            self._take(message)
            if len(self._inbox):  # what came together is decided together
                continue
            now_s = self._clock()
            self._put_in_order(now_s)
            if not self._num_in_flight and await self._more_is_coming():
                continue
            if not self._masks_are_coming(now_s):
                self._launch(now_s)

    async def _more_is_coming(self) -> bool:
        """Whether a message comes within a few turns of the loop.

        An idle device would else begin with the first few of many requests that arrive together,
        whose adapters take them through other actors: then the rest wait for that step.
        """
        for _ in range(_TURNS_TO_GATHER):
            await asyncio.sleep(0)
            if len(self._inbox):
                return True
        return False

    def _masks_are_coming(self, now_s: float) -> bool:
        """Whether the next step is worth a moment's delay, for those who draw under a grammar.

        A step that is planned the moment the last one is read would always be without them, and
        they would draw in every third step only. Never while the device idles and others could go
        on; and a grammar that takes longer is not waited for, nor again by a later step.
        """
        if not self._held:
            return False
        latest = next(reversed(self._held.values()))
        left_s = latest.since_s + self._patience.hold_s - now_s
        if left_s <= 0:
            return False
        if not self._num_in_flight and any(s.matcher is None for s in self._policy.running):
            return False
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._time_is_up)
        return True

    def _time_is_up(self) -> None:
        self._timer = None
        self._inbox.post(Wake())

    def _take(self, message: SchedulerMessage) -> None:
        match message:
            case Admit(sequence):
                self._admit(sequence)
            case Wake():
                pass
            case StepDone(plan, output):
                self._complete(plan, output, self._clock())
            case GrammarAnswers(answers):
                for answer in answers:
                    self._hear(answer, self._held.pop(answer.sequence).emission)
            case AdapterAtHand(version):
                self._policy.at_hand(version)
            case AdapterLoading(version):
                self._policy.not_at_hand(version)
            case AdapterUnloadable(version, error):
                self._fail_waiting(version, error)
            case AdapterReady(version, slot, reach):
                self._policy.pins.ready(version, slot, reach)
            case AdapterFailed(version, error):
                self._policy.pins.failed(version)
                self._fail_waiting(version, error)

    def _put_in_order(self, now_s: float) -> None:
        self._mark_cancelled()
        self._remove_over()
        self._update_pins(now_s)

    def _admit(self, sequence: Sequence) -> None:
        self._policy.add(sequence)
        if sequence.version is not None:
            self._cache.post(Prefetch(sequence.version))

    def _mark_cancelled(self) -> None:
        for sequence in (*self._policy.running, *self._policy.waiting):
            stream: TokenStream = sequence.stream
            sequence.is_cancelled = sequence.is_cancelled or stream.is_cancelled

    def _remove_over(self) -> None:
        for sequence in self._policy.remove_over():
            if sequence.version is not None:
                self._cache.post(Forget(sequence.version))

    def _update_pins(self, now_s: float) -> None:
        changes = self._policy.update_pins(now_s)
        for version in changes.release:
            self._cache.post(Release(version))
        for version in changes.acquire:
            self._cache.post(Acquire(version))

    def _launch(self, now_s: float) -> None:
        while self._num_in_flight < MAX_STEPS_IN_FLIGHT:
            plan = self._policy.plan(now_s)
            if plan is None:
                return
            if not self._num_in_flight:
                self._patience.launched_alone(now_s)
            self._num_in_flight += 1
            self._metrics.step("decode" if plan.shape.is_decode else "extend", plan.num_tokens)
            # In the lane of the cache's writes: a write must never pass a step sent before it.
            self._runner.post(RunStep(plan))

    def _complete(self, plan: StepPlan, output: StepResults, now_s: float) -> None:
        """A token under a grammar is shown once that has said whether it is the last."""
        self._num_in_flight -= 1
        self._patience.read(now_s, is_decode=plan.shape.is_decode)
        drawn = []
        for emission in self._policy.complete(plan, output):
            sequence, token = emission.sequence, emission.token
            if sequence.matcher is None or token is None or emission.finish_reason is not None:
                self._put(emission)
            else:
                self._held[sequence] = _Held(emission, now_s)
                drawn.append(AcceptToken(sequence, token))
        if drawn:
            self._grammars.post(AcceptTokens(tuple(drawn)))

    def _hear(self, answer: MaskReady | GrammarEnded | GrammarFailed, emission: Emission) -> None:
        match answer:
            case MaskReady(sequence, mask):
                sequence.mask = mask
                self._put(emission)
            case GrammarEnded():
                self._end(emission)
            case GrammarFailed(sequence, error):
                self._put(emission)
                self._fail(sequence, error)

    def _end(self, emission: Emission) -> None:
        emission.sequence.finish_reason = FinishReason.EOS_TOKEN
        self._put(replace(emission, finish_reason=FinishReason.EOS_TOKEN))

    def _put(self, emission: Emission) -> None:
        stream: TokenStream = emission.sequence.stream
        if emission.scores is not None:
            stream.put(Scored(emission.scores, is_last=emission.token is None))
        if emission.token is not None:
            stream.put(
                StreamToken(
                    emission.token, emission.logprob, emission.alternatives, emission.finish_reason
                )
            )

    def _fail_waiting(self, version: AdapterVersion, error: JLoraxError) -> None:
        for sequence in self._policy.waiting_for(version):
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: JLoraxError) -> None:
        sequence.is_cancelled = True
        stream: TokenStream = sequence.stream
        stream.fail(error)
