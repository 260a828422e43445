"""/v1/embeddings, /v1/models, /tokenize and /detokenize over HTTP."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from jlorax.config import ApiKey, Scope, ServerConfig
from jlorax.errors import Overloaded
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving
from tests.wire_calls import USER

BODY = {"model": "tiny/base", "input": ["hi", "abc"]}


@in_loop
async def test_a_vector_for_each_input() -> None:
    async with serving(FakeEngine(registered={"a": adapter_info("a")})) as server:
        answer = await server.post("/v1/embeddings", BODY | {"model": "a", "dimensions": 2})
        assert [item["embedding"] for item in answer.json["data"]] == [[3.0, 0.5], [4.0, 0.5]]
        assert answer.json["embeddings"] == answer.json["data"]
        assert answer.json["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert answer.headers["Content-Type"].startswith("application/json")
        asked = server.engine.embedded
        assert [(r.prompt, r.adapter_id, r.tenant) for r in asked] == [
            ("hi", "a", "default"),
            ("abc", "a", "default"),
        ]


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"input": []}, 400, "`input` cannot be empty"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"dimensions": 3}, 400, "is 3, but this model's embeddings have 2"),
    ],
)
@in_loop
async def test_what_is_wrong_is_said(changes: dict[str, Any], status: int, says: str) -> None:
    async with serving() as server:
        answer = await server.post("/v1/embeddings", BODY | changes)
        assert answer.status == status
        assert says in answer.json["error"]["message"]


@in_loop
async def test_the_keys_tenant_asks() -> None:
    key = hashlib.sha256(b"key").digest()
    config = ServerConfig(api_keys={key: ApiKey("a", frozenset({Scope.INFER}))})
    async with serving(config=config) as server:
        answer = await server.post("/v1/embeddings", BODY, headers={"x-api-key": "key"})
        assert answer.status == 200
        assert {asked.tenant for asked in server.engine.embedded} == {"a"}


@in_loop
async def test_a_full_engine_is_429() -> None:
    async with serving(FakeEngine(error=Overloaded("full"))) as server:
        assert (await server.post("/v1/embeddings", BODY)).status == 429


@in_loop
async def test_models() -> None:
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with serving(engine) as server:
        listed = (await server.get("/v1/models")).json["data"]
        assert [(card["id"], card["parent"], card["root"]) for card in listed] == [
            ("tiny/base", None, "tiny/base"),
            ("org/x", "tiny/base", "tiny/base"),
        ]
        assert {card["max_model_len"] for card in listed} == {256}
        for path in ("org/x", "org%2Fx"):
            assert (await server.get(f"/v1/models/{path}")).json["parent"] == "tiny/base"
        for path in ("tiny/base", "base"):
            assert (await server.get(f"/v1/models/{path}")).json["id"] == "tiny/base"
        missing = await server.get("/v1/models/other")
        assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
        assert (await server.get("/v1/models/a//b")).status == 400


@in_loop
async def test_another_tenants_adapter_is_unknown() -> None:
    engine = FakeEngine(registered={"x": adapter_info("x", tenant="b")})
    async with serving(engine, ServerConfig()) as server:
        assert (await server.get("/v1/models/x")).status == 404


@in_loop
async def test_tokenize_as_vllm_does() -> None:
    async with serving() as server:
        answer = (await server.post("/tokenize", {"prompt": "hi"})).json
        assert answer == {
            "count": 3,
            "max_model_len": 256,
            "tokens": [1, 104, 105],
            "token_strs": None,
        }
        plain = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
        answer = (await server.post("/tokenize", plain)).json
        assert (answer["tokens"], answer["token_strs"]) == ([104, 105], ["h", "i"])
        answer = (await server.post("/tokenize", {"messages": [USER]})).json
        assert answer["tokens"] == list(map(ord, "<user>hi"))
        assert (await server.post("/tokenize", {"prompt": 3})).status == 422


@in_loop
async def test_tokenize_as_lorax_does() -> None:
    async with serving() as server:
        answer = (await server.post("/tokenize", {"inputs": "hi"})).json
        assert answer[1] == {"id": 105, "text": "i", "start": 1, "stop": 2}


@in_loop
async def test_detokenize() -> None:
    async with serving() as server:
        answer = await server.post("/detokenize", {"model": "x", "tokens": [104, 105]})
        assert answer.json == {"prompt": "hi"}
        special = await server.post("/detokenize", {"tokens": [1, 104]})
        assert special.json == {"prompt": "\x01h"}
        assert (await server.post("/detokenize", {"tokens": [1000]})).status == 422
