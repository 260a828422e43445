"""An actor's inbox: two lanes.

    forward   bounded: ``put`` waits for room, which is back-pressure in the request direction
    returns   never waits: its volume is bounded by what is outstanding, and it is read first

With one bounded queue, new requests would fill the room that the returns need, and the ring of
actors would stand still. Each lane keeps its order, the lanes among themselves do not. Used from
the event loop's thread; others go through ``post_from_thread``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

M = TypeVar("M")


class Mailbox(Generic[M]):
    """Read with ``async for``, by one task or by several that share the work."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._forward: deque[M] = deque()
        self._returns: deque[M] = deque()
        self._writers: deque[tuple[M, asyncio.Future[None]]] = deque()
        self._readers: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def __len__(self) -> int:
        """What can be read now."""
        return len(self._forward) + len(self._returns)

    def try_put(self, message: M) -> bool:
        """Forward lane; False when it is full."""
        if len(self._forward) >= self._capacity and not self._closed:
            return False
        self._forward.append(message)
        self._wake_reader()
        return True

    async def put(self, message: M) -> None:
        """Forward lane; waits until there is room, first come first served."""
        if self.try_put(message):
            return
        room = self._loop.create_future()
        self._writers.append((message, room))
        await room  # a writer that is cancelled here cancels it, and is passed over

    def post(self, message: M) -> None:
        """Return lane; never waits."""
        self._returns.append(message)
        self._wake_reader()

    def post_from_thread(self, message: M) -> None:
        """Return lane, from a thread that is not the loop's; quiet once the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self.post, message)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def close(self) -> None:
        """Ends every reader's ``async for`` once what is here is read; no writer waits any more."""
        self._closed = True
        while self._writers:
            self._admit_writer()
        while self._readers:
            self._wake_reader()

    def __aiter__(self) -> Mailbox[M]:
        return self

    async def __anext__(self) -> M:
        while True:
            if self._returns:
                return self._returns.popleft()
            if self._forward:
                return self._take_forward()
            if self._closed:
                raise StopAsyncIteration
            await self._until_woken()

    def _take_forward(self) -> M:
        """The room it leaves goes to the writer that waited longest: nobody can barge in."""
        message = self._forward.popleft()
        self._admit_writer()
        return message

    def _admit_writer(self) -> None:
        while self._writers:
            waiting, room = self._writers.popleft()
            if _resolve(room):
                self._forward.append(waiting)
                return

    async def _until_woken(self) -> None:
        reader = self._loop.create_future()
        self._readers.append(reader)
        try:
            await reader
        except asyncio.CancelledError:
            if len(self):  # it may have been woken for this; another must see it
                self._wake_reader()
            raise

    def _wake_reader(self) -> None:
        while self._readers:
            if _resolve(self._readers.popleft()):
                return


def _resolve(future: asyncio.Future[None]) -> bool:
    """False when its task gave up in the meantime."""
    if future.done():
        return False
    future.set_result(None)
    return True
