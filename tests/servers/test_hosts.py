"""Whose pages and names a server on a loopback address answers, on a real socket."""

from __future__ import annotations

import pytest

from jlorax.config import ServerConfig
from servers.hosts import is_loopback
from tests.servers.serving import Server, in_loop, serving
from tests.servers.test_hostile import body_of, status_of

OURS = ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.9.8.7:1", "[::1]", "[::1]:8080"]
FOREIGN = [
    "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "",
    "10.0.0.1", "0.0.0.0", "[::2]:8080", "evil/health?", "localhost@evil.example", "localhost:x",
]  # fmt: skip


async def ask(server: Server, *headers: str, method: str = "GET", path: str = "/health") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *headers, "Content-Length: 0", "Connection: close"]
    return await server.raw("\r\n".join(lines).encode() + b"\r\n\r\n")


@in_loop
async def test_other_hosts_are_403_in_each_familys_shape() -> None:
    async with serving() as server:
        for host in FOREIGN:
            native = await ask(server, f"Host: {host}")
            assert status_of(native) == 403, host
            assert body_of(native)["error_type"] == "forbidden"
            v1 = await ask(server, f"Host: {host}", method="POST", path="/v1/completions")
            assert status_of(v1) == 403, host
            error = body_of(v1)["error"]
            assert isinstance(error, dict)
            assert error["code"] == "forbidden"
            assert host in error["message"]
        for host in OURS:
            assert status_of(await ask(server, f"Host: {host}")) == 200, host
        assert status_of(await server.raw(b"GET /health HTTP/1.0\r\n\r\n")) == 200


@in_loop
async def test_pages_of_other_origins_are_403() -> None:
    async with serving() as server:
        for origin in ["null", "file://", "localhost", *(f"http://{host}" for host in FOREIGN)]:
            for method, path in (("POST", "/generate"), ("DELETE", "/v1/adapters/x")):
                answer = await ask(
                    server, "Host: localhost", f"Origin: {origin}", method=method, path=path
                )
                assert status_of(answer) == 403, origin
        for origin in (f"{scheme}://{host}" for host in OURS for scheme in ("http", "https")):
            answer = await ask(server, "Host: localhost", f"Origin: {origin}")
            assert status_of(answer) == 200, origin
        assert server.engine.seen == []


@in_loop
async def test_a_server_that_listens_elsewhere_is_reached_by_any_name() -> None:
    async with serving(config=ServerConfig(host="0.0.0.0")) as server:
        answer = await ask(server, "Host: gpu7.example", "Origin: https://app.example")
        assert status_of(answer) == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
