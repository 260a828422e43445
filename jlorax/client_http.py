"""One HTTP exchange with a server: typed errors, and the events of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any

import aiohttp
from yarl import URL

from jlorax.errors import Unavailable
from jlorax.wire.failures import read_error

Body = Mapping[str, Any] | aiohttp.FormData


class Exchange:
    """``async with`` gives the response; a connection that fails is Unavailable, like a server
    that says so. ``url`` is quoted already: yarl would decode %2F in an adapter's id."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        body: Body | None,
    ) -> None:
        self._url = url
        sent: dict[str, Any] = {"data" if isinstance(body, aiohttp.FormData) else "json": body}
        self._request = session.request(method, URL(url, encoded=True), **sent)

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response = await self._request.__aenter__()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"{self._url} cannot be reached: {error}") from error
        try:
            await _raise_for_error(response)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return response

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._request.__aexit__(kind, error, trace)
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise Unavailable(f"{self._url} broke off its answer: {error}") from error


async def _raise_for_error(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        body = json.loads(await response.read())
    except ValueError:  # a proxy's page
        body = None
    retry_after = response.headers.get("Retry-After", "")
    raise read_error(response.status, body, float(retry_after) if retry_after.isdigit() else None)


async def data_lines(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event; comments and blank lines are skipped."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
