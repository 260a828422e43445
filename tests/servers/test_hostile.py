"""Raw bytes on a real socket: what a broken or hostile client sends, and what it gets."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from jlorax.config import ServerConfig
from servers import serving as shared
from tests.servers.serving import Server, in_loop, serving

SMALL = ServerConfig(max_body_bytes=4096)
GOOD = b'{"inputs":"hi"}'


def post(
    path: str, body: bytes, kind: str = "application/json", headers: tuple[str, ...] = ()
) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    assert answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), answer[:80]
    return int(answer[9:12])


def body_of(answer: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    return found


async def still_serves(server: Server) -> None:
    assert status_of(await server.raw(post("/generate", GOOD))) == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"[" * 3000,
        b'{"inputs":"\xff"}',
        rb'{"inputs":"\ud800"}',
        b'{"inputs":"a","inputs":"b"}',
        b'{"inputs":"a","parameters":{"temperature":NaN}}',
    ],
)
@in_loop
async def test_malformed_json_is_400_in_each_familys_shape(body: bytes) -> None:
    async with serving(config=SMALL) as server:
        for path in ("/", "/generate", "/generate_stream", "/tokenize"):
            answer = await server.raw(post(path, body))
            assert status_of(answer) == 400
            assert body_of(answer)["error_type"] == "bad_request"
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/adapters"):
            answer = await server.raw(post(path, body))
            assert status_of(answer) == 400
            error = body_of(answer)["error"]
            assert isinstance(error, dict)
            assert error["code"] == "malformed_json"
        await still_serves(server)
        assert len(server.engine.seen) == 1


@in_loop
async def test_too_large_is_413_before_and_while_reading() -> None:
    async with serving(config=SMALL) as server:
        for path in ("/generate", "/v1/completions"):
            declared = post(path, b"").replace(b"Content-Length: 0", b"Content-Length: 5242880")
            assert status_of(await server.raw(declared)) == 413  # not a byte of it was sent
            head = post(path, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            chunk = b"800\r\n" + b"x" * 0x800 + b"\r\n"
            answer = await server.raw(head + chunk * 4)
            assert status_of(answer) == 413
            assert "4096" in str(body_of(answer)["error"])
        await still_serves(server)


@in_loop
async def test_other_types_and_encodings_are_415() -> None:
    async with serving() as server:
        bomb = gzip.compress(b"[" * 1_000_000)
        for path in ("/generate", "/v1/completions"):
            for kind in ("text/plain", "application/x-www-form-urlencoded", "", "nonsense"):
                answer = await server.raw(post(path, GOOD, kind))
                assert status_of(answer) == 415
            latin = "application/json; charset=latin-1"
            assert status_of(await server.raw(post(path, GOOD, latin))) == 415
            zipped = post(path, bomb, headers=("Content-Encoding: gzip",))
            assert status_of(await server.raw(zipped)) == 415
        utf8 = "application/json; charset=UTF-8"
        assert status_of(await server.raw(post("/generate", GOOD, utf8))) == 200


@in_loop
async def test_wrong_methods_and_unknown_paths() -> None:
    async with serving() as server:
        for path, family in (("/generate", str), ("/v1/completions", dict)):
            for method in ("GET", "PUT", "TRACE", "DELETE"):
                head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                answer = await server.raw(head.encode())
                assert status_of(answer) == 405
                assert b"Allow: POST" in answer
                assert isinstance(body_of(answer)["error"], family)
        for path in ("//v1/models", "/v1/../v1/models", "/v1/%2e%2e/x", "/V1/models", "/nope"):
            answer = await server.raw(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            assert status_of(answer) == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 9216 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -3\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: y\r\nConnection: close\r\n\r\n",
    ],
)
@in_loop
async def test_broken_http_is_refused_and_the_connection_closed(sent: bytes) -> None:
    async with serving() as server:
        assert status_of(await server.raw(sent)) in (400, 431)
        await still_serves(server)


@in_loop
async def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "BODY_DEADLINE_S", 0.05)
    async with serving() as server:
        stalled = post("/generate", GOOD)[:-3]
        assert status_of(await server.raw(stalled)) == 408


@in_loop
async def test_impossible_adapter_ids_never_reach_the_engine() -> None:
    async with serving() as server:
        for name in ("../../etc/passwd", "/etc/passwd", "a\u202eb", "a" * 10_000, "a%2f..%2fb"):
            native = {"inputs": "hi", "parameters": {"adapter_id": name}}
            assert (await server.post("/generate", native)).status == 422
            assert (
                await server.post("/v1/completions", {"model": name, "prompt": "hi"})
            ).status == 400
        for name in ("..%2F..%2Fetc", "%00", "a%0Ab"):
            head = f"DELETE /v1/adapters/{name} HTTP/1.1\r\nHost: localhost\r\n"
            answer = await server.raw(f"{head}Connection: close\r\n\r\n".encode())
            assert status_of(answer) in (400, 404)
        assert server.engine.seen == []


@in_loop
async def test_the_log_has_one_line_a_request_and_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as server:
        await server.post("/generate", {"inputs": "sesame opens"})
        await server.post(
            "/v1/completions", {"model": "sesame", "prompt": "sesame", "stream": True}
        )
        await server.get("/sesame")
        await server.raw(post("/generate", b'{"inputs": "sesame'))
        # A body longer than it says: its rest is read as the next request's first line.
        await server.raw(post("/nope", b"").replace(b"close", b"keep-alive") + b"sesame opens")
        await server.raw(b"sesame opens\r\n\r\n")
    lines = [r.getMessage() for r in caplog.records if r.name == "jlorax.http"]
    assert len(lines) == 4
    assert lines[0].startswith("POST /generate 200 ")
    assert lines[0].endswith("ms adapter=- prompt_tokens=13 generated_tokens=4")
    assert " 404 " in lines[1]
    assert lines[2].startswith("GET (no route) 404 ")
    assert "Hello" not in caplog.text
    assert "opens" not in caplog.text
    assert caplog.text.count("sesame") == 1  # the adapter's id, which is no secret
