"""Runner: owns the device. One thread launches, another reads, and messages keep their order.

Launching never waits for a result, so the next step is on the device before the last one's tokens
are read; a slot's write lies between the steps it was sent between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    DeviceFault,
    RunnerMessage,
    RunStep,
    SchedulerMessage,
    StepDone,
    WriteSlot,
)
from jlorax.device.device import Device, read
from jlorax.device.step import StepOutput
from jlorax.layout import SlotWrite
from jlorax.scheduling.step_plan import StepPlan


class Runner:
    def __init__(
        self, inbox: Mailbox[RunnerMessage], scheduler: Mailbox[SchedulerMessage], device: Device
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._device = device
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="device-launch")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="device-read")

    async def run(self) -> None:
        try:
            async for message in self._inbox:
                match message:
                    case RunStep(plan):
                        self._launcher.submit(self._guarded, self._launch, plan)
                    case WriteSlot(write):
                        self._launcher.submit(self._guarded, self._write, write)
                    case DeviceFault(error):
                        raise error
        finally:
            await asyncio.to_thread(self._stop)

    def _launch(self, plan: StepPlan) -> None:
        output = self._device.launch(plan.shape, plan.packed, plan.writes)
        self._reader.submit(self._guarded, self._read, plan, output)

    def _read(self, plan: StepPlan, output: StepOutput) -> None:
        read_now = read(output, alternatives=plan.wants_alternatives, scores=plan.shape.scores)
        self._scheduler.post_from_thread(StepDone(plan, read_now))

    def _write(self, write: SlotWrite) -> None:
        self._device.write_slot(write)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._inbox.post_from_thread(DeviceFault(error))

    def _stop(self) -> None:
        """Waits for what runs on the device: its arrays must outlive it."""
        self._launcher.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)
