"""An actor's inbox: two lanes, one reader.

    forward   bounded: ``put`` waits for room, which is back-pressure in the request direction
    returns   never waits: its volume is bounded by what is outstanding, and it is read first

With one bounded queue, new requests would fill the room that the returns need, and the ring of
actors would stand still. Used from the event loop's thread; others go through ``post_from_thread``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

M = TypeVar("M")


class Mailbox(Generic[M]):
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._forward: deque[M] = deque()
        self._returns: deque[M] = deque()
        self._room: deque[asyncio.Future[None]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def __len__(self) -> int:
        return len(self._forward) + len(self._returns)

    def try_put(self, message: M) -> bool:
        """Forward lane; False when it is full."""
        if len(self._forward) >= self._capacity:
            return False
        self._forward.append(message)
        self._wake_reader()
        return True

    async def put(self, message: M) -> None:
        """Forward lane; waits until there is room."""
        while not self.try_put(message):
            room = self._loop.create_future()
            self._room.append(room)
            try:
                await room
            except asyncio.CancelledError:
                self._forget(room)
                raise

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
        """Ends the reader's ``async for`` once what is here is read."""
        self._closed = True
        self._wake_reader()

    def __aiter__(self) -> Mailbox[M]:
        return self

    async def __anext__(self) -> M:
        while True:
            if self._returns:
                return self._returns.popleft()
            if self._forward:
                self._wake_one_writer()
                return self._forward.popleft()
            if self._closed:
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            await self._reader

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_one_writer(self) -> None:
        while self._room:
            room = self._room.popleft()
            if not room.done():
                room.set_result(None)
                return

    def _forget(self, room: asyncio.Future[None]) -> None:
        """A writer that gave up passes a wake-up it had already received on to the next."""
        if room in self._room:
            self._room.remove(room)
        elif room.done() and not room.cancelled():
            self._wake_one_writer()
