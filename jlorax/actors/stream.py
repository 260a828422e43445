"""A request's token stream: opened by ingress, written by the scheduler, read by one handler."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from jlorax.errors import JLoraxError
from jlorax.scheduling.prompt_scores import PromptScores
from jlorax.types import FinishReason


@dataclass(frozen=True)
class Opened:
    """First item: what the prompt came to. ``seed`` is the one in use."""

    prompt: tuple[int, ...]
    seed: int
    queue_start_s: float


class StreamToken(NamedTuple):
    """One is made for every token of every stream, and a tuple is made in a third of the time."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Scored:
    """What became of the prompt, before the first token; ``is_last``: nobody asked for more."""

    scores: PromptScores
    is_last: bool


Item = Opened | Scored | StreamToken


class TokenStream:
    """Holds at most one answer, so writing never waits. ``is_cancelled`` is read by every stop.

    One reader at a time.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self._items: deque[Item | JLoraxError] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._ended = False

    @property
    def is_ended(self) -> bool:
        return self._ended

    def put(self, item: Item) -> None:
        """Adds an item; one that comes after the end is dropped."""
        if self._ended:
            return
        self._items.append(item)
        self._ended = _is_last(item)
        self._wake_reader()

    def fail(self, error: JLoraxError) -> None:
        """Ends the stream with an error, unless it ended already."""
        if not self._ended:
            self._ended = True
            self._items.append(error)
            self._wake_reader()

    async def get(self) -> Item:
        """The next item; raises the error that ended the stream."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._items.popleft()
        if isinstance(item, JLoraxError):
            raise item
        return item

    def _wake_reader(self) -> None:
        """A reader that was cancelled meanwhile has cancelled its future."""
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)


def _is_last(item: Item) -> bool:
    if isinstance(item, StreamToken):
        return item.finish_reason is not None
    return isinstance(item, Scored) and item.is_last
