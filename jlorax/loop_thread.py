"""Coroutines for callers without an event loop: a thread that runs them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from jlorax.errors import JLoraxError, RequestCancelled

T = TypeVar("T")


class LoopThread:
    """One event loop on one daemon thread; safe to use from several threads. ``owner`` names it."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"jlorax-{owner.lower()}", daemon=True
        )
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises; an exception here (Ctrl-C) cancels it there.

        RequestCancelled when this is closed meanwhile.
        """
        if self.is_closed:
            work.close()
            raise JLoraxError(f"this {self._owner} is closed")
        future = None
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            return future.result()
        except CancelledError:
            raise RequestCancelled(f"this {self._owner} was closed") from None
        except BaseException:
            if future is not None:
                future.cancel()
            raise

    def iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        """Leaving early closes ``events``."""
        try:
            while (event := self.run(_next(events))) is not None:
                yield event
        finally:
            if not self.is_closed:
                self.run(_close(events))

    def close(self) -> None:
        """Cancels what still runs. Again does no harm."""
        if self.is_closed:
            return
        self.run(_end_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(events: AsyncGenerator[T, None]) -> T | None:
    return await anext(events, None)


async def _end_others() -> None:
    """Tasks, generators that nobody closed, and the threads of ``to_thread``."""
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def _close(events: AsyncGenerator[Any, None]) -> None:
    await events.aclose()
