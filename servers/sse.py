"""Server-sent events: opened late, kept alive, bounded in time.

The response is opened by the first event, so an error before it still gets its own status. A
stream that is quiet for ``SSE_COMMENT_S`` (queueing, prefill) is opened and kept by comments.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from jlorax.wire.strict_json import dumps

WRITE_DEADLINE_S = 30.0
_SMALL_BYTES = 16384  # a quarter of what a transport holds before it makes writers wait
_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class SseStream:
    """One response of events. ``is_open`` once a byte may have gone out."""

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS | dict(headers))
        self._opening = asyncio.Lock()
        self._last_write_s = time.monotonic()

    @property
    def is_open(self) -> bool:
        return self._response.prepared

    async def send(self, body: object) -> None:
        await self.send_text(dumps(body))

    async def send_named(self, name: str, body: object) -> None:
        """An event with its name, which holds no line break."""
        await self._write(f"event: {name}\ndata: {dumps(body)}\n\n".encode())

    async def send_text(self, text: str) -> None:
        """An event whose JSON is made already."""
        await self._write(f"data: {text}\n\n".encode())

    async def send_done(self) -> None:
        """OpenAI's last line; LoRAX has none."""
        await self._write(b"data: [DONE]\n\n")

    async def finish(self) -> web.StreamResponse:
        await self._open()
        await self._response.write_eof()
        return self._response

    async def keep_alive(self, every_s: float) -> None:
        """Runs beside the stream: a comment whenever it was quiet for ``every_s``."""
        while True:
            quiet_s = time.monotonic() - self._last_write_s
            if quiet_s >= every_s:
                await self._write(b":\n\n")
                quiet_s = 0.0
            await asyncio.sleep(every_s - quiet_s)

    async def _open(self) -> None:
        async with self._opening:
            if not self._response.prepared:
                await self._response.prepare(self._request)

    async def _write(self, data: bytes) -> None:
        """Waits while the reader's buffers are full; one that stands still loses the stream."""
        if not self._response.prepared:
            await self._open()
        self._last_write_s = time.monotonic()
        if len(data) <= _SMALL_BYTES and self._is_flowing():  # cannot wait: a clock costs more
            await self._response.write(data)
        else:
            await self._write_in_time(data)

    def _is_flowing(self) -> bool:
        """Whether all that was written before has left for the system's own buffers."""
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() == 0

    async def _write_in_time(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_DEADLINE_S):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the reader stood still") from None


@asynccontextmanager
async def sse_stream(
    request: web.Request, headers: Mapping[str, str], comment_s: float
) -> AsyncIterator[SseStream]:
    stream = SseStream(request, headers)
    heart = asyncio.create_task(stream.keep_alive(comment_s))
    try:
        yield stream
    finally:
        heart.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await heart
