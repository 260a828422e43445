"""A request's stream: it ends once, with its last token or with an error."""

from __future__ import annotations

import asyncio

import pytest

from jlorax.actors.stream import Item, Opened, Scored, StreamToken, TokenStream
from jlorax.errors import Unavailable
from jlorax.scheduling.prompt_scores import PromptScores
from jlorax.types import FinishReason

LAST = StreamToken(2, -0.5, (), FinishReason.LENGTH)


def test_items_come_in_order_and_the_last_one_ends_it() -> None:
    async def test() -> None:
        stream = TokenStream()
        items: list[Item] = [Opened((1,), 0, 0.0), StreamToken(1, 0.0, (), None), LAST]
        for item in items:
            assert not stream.is_ended
            stream.put(item)
        assert stream.is_ended
        assert [await stream.get() for _ in items] == items

    asyncio.run(test())


def test_an_error_comes_after_what_was_there() -> None:
    async def test() -> None:
        stream = TokenStream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        stream.put(StreamToken(1, 0.0, (), None))
        stream.fail(Unavailable("gone"))
        assert (await reader).token == 1  # type: ignore[union-attr]
        with pytest.raises(Unavailable, match="gone"):
            await stream.get()

    asyncio.run(test())


def test_a_reader_that_gives_up_loses_nothing() -> None:
    async def test() -> None:
        stream = TokenStream()
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        reader.cancel()
        stream.put(LAST)
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await stream.get() == LAST

    asyncio.run(test())


def test_the_first_end_counts() -> None:
    async def test() -> None:
        stream = TokenStream()
        stream.put(LAST)
        stream.fail(Unavailable("gone"))
        assert await stream.get() == LAST
        other = TokenStream()
        other.fail(Unavailable("gone"))
        other.put(StreamToken(1, 0.0, (), None))
        assert other.is_ended
        with pytest.raises(Unavailable):
            await other.get()
        assert not other._items

    asyncio.run(test())


def test_scores_end_a_stream_when_nothing_else_was_asked_for() -> None:
    async def test() -> None:
        scores = PromptScores(num_tokens=3, num_alternatives=0)
        stream = TokenStream()
        stream.put(Scored(scores, is_last=False))
        assert not stream.is_ended
        stream.put(Scored(scores, is_last=True))
        assert stream.is_ended
        stream.put(Scored(scores, is_last=True))
        assert len(stream._items) == 2

    asyncio.run(test())
