"""The whole HTTP server on a real socket, over the fake engine."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from jlorax.config import ServerConfig
from servers.rest import bound_port, create_app, create_runner
from tests.fakes import FakeEngine

TEST_DEADLINE_S = 30.0


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test, with a deadline that names it instead of hanging."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(TEST_DEADLINE_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The data of each event; "[DONE]" stays a string."""
        data = [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True)
class Server:
    engine: FakeEngine
    url: str
    port: int
    runner: web.AppRunner
    session: aiohttp.ClientSession

    @property
    def num_connections(self) -> int:
        assert self.runner.server is not None
        return len(self.runner.server.connections)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: object, **options: Any) -> Answer:
        return await self.call("POST", path, json=body, **options)

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.text())

    async def raw(self, sent: bytes) -> bytes:
        """What comes back for these bytes until the server closes (or 2 s of silence)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        try:
            async with asyncio.timeout(2.0):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    config: ServerConfig | None = None,
    sse_comment_s: float = 15.0,
) -> AsyncIterator[Server]:
    engine = engine or FakeEngine()
    runner = create_runner(create_app(engine, config or ServerConfig(), sse_comment_s))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = bound_port(runner)
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(engine, f"http://127.0.0.1:{port}", port, runner, session)
    finally:
        await runner.cleanup()
    assert engine.num_open == 0, "a request outlived the server"
