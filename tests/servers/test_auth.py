"""Who is let in, to what, and whose adapters they see."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jlorax
from jlorax.config import ApiKey, Scope, ServerConfig
from jlorax.errors import AdapterNotFound, ConfigError, Forbidden, Unauthorized
from servers import native
from servers.auth import NEEDS
from servers.keys import read_keys
from servers.rest import create_app
from servers.settings import server_config
from tests.fakes import FakeEngine, adapter_info
from tests.servers.process import ServerProcess, start_server, write_adapter, write_model
from tests.servers.serving import Answer, Server, in_loop, serving
from tests.servers.test_hostile import status_of

A, B, A_ASKS, A_RUNS = "key-of-a", "key-of-b", "a-infer", "a-admin"
BOTH = frozenset(Scope)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


KEYS = {
    digest(A): ApiKey("a", BOTH),
    digest(B): ApiKey("b", BOTH),
    digest(A_ASKS): ApiKey("a", frozenset({Scope.INFER})),
    digest(A_RUNS): ApiKey("a", frozenset({Scope.ADMIN})),
}
LOCKED = ServerConfig(api_keys=KEYS)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- the file


def key_line(key: str, rest: str) -> str:
    return f"{digest(key).hex()} {rest}"


def key_file(folder: Path, *lines: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text("\n".join(lines))
    file.chmod(mode)
    return file


def test_a_line_is_a_hash_a_tenant_and_scopes(tmp_path: Path) -> None:
    lines = [
        "# who may ask",
        "",
        key_line("k1", "team-a infer"),
        digest("k2").hex().upper() + "\tdefault  admin,infer  # the operator\r",
    ]
    assert read_keys(key_file(tmp_path, *lines)) == {
        digest("k1"): ApiKey("team-a", frozenset({Scope.INFER})),
        digest("k2"): ApiKey("default", BOTH),
    }


@pytest.mark.parametrize(
    "line",
    [
        "secret a infer",
        key_line("k", "a"),
        key_line("k", "a secret"),
        key_line("k", "a infer,secret"),
        key_line("k", "a infer secret"),
        key_line("k", "a infer,"),
        key_line("k", "../secret infer"),
        key_line("k", f"{'secret' * 11} infer"),
        digest("k").hex()[:-1] + " secret infer",
        "0" + digest("k").hex() + " secret infer",
        key_line("", "a infer"),
    ],
)
def test_a_malformed_line_is_named_by_its_number_and_not_quoted(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="line 3") as caught:
        read_keys(key_file(tmp_path, "# keys", key_line("good", "a infer"), line))
    assert "secret" not in str(caught.value)


def test_a_key_may_stand_there_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3.*line 1"):
        read_keys(key_file(tmp_path, key_line("k", "a infer"), "#", key_line("k", "b admin")))


def test_a_file_without_keys_or_that_cannot_be_read_locks_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key"):
        read_keys(key_file(tmp_path, "# nobody yet", ""))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("none", ".", "bytes"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_keys(tmp_path / name)


def test_a_file_that_everybody_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = key_line("k", "a infer")
    read_keys(key_file(tmp_path, line, mode=0o640))
    assert not caplog.records
    read_keys(key_file(tmp_path, line, mode=0o644))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "keys" in record.getMessage()


def test_the_setting_reads_the_file_at_the_start(tmp_path: Path) -> None:
    assert server_config({}).api_keys is None
    file = key_file(tmp_path, key_line("k", "a infer"))
    assert server_config({"api_keys": file}).api_keys == read_keys(file)
    with pytest.raises(ConfigError, match="no key"):
        server_config({"api_keys": key_file(tmp_path, "")})


# ---- who is let in

GENERATE = {"inputs": "hi"}
COMPLETION = {"model": "tiny/base", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "tiny/base", "messages": [{"role": "user", "content": "hi"}]}
LOAD, LOAD_LORA = {"adapter_id": "n", "folder": "n"}, {"lora_name": "m", "lora_path": "m"}
ANYBODY, ASKS, RUNS, KEY = "anybody", "infer", "admin", "any key"

# method, path, body, who may, the answer to who may; in this order, so that what is loaded is there
ROUTES = [
    ("POST", "/", GENERATE, ASKS, 200),
    ("POST", "/invocations", GENERATE, ASKS, 200),
    ("POST", "/generate", GENERATE, ASKS, 200),
    ("POST", "/generate_stream", GENERATE, ASKS, 200),
    ("POST", "/tokenize", GENERATE, ASKS, 200),
    ("POST", "/v1/completions", COMPLETION, ASKS, 200),
    ("POST", "/detokenize", {"tokens": [104]}, ASKS, 200),
    ("POST", "/v1/chat/completions", CHAT, ASKS, 200),
    ("POST", "/v1/responses", {"model": "tiny/base", "input": "hi"}, ASKS, 200),
    ("POST", "/v1/embeddings", {"model": "tiny/base", "input": "hi"}, ASKS, 200),
    ("POST", "/embed", GENERATE, ASKS, 200),
    ("POST", "/classify", GENERATE, ASKS, 424),
    ("POST", "/classify_batch", {"inputs": ["hi"]}, ASKS, 424),
    ("GET", "/info", None, ASKS, 200),
    ("GET", "/v1/models", None, ASKS, 200),
    ("GET", "/v1/models/base", None, ASKS, 200),
    ("GET", "/v1/adapters", None, ASKS, 200),
    ("POST", "/v1/adapters", LOAD, RUNS, 201),
    ("POST", "/v1/adapters/n/prefetch", None, RUNS, 200),
    ("POST", "/v1/adapters/n/pin", None, RUNS, 200),
    ("DELETE", "/v1/adapters/n/pin", None, RUNS, 200),
    ("DELETE", "/v1/adapters/n", None, RUNS, 204),
    ("POST", "/v1/load_lora_adapter", LOAD_LORA, RUNS, 200),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "m"}, RUNS, 200),
    ("POST", "/v1/files", None, RUNS, 409),
    ("GET", "/v1/files", None, RUNS, 409),
    ("GET", "/v1/files/f", None, RUNS, 409),
    ("DELETE", "/v1/files/f", None, RUNS, 409),
    ("GET", "/v1/files/f/content", None, RUNS, 409),
    ("POST", "/v1/fine_tuning/jobs", {"model": "", "training_file": "f"}, RUNS, 409),
    ("GET", "/v1/fine_tuning/jobs", None, RUNS, 409),
    ("GET", "/v1/fine_tuning/jobs/j", None, RUNS, 409),
    ("POST", "/v1/fine_tuning/jobs/j/cancel", None, RUNS, 409),
    ("GET", "/v1/fine_tuning/jobs/j/events", None, RUNS, 409),
    ("GET", "/metrics", None, KEY, 200),
    ("GET", "/startup", None, KEY, 200),
    ("GET", "/openapi.json", None, KEY, 200),
    ("GET", "/api-doc/openapi.json", None, KEY, 200),
    ("GET", "/docs", None, ANYBODY, 200),
    ("GET", "/", None, ANYBODY, 200),
    ("GET", "/ping", None, ANYBODY, 200),
    ("GET", "/health", None, ANYBODY, 200),
]
CLOSED = [route for route in ROUTES if route[3] != ANYBODY]


def error_of(answer: Answer, path: str) -> tuple[str, str]:
    """(code, message), from the shape of the path's family."""
    if path.startswith("/v1"):
        return answer.json["error"]["code"], answer.json["error"]["message"]
    return answer.json["code"], answer.json["error"]


