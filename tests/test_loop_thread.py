"""A thread that runs coroutines for callers without a loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from types import FrameType

import pytest

from jlorax.errors import JLoraxError, RequestCancelled
from jlorax.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("Tester")
    yield thread
    thread.close()


async def answer(value: int) -> int:
    return value


def test_results_and_errors_come_back(thread: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("mine")

    assert thread.run(answer(5)) == 5
    with pytest.raises(ValueError, match="mine"):
        thread.run(fail())


def test_an_interrupt_here_cancels_there(thread: LoopThread) -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(0.1)  # until the main thread waits
            os.kill(os.getpid(), signal.SIGUSR1)  # as Ctrl-C comes: to the main thread
            await asyncio.Event().wait()
        finally:
            ended.set()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.run(work())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.wait(10)


def test_leaving_an_iteration_closes_the_generator(thread: LoopThread) -> None:
    closed = threading.Event()

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            for number in range(100):
                yield number
        finally:
            closed.set()

    assert list(thread.iterate(numbers())) == list(range(100))
    closed.clear()
    for number in thread.iterate(numbers()):
        if number == 3:
            break
    assert closed.is_set()


def test_closing_ends_who_waits_and_all_threads() -> None:
    before = threading.active_count()
    thread = LoopThread("Tester")
    begun = threading.Event()
    caught: list[BaseException] = []

    async def work() -> None:
        await asyncio.to_thread(begun.set)
        await asyncio.Event().wait()

    def wait() -> None:
        try:
            thread.run(work())
        except JLoraxError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(10)
    thread.close()
    waiting.join(10)
    assert isinstance(caught[0], RequestCancelled)
    assert "this Tester was closed" in str(caught[0])
    with pytest.raises(JLoraxError, match="this Tester is closed"):
        thread.run(answer(1))
    thread.close()
    assert threading.active_count() == before
