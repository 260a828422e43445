"""Which web pages may use the server from a browser: none, until the owner names them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from jlorax.config import ApiKey, CorsConfig, Scope, ServerConfig
from jlorax.errors import ConfigError
from servers.settings import server_config
from tests.servers.serving import Server, in_loop, serving

APP = "https://app.example"
EVIL = "https://evil.example"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
ANSWERS = ("Access-Control-Allow-Origin", "Access-Control-Allow-Methods", "Vary")


def allowing(*origins: str, **more: Any) -> ServerConfig:
    cors = CorsConfig(origins, **more)
    return ServerConfig(cors=cors)


async def ask(server: Server, origin: str, path: str = "/generate", **headers: str) -> Any:
    return await server.post(path, {"inputs": "hi"}, headers={"Origin": origin, **headers})


async def preflight(server: Server, origin: str, path: str = "/generate") -> Any:
    return await server.call("OPTIONS", path, headers={"Origin": origin, **ASKS})


@in_loop
async def test_no_page_reaches_a_loopback_server_by_default() -> None:
    async with serving() as server:
        for answer in (await ask(server, APP), await preflight(server, APP)):
            assert answer.status in (403, 405)
            assert not set(ANSWERS) & set(answer.headers)
        assert server.engine.seen == []


@in_loop
async def test_no_page_reads_another_servers_answers_by_default() -> None:
    async with serving(config=ServerConfig(host="0.0.0.0")) as server:
        answer = await ask(server, APP)
        assert answer.status == 200
        assert not set(ANSWERS) & set(answer.headers)
        assert (await preflight(server, APP)).status == 405


@in_loop
async def test_a_page_that_is_named_may() -> None:
    async with serving(config=allowing(APP, exposed=("x-total-time",))) as server:
        asked = await preflight(server, APP)
        assert asked.status == 204
        assert asked.headers["Access-Control-Allow-Origin"] == APP
        assert asked.headers["Access-Control-Allow-Methods"] == "GET, POST"
        allowed = "content-type, authorization, x-api-key"
        assert asked.headers["Access-Control-Allow-Headers"] == allowed
        assert asked.headers["Vary"] == "Origin"
        for path in ("/generate", "/generate_stream", "/nowhere"):
            answer = await ask(server, APP, path)
            assert answer.status == (404 if path == "/nowhere" else 200)
            assert answer.headers["Access-Control-Allow-Origin"] == APP
            assert answer.headers["Access-Control-Expose-Headers"] == "x-total-time"
            assert "Access-Control-Allow-Credentials" not in answer.headers
        assert len(server.engine.seen) == 2


@in_loop
async def test_other_pages_still_may_not() -> None:
    async with serving(config=allowing(APP)) as server:
        for origin in (EVIL, "null", APP + ":8443", "http://app.example"):
            answer = await ask(server, origin)
            assert answer.status == 403, origin
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert answer.headers["Vary"] == "Origin"
            assert "Access-Control-Allow-Methods" not in (await preflight(server, origin)).headers
        rebound = await ask(server, APP, Host="evil.example")
        assert rebound.status == 403
        assert server.engine.seen == []


@in_loop
async def test_every_page_may_when_the_owner_says_so() -> None:
    async with serving(config=allowing("*")) as server:
        assert (await preflight(server, EVIL)).headers["Access-Control-Allow-Origin"] == "*"
        assert (await ask(server, EVIL)).headers["Access-Control-Allow-Origin"] == "*"
        plain = await server.post("/generate", {"inputs": "hi"})
        assert "Access-Control-Allow-Origin" not in plain.headers


@in_loop
async def test_a_preflight_needs_no_key_and_the_request_does() -> None:
    digest = hashlib.sha256(b"key").digest()
    config = ServerConfig(
        api_keys={digest: ApiKey("a", frozenset(Scope))},
        cors=CorsConfig((APP,), allow_credentials=True),
    )
    async with serving(config=config) as server:
        assert (await preflight(server, APP)).status == 204
        refused = await ask(server, APP)
        assert refused.status == 401
        assert refused.headers["Access-Control-Allow-Origin"] == APP
        assert refused.headers["Access-Control-Allow-Credentials"] == "true"
        assert (await ask(server, APP, Authorization="Bearer key")).status == 200
        assert (await preflight(server, EVIL)).status == 401  # tells nothing of routes


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cors_allow_origin": ("app.example",)}, "'app.example' is not like https://"),
        ({"cors_allow_origin": ("https://a.example/path",)}, "/path"),
        ({"cors_allow_origin": ("*",), "cors_allow_credentials": True}, "not for"),
        ({"cors_allow_origin": (APP,), "cors_allow_header": ("a b",)}, "'a b' is no name"),
        ({"cors_allow_header": ("x-a",)}, "without cors_allow_origin"),
        ({"max_best_of": 0}, "max_best_of is 0; allowed are 1 to 64"),
        ({"max_best_of": 65}, "max_best_of is 65"),
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
        server_config(values)


def test_settings_reach_the_server() -> None:
    config = server_config(
        {
            "cors_allow_origin": (APP, "*"),
            "cors_allow_header": ("x-a",),
            "cors_allow_method": ("PUT",),
            "cors_expose_header": ("x-b",),
            "max_best_of": 4,
        }
    )
    assert config.cors == CorsConfig((APP, "*"), ("x-a",), ("PUT",), ("x-b",))
    assert config.max_best_of == 4
    assert server_config({}).cors == CorsConfig()
