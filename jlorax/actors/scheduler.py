"""Scheduler: owns the sequences and the KV pages; plans a step while another runs."""

from __future__ import annotations

import time

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    Acquire,
    AdapterFailed,
    AdapterReady,
    AdapterWaits,
    Admit,
    CacheMessage,
    Prefetch,
    Release,
    RunnerMessage,
    RunStep,
    SchedulerMessage,
    StepDone,
    Wake,
)
from jlorax.actors.stream import StreamToken, TokenStream
from jlorax.errors import JLoraxError
from jlorax.metrics import Metrics
from jlorax.scheduling.policy import Emission, Policy
from jlorax.scheduling.sequence import Sequence

MAX_STEPS_IN_FLIGHT = 2  # one runs, one is queued behind it


class Scheduler:
    def __init__(
        self,
        inbox: Mailbox[SchedulerMessage],
        cache: Mailbox[CacheMessage],
        runner: Mailbox[RunnerMessage],
        policy: Policy,
        metrics: Metrics,
    ) -> None:
        self._inbox = inbox
        self._cache = cache
        self._runner = runner
        self._policy = policy
        self._metrics = metrics
        self._num_in_flight = 0

    async def run(self) -> None:
        async for message in self._inbox:
            match message:
                case Admit(sequence):
                    self._admit(sequence)
                case StepDone(plan, output):
                    self._num_in_flight -= 1
                    for emission in self._policy.complete(plan, output):
                        self._emit(emission)
                case AdapterReady(version, slot):
                    self._policy.pins.ready(version, slot)
                case AdapterWaits(version):
                    self._policy.pins.waits_for_slot(version, time.monotonic())
                case AdapterFailed(version, error):
                    self._policy.pins.failed(version)
                    for sequence in self._policy.waiting_for(version):
                        self._fail(sequence, error)
                case Wake():
                    pass
            self._mark_cancelled()
            self._policy.remove_over()
            self._update_pins()
            await self._launch()

    def _admit(self, sequence: Sequence) -> None:
        self._policy.add(sequence)
        if sequence.version is not None:
            self._cache.post(Prefetch(sequence.version))

    def _mark_cancelled(self) -> None:
        for sequence in (*self._policy.running, *self._policy.waiting):
            stream: TokenStream = sequence.stream
            sequence.is_cancelled = sequence.is_cancelled or stream.is_cancelled

    def _update_pins(self) -> None:
        changes = self._policy.update_pins(time.monotonic())
        for version in changes.release:
            self._cache.post(Release(version))
        for version in changes.acquire:
            self._cache.post(Acquire(version))

    async def _launch(self) -> None:
        while self._num_in_flight < MAX_STEPS_IN_FLIGHT:
            plan = self._policy.plan(time.monotonic())
            if plan is None:
                return
            self._num_in_flight += 1
            self._metrics.step("decode" if plan.shape.tile == 1 else "extend", plan.num_tokens)
            await self._runner.put(RunStep(plan))

    def _emit(self, emission: Emission) -> None:
        stream: TokenStream = emission.sequence.stream
        stream.put(
            StreamToken(
                emission.token, emission.logprob, emission.alternatives, emission.finish_reason
            )
        )

    def _fail(self, sequence: Sequence, error: JLoraxError) -> None:
        sequence.is_cancelled = True
        sequence.stream.fail(error)