def test_every_route_is_in_the_table_and_tested_below() -> None:
    router = create_app(FakeEngine(), ServerConfig()).router
    assert {route.handler for route in router.routes()} == set(NEEDS)
    names = {"adapter_id": "n", "model_id": "base", "file_id": "f", "job_id": "j"}
    served = {
        (
            route.method,
            re.sub(r"{(\w+)}", lambda match: names[match[1]], route.resource.canonical),
        )
        for route in router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert served == {(method, path) for method, path, *_ in ROUTES}


@in_loop
async def test_a_key_does_what_its_scopes_say_and_nothing_else() -> None:
    async with serving(config=LOCKED) as server:
        for method, path, body, needed, status in ROUTES:
            for key, scope in ((A_ASKS, ASKS), (A_RUNS, RUNS)):
                if needed not in (scope, ANYBODY, KEY):
                    refused = await server.call(method, path, json=body, headers=bearer(key))
                    assert refused.status == 403, (path, key)
                    code, message = error_of(refused, path)
                    assert (code, needed in message) == ("forbidden", True)
                    continue
                allowed = await server.call(method, path, json=body, headers=bearer(key))
                assert allowed.status == status, (path, key)


@in_loop
async def test_strangers_are_401_and_reach_nothing() -> None:
    async with serving(config=LOCKED) as server:
        strangers: list[dict[str, str]] = [
            {},
            bearer("wrong"),
            bearer(""),
            bearer(A[:-1]),
            bearer(A.upper()),
            bearer(digest(A).hex()),
            {"Authorization": A},
            {"Authorization": f"Basic {A}"},
            {"x-api-key": "wrong"},
            {"Cookie": f"x-api-key={A}"},
        ]
        for method, path, body, *_ in CLOSED:
            for headers in strangers:
                answer = await server.call(method, path, json=body, headers=headers)
                assert answer.status == 401, (path, headers)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                code, message = error_of(answer, path)
                assert (code, A in message) == ("invalid_api_key", False)
            for query in (f"?api_key={A}", f"?key={A}", f"?x-api-key={A}", f"?Authorization={A}"):
                assert (await server.call(method, path + query, json=body)).status == 401
        assert not server.engine.seen
        assert not server.engine.registered


@pytest.mark.parametrize(
    "headers",
    [
        bearer(A),
        {"authorization": f"bearer  {A}"},
        {"X-API-Key": A},
        {"Authorization": "Basic proxy", "x-api-key": A},
    ],
)
@in_loop
async def test_a_key_comes_in_either_header(headers: dict[str, str]) -> None:
    async with serving(config=LOCKED) as server:
        assert (await server.post("/generate", GENERATE, headers=headers)).status == 200


def raw(method: str, target: str, *headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *headers, "Content-Length: 0", "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


BENT = [
    "//v1/chat/completions", "/v1/../v1/models", "/v1/%2e%2e/v1/models", "/V1/models", "/nope",
    "/health/", "/health/../v1/models", "/health%2f..%2fv1/models", "/v1/models;/health",
    "/generate/health", "//health",
]  # fmt: skip


@in_loop
async def test_what_is_no_route_is_told_to_keys_alone() -> None:
    async with serving(config=LOCKED) as server:
        for target in BENT:
            for method in ("GET", "POST"):
                stranger = await server.raw(raw(method, target, "Host: localhost"))
                assert status_of(stranger) == 401, target
                known = raw(method, target, "Host: localhost", f"x-api-key: {A_ASKS}")
                assert status_of(await server.raw(known)) == 404, target
        stranger = await server.raw(raw("GET", "/generate", "Host: localhost"))
        assert status_of(stranger) == 401
        assert b"Allow" not in stranger
        known = raw("GET", "/generate", "Host: localhost", f"x-api-key: {A_RUNS}")
        assert status_of(await server.raw(known)) == 405
        assert not server.engine.seen


@in_loop
async def test_a_route_that_the_table_lacks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(NEEDS, native.info)
    async with serving(config=LOCKED) as server:
        for headers in ({}, bearer(A)):
            assert (await server.get("/info", headers=headers)).status == 424


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@in_loop
async def test_a_bent_host_opens_no_route(host: str) -> None:
    config = ServerConfig(host=host, api_keys=KEYS)
    async with serving(config=config) as server:
        for bent in ("Host: evil/health?", "Host: localhost/health?", "Host: localhost/health#"):
            for target in ("/v1/models", "/metrics", "http://evil/v1/models"):
                answer = await server.raw(raw("GET", target, bent))
                assert status_of(answer) == 401, (bent, target)


@in_loop
async def test_a_key_does_not_open_a_loopback_server_to_other_pages() -> None:
    async with serving(config=LOCKED) as server:
        key = f"x-api-key: {A}"
        for foreign in ("Host: attacker.example", "Host: localhost\r\nOrigin: http://evil"):
            answer = await server.raw(raw("DELETE", "/v1/adapters/x", foreign, key))
            assert status_of(answer) == 403
            assert status_of(await server.raw(raw("GET", "/health", foreign))) == 403


@in_loop
async def test_keys_are_in_no_log_and_a_refusal_is_one_plain_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(config=LOCKED) as server:
        for headers in (bearer(A), {"x-api-key": A}, bearer(A_ASKS)):
            await server.post("/v1/adapters", {"adapter_id": "x"}, headers=headers)
        await server.get(f"/v1/models?api_key={A}")
        caplog.clear()
        wrong = await server.get("/v1/models", headers=bearer("wrong-key"))
        lines = [r for r in caplog.records if r.name.startswith("jlorax")]
        assert [line.levelno for line in lines] == [logging.INFO]
        assert "wrong-key" not in caplog.text + wrong.text
        assert A not in caplog.text


@in_loop
async def test_without_keys_everybody_is_the_default_tenant() -> None:
    async with serving() as server:
        for method, path, body, _, status in ROUTES:
            assert (await server.call(method, path, json=body)).status == status, path
            assert (await server.post("/generate", GENERATE, headers=bearer("any"))).status == 200
        assert {request.tenant for request in server.engine.seen} == {"default"}


# ---- whose adapters


def of_tenants() -> FakeEngine:
    infos = [adapter_info("mine", tenant="a"), adapter_info("all"), adapter_info("other")]
    return FakeEngine(registered={info.adapter_id: info for info in infos})


async def asked_of(server: Server, adapter_id: str, key: str) -> list[Answer]:
    """Every way to name an adapter."""
    bodies = [
        *((path, {"inputs": "hi", "parameters": {"adapter_id": adapter_id}})
          for path in ("/", "/invocations", "/generate", "/generate_stream")),
        *(("/v1/completions", COMPLETION | {"model": adapter_id, "stream": stream, "n": n})
          for stream in (False, True) for n in (1, 2)),
        *(("/v1/chat/completions", CHAT | {"model": adapter_id, "stream": stream})
          for stream in (False, True)),
        (f"/v1/adapters/{adapter_id}/prefetch", None),
        (f"/v1/adapters/{adapter_id}/pin", None),
    ]  # fmt: skip
    asked = [await server.post(path, body, headers=bearer(key)) for path, body in bodies]
    for path in (f"/v1/adapters/{adapter_id}/pin", f"/v1/adapters/{adapter_id}"):
        asked.append(await server.call("DELETE", path, headers=bearer(key)))
    lora = {"lora_name": adapter_id}
    asked.append(await server.post("/v1/unload_lora_adapter", lora, headers=bearer(key)))
    return asked


@in_loop
async def test_anothers_adapter_is_as_unknown_as_any() -> None:
    async with serving(of_tenants(), LOCKED) as server:
        theirs, unknown = await asked_of(server, "mine", B), await asked_of(server, "nope", B)
        for one, other in zip(theirs, unknown, strict=True):
            assert one.status == other.status == 404
            assert one.text.replace("mine", "nope") == other.text
            assert one.headers.keys() == other.headers.keys()
        assert "mine" in server.engine.registered
        (*own, unloaded_again) = await asked_of(server, "mine", A)
        assert {answer.status for answer in own} == {200, 204}
        assert unloaded_again.status == 404
        assert {request.tenant for request in server.engine.seen} == {"a", "b"}


@in_loop
async def test_lists_show_ones_own_and_those_of_all() -> None:
    async with serving(of_tenants(), LOCKED) as server:
        for key, seen in ((A, ["mine", "all", "other"]), (B, ["all", "other"])):
            models = (await server.get("/v1/models", headers=bearer(key))).json["data"]
            assert [card["id"] for card in models] == ["tiny/base", *seen]
            listed = (await server.get("/v1/adapters", headers=bearer(key))).json["data"]
            assert [adapter["adapter_id"] for adapter in listed] == seen


@in_loop
async def test_what_one_loads_is_ones_own() -> None:
    async with serving(config=LOCKED) as server:
        await server.post("/v1/adapters", LOAD, headers=bearer(A))
        await server.post("/v1/load_lora_adapter", LOAD_LORA, headers=bearer(B))
        owners = {name: info.tenant for name, info in server.engine.registered.items()}
        assert owners == {"n": "a", "m": "b"}


# ---- the clients


@in_loop
async def test_the_client_brings_its_key_and_has_errors_of_its_own() -> None:
    async with serving(config=LOCKED) as server:
        async with jlorax.AsyncClient(server.url, api_key=A) as client:
            assert (await client.generate("hi")).text == "Hello, world"
            assert [event.index async for event in client.stream("hi")] == [0, 1, 2, 3]
        async with jlorax.AsyncClient(server.url, api_key=A_ASKS) as client:
            with pytest.raises(Forbidden, match="admin"):
                await client.load_adapter("x", "x")
        for key in (None, "wrong"):
            async with jlorax.AsyncClient(server.url, api_key=key) as client:
                assert await client.health()
                with pytest.raises(Unauthorized, match="API key"):
                    await client.generate("hi")
                with pytest.raises(Unauthorized):
                    await anext(client.stream("hi"))


# ---- the whole product


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("tenants")
    write_model(home / "model")
    write_adapter(home / "root" / "shared", 1)
    lines = (key_line(A, "a infer,admin"), key_line(B, "b infer,admin"))
    server = start_server(
        home,
        *("--model", str(home / "model"), "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "root"), "--api-keys", str(key_file(home, *lines))),
        *("--max-slots", "2", "--max-batch", "1", "--max-seq-len", "64", "--buckets", "1"),
        *("--adapter-bank-bytes", "8MiB"),
    )
    yield server
    server.process.kill()


def test_a_process_keeps_tenants_apart(server: ServerProcess) -> None:
    url = server.url
    with jlorax.Client(url, api_key=A) as a, jlorax.Client(url, api_key=B) as b:
        assert a.load_adapter("mine", "shared").tenant == "a"
        expected = a.generate("Hello", adapter_id="shared", max_new_tokens=8).text
        assert a.generate("Hello", adapter_id="mine", max_new_tokens=8).text == expected
        assert b.generate("Hello", adapter_id="shared", max_new_tokens=8).text == expected
        a.pin_adapter("mine")
        for ask in (
            lambda name: b.generate("Hello", adapter_id=name),
            lambda name: list(b.stream("Hello", adapter_id=name)),
            lambda name: b.prefetch_adapter(name),
            lambda name: b.pin_adapter(name),
            lambda name: b.pin_adapter(name, False),
            lambda name: b.unload_adapter(name, force=True),
        ):
            theirs, unknown = (failed(ask, name) for name in ("mine", "nope"))
            assert theirs.replace("mine", "nope") == unknown
        (status, text), nobodys = (completion(url, B, name) for name in ("mine", "nope"))
        assert (status, text.replace("mine", "nope")) == (404, nobodys[1])
        assert nobodys[0] == 404
        assert "mine" not in {card.id for card in b.models()}
        assert "mine" not in {info.adapter_id for info in b.adapters()}
        assert completion(url, A, "mine")[0] == 200
        assert {info.adapter_id: info.pinned for info in a.adapters()}["mine"]
        assert b.load_adapter("mine", "shared").tenant == "b"
        a.unload_adapter("mine")
        failed(lambda name: a.prefetch_adapter(name), "mine")
        assert b.generate("Hello", adapter_id="mine", max_new_tokens=8).text == expected
    assert not any(key in server.log.read_text() for key in (A, B))


def failed(ask: Any, name: str) -> str:
    with pytest.raises(AdapterNotFound) as caught:
        ask(name)
    return repr(caught.value)


def completion(url: str, key: str, model: str) -> tuple[int, str]:
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json", **bearer(key)}
    try:
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
