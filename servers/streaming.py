"""An answer as a stream of events, whatever the family of routes: how it begins, fails and ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from jlorax.errors import JLoraxError
from servers.failures import unexpected
from servers.serving import SSE_COMMENT, notes_of
from servers.sse import SseStream, sse_stream


async def stream_answer(
    request: web.Request,
    headers: Mapping[str, str],
    send: Callable[[SseStream], Awaitable[None]],
    send_failure: Callable[[SseStream, JLoraxError], Awaitable[None]],
) -> web.StreamResponse:
    """It begins with the first event, so that an error before has a status of its own; one after it
    is told as ``send_failure`` does, inside the stream."""
    async with sse_stream(request, headers, request.app[SSE_COMMENT]) as stream:
        try:
            await send(stream)
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.is_open:
                raise
            failure = error if isinstance(error, JLoraxError) else unexpected(error)
            notes_of(request).failure = failure.code
            await send_failure(stream, failure)
        return await stream.finish()
