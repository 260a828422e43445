"""The adapter API's routes, over the fake engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

COMPLETION = {"model": "tiny/base", "prompt": "hi", "max_tokens": 2}


@in_loop
async def test_models_and_adapters() -> None:
    async with serving() as server:
        loaded = await server.post("/v1/adapters", {"adapter_id": "org/x", "folder": "sql"})
        assert loaded.status == 201
        assert (loaded.json["adapter_id"], loaded.json["rank"]) == ("org/x", 8)
        cards = (await server.get("/v1/models")).json["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("tiny/base", None),
            ("org/x", "tiny/base"),
        ]
        assert (await server.get("/v1/adapters")).json["data"] == [loaded.json]
        again = await server.post("/v1/adapters", {"adapter_id": "org/x", "folder": "sql"})
        assert (again.status, again.json["error"]["code"]) == (409, "adapter_conflict")
        answer = await server.post("/v1/completions", COMPLETION | {"model": "org/x"})
        assert answer.json["model"] == "org/x"
        gone = await server.call("DELETE", "/v1/adapters/org/x")
        assert (gone.status, gone.text) == (204, "")
        missing = await server.call("DELETE", "/v1/adapters/org/x")
        assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")


@in_loop
async def test_an_adapter_in_use_needs_force() -> None:
    used = {"x": adapter_info("x", num_requests=3)}
    async with serving(FakeEngine(registered=used)) as server:
        refused = await server.call("DELETE", "/v1/adapters/x")
        assert refused.status == 409
        assert "3 requests" in refused.json["error"]["message"]
        assert (await server.call("DELETE", "/v1/adapters/x?force=maybe")).status == 400
        assert (await server.call("DELETE", "/v1/adapters/x?force=true")).status == 204


@pytest.mark.parametrize(
    "body",
    [
        {"adapter_id": "tiny/base", "folder": "x"},
        {"adapter_id": "../x", "folder": "x"},
        {"adapter_id": "x", "folder": "../x"},
        {"folder": "x"},
    ],
)
@in_loop
async def test_adapters_that_cannot_be_registered(body: dict[str, Any]) -> None:
    async with serving() as server:
        answer = await server.post("/v1/adapters", body)
        assert answer.status == (409 if body.get("adapter_id") == "tiny/base" else 400)
        assert not server.engine.registered


@in_loop
async def test_replace_prefetch_and_pin() -> None:
    async with serving() as server:
        body = {"adapter_id": "org/x", "folder": "sql"}
        await server.post("/v1/adapters", body)
        assert (await server.post("/v1/adapters", body | {"replace": True})).status == 201
        assert (await server.post("/v1/adapters", body | {"replace": "yes"})).status == 400
        fetched = await server.call("POST", "/v1/adapters/org/x/prefetch")
        assert (fetched.status, fetched.json["tier"]) == (200, "host")
        pinned = await server.call("POST", "/v1/adapters/org%2Fx/pin")
        assert (pinned.status, pinned.json["pinned"]) == (200, True)
        assert server.engine.registered["org/x"].pinned
        unpinned = await server.call("DELETE", "/v1/adapters/org/x/pin")
        assert (unpinned.status, unpinned.json["pinned"]) == (200, False)
        for method, path in (("POST", "prefetch"), ("POST", "pin"), ("DELETE", "pin")):
            missing = await server.call(method, f"/v1/adapters/none/{path}")
            assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")


@in_loop
async def test_vllms_routes() -> None:
    async with serving() as server:
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
        loaded = await server.post(load, body)
        assert loaded.status == 200
        assert loaded.text == "Success: LoRA adapter 'sql' added successfully."
        assert server.engine.registered["sql"].source == "/adapters/sql"
        assert (await server.post(load, body)).status == 409
        assert (await server.post(load, body | {"load_inplace": True})).status == 200
        gone = await server.post(unload, {"lora_name": "sql"})
        assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
        assert (await server.post(unload, {"lora_name": "sql"})).status == 404
        for wrong in ({"lora_name": "x"}, {"lora_path": "x"}, {"lora_name": 1, "lora_path": "x"}):
            assert (await server.post(load, wrong)).status == 400
