"""A client that goes away, a reader that stands still, a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct

import pytest

from jlorax.config import ServerConfig
from jlorax.errors import ConfigError
from servers import rest, sse
from servers.rest import create_app, run_server
from tests.fakes import FakeEngine
from tests.servers.serving import Server, in_loop, serving

ROUTES = [
    ("/generate", {"inputs": "hi"}),
    ("/generate_stream", {"inputs": "hi"}),
    ("/v1/completions", {"model": "", "prompt": "hi"}),
    ("/v1/completions", {"model": "", "prompt": "hi", "stream": True}),
    ("/v1/completions", {"model": "", "prompt": ["a", "b"], "n": 2}),
    ("/v1/completions", {"model": "", "prompt": ["a", "b"], "n": 2, "stream": True}),
    (
        "/v1/chat/completions",
        {"model": "", "messages": [{"role": "user", "content": "x"}], "stream": True},
    ),
]


async def connect(server: Server, path: str, body: object) -> socket.socket:
    """A plain socket with the request on its way."""
    loop = asyncio.get_running_loop()
    sent = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\n\r\n"
    )
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", server.port))
    await loop.sock_sendall(sock, head.encode() + sent)
    return sock


def reset(sock: socket.socket) -> None:
    """Closes with RST, as a killed process does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def until_open(engine: FakeEngine, num: int) -> None:
    while engine.num_open < num:
        engine.opened.clear()
        await engine.opened.wait()


async def until_all_closed(engine: FakeEngine) -> None:
    while engine.num_open:
        engine.closed.clear()
        await engine.closed.wait()


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("hang_up", [reset, socket.socket.close])
@in_loop
async def test_a_disconnect_closes_the_generators(
    path: str, body: dict[str, object], num_tokens: int, hang_up: object
) -> None:
    """Waiting for the first token, or in the middle; killed, or closed politely."""
    assert callable(hang_up)
    gate = asyncio.Semaphore(0)
    engine = FakeEngine(gate=gate)
    async with serving(engine) as server:
        sock = await connect(server, path, body)
        prompts = body.get("prompt")
        await until_open(engine, 4 if isinstance(prompts, list) else 1)
        for _ in range(num_tokens):
            gate.release()
        hang_up(sock)
        async with asyncio.timeout(2.0):
            await until_all_closed(engine)
        assert (await server.get("/health")).status == 200


@pytest.mark.parametrize("num_chars", [1 << 24, 1 << 16, 1 << 10])
@in_loop
async def test_a_reader_that_stands_still_is_bounded_and_dropped(
    num_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never reads: the engine is not drained into memory, and its request ends."""
    monkeypatch.setattr(sse, "WRITE_DEADLINE_S", 0.2)
    engine = FakeEngine(script=["x" * num_chars] * (2**27 // num_chars))  # 134 MB, if buffered
    async with serving(engine) as server:
        sock = await connect(server, "/generate_stream", {"inputs": "hi"})
        await until_open(engine, 1)
        async with asyncio.timeout(5.0):
            await until_all_closed(engine)
        assert engine.num_events * num_chars < 2**25
        for _ in range(100):  # the loop's turns in which the connection is given back
            await asyncio.sleep(0)
        assert server.num_connections == 0
        sock.close()


@in_loop
async def test_sigterm_drains_and_then_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Semaphore(0)
    engine = FakeEngine(gate=gate)
    app = create_app(engine, ServerConfig())
    port = free_port()
    listening = asyncio.Event()
    monkeypatch.setattr(rest.log, "info", lambda *_: listening.set())
    running = asyncio.create_task(run_server(app, "127.0.0.1", port))
    await listening.wait()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 15\r\nConnection: close\r\n\r\n{"inputs":"hi"}'
    )
    await until_open(engine, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await engine.draining.wait()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    for _ in engine.script:
        gate.release()
    assert b"Hello, world" in await reader.read()
    await running
    writer.close()


@in_loop
async def test_a_drain_ends_at_its_deadline_and_cuts_off_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rest, "CLOSE_DEADLINE_S", 0.05)
    engine = FakeEngine(gate=asyncio.Semaphore(0))
    app = create_app(engine, ServerConfig(drain_s=0.05))
    port = free_port()
    running = asyncio.create_task(run_server(app, "127.0.0.1", port))
    reader, writer = await connected(port)
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 15\r\n\r\n{"inputs":"hi"}'
    )
    await until_open(engine, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert engine.num_open == 0
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@in_loop
async def test_a_second_signal_ends_the_drain_at_once(
    second: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the drain would outlast the test's own deadline."""
    engine = FakeEngine(gate=asyncio.Semaphore(0))
    app = create_app(engine, ServerConfig(drain_s=3600))
    port = free_port()
    running = asyncio.create_task(run_server(app, "127.0.0.1", port))
    reader, writer = await connected(port)
    writer.write(
        b"POST /generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 15\r\n\r\n{"inputs":"hi"}'
    )
    await until_open(engine, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await engine.draining.wait()
    assert engine.num_open == 1
    os.kill(os.getpid(), second)
    await running
    assert engine.num_open == 0
    assert "a second signal" in caplog.text
    await reader.read()
    writer.close()


@in_loop
async def test_a_port_in_use_is_a_config_error_with_the_port() -> None:
    async with serving() as server:
        app = create_app(FakeEngine(), ServerConfig())
        with pytest.raises(ConfigError, match=f"port {server.port} on 127.0.0.1 is in use"):
            await run_server(app, "127.0.0.1", server.port)


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.001)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
