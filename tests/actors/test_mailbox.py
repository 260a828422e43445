"""Two lanes, back-pressure, and what cancelled readers and writers leave behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from jlorax.actors.mailbox import Mailbox


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


async def settle() -> None:
    """Lets every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def drained(box: Mailbox[int]) -> list[int]:
    box.close()
    return [message async for message in box]


def test_returns_are_read_first_and_each_lane_keeps_its_order() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(8)
        for message in (1, 2):
            assert box.try_put(message)
        for message in (10, 11):
            box.post(message)
        assert len(box) == 4
        assert await drained(box) == [10, 11, 1, 2]

    run(test())


def test_a_full_forward_lane_holds_writers_up_and_never_returns() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(1)
        assert box.try_put(1)
        assert not box.try_put(2)
        writer = asyncio.create_task(box.put(2))
        await settle()
        assert not writer.done()
        box.post(10)
        assert [await anext(box), await anext(box)] == [10, 1]
        await writer
        assert await anext(box) == 2

    run(test())


def test_writers_get_room_in_the_order_they_came_and_nobody_barges_in() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(1)
        box.try_put(0)
        writers = [asyncio.create_task(box.put(i)) for i in (1, 2, 3)]
        await settle()
        assert await anext(box) == 0
        assert not box.try_put(9)  # the room is the first writer's
        assert [await anext(box) for _ in range(3)] == [1, 2, 3]
        await asyncio.gather(*writers)

    run(test())


def test_a_cancelled_writer_leaves_no_message_and_its_room_goes_to_the_next() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(1)
        box.try_put(0)
        first, second = (asyncio.create_task(box.put(i)) for i in (1, 2))
        await settle()
        first.cancel()
        await settle()
        assert await anext(box) == 0
        await second
        assert await drained(box) == [2]

    run(test())


def test_every_waiting_reader_is_woken_for_a_message() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(8)
        readers = [asyncio.create_task(box.__anext__()) for _ in range(3)]
        await settle()
        for i in range(3):
            box.post(i)
        assert sorted(await asyncio.gather(*readers)) == [0, 1, 2]

    run(test())


def test_a_reader_cancelled_when_just_woken_passes_the_message_on() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(8)
        first, second = (asyncio.create_task(box.__anext__()) for _ in range(2))
        await settle()
        box.post(7)
        first.cancel()
        assert await second == 7

    run(test())


def test_close_ends_all_readers_after_what_is_here_and_frees_writers() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(1)

        async def read() -> list[int]:
            return [message async for message in box]

        idle = [asyncio.create_task(read()) for _ in range(2)]
        await settle()
        box.try_put(0)
        writer = asyncio.create_task(box.put(1))
        await asyncio.sleep(0)
        box.close()
        assert sorted(m for found in await asyncio.gather(*idle) for m in found) == [0, 1]
        await writer
        await box.put(2)
        await box.put(3)  # nobody reads: nobody may wait

    run(test())


def test_messages_from_a_thread_arrive_in_order() -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(1)

        def post() -> None:
            for i in range(100):
                box.post_from_thread(i)

        thread = threading.Thread(target=post)
        thread.start()
        assert [await anext(box) for _ in range(100)] == list(range(100))
        thread.join()

    run(test())


def test_a_thread_that_outlives_the_loop_is_not_troubled() -> None:
    async def make() -> Mailbox[int]:
        return Mailbox(1)

    asyncio.run(make()).post_from_thread(1)


@pytest.mark.parametrize("num_readers", [1, 4])
def test_nothing_is_lost_or_doubled_under_load(num_readers: int) -> None:
    async def test() -> None:
        box: Mailbox[int] = Mailbox(3)
        seen: list[int] = []

        async def read() -> None:
            async for message in box:
                seen.append(message)
                if message % 3 == 0:
                    await asyncio.sleep(0)

        async def write(start: int) -> None:
            for i in range(50):
                await box.put(start + i)

        readers = [asyncio.create_task(read()) for _ in range(num_readers)]
        await asyncio.gather(*(write(100 * n) for n in range(5)))
        box.close()
        await asyncio.gather(*readers)
        assert sorted(seen) == sorted(100 * n + i for n in range(5) for i in range(50))

    run(test())
