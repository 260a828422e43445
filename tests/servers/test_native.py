"""LoRAX's routes, as its clients read them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jlorax.errors import (
    AdapterInvalid,
    InvalidRequest,
    JLoraxError,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from tests.fakes import FakeEngine, FakeTokenizer, adapter_info
from tests.servers.serving import in_loop, serving

TOKEN = {"id": 100, "text": "Hello", "logprob": -0.25, "special": False, "skipped": False}


@in_loop
async def test_generate_gives_an_object_and_the_root_a_list() -> None:
    async with serving() as server:
        body = {"inputs": "hi", "parameters": {"details": True}}
        whole = await server.post("/generate", body)
        assert whole.status == 200
        assert whole.json["generated_text"] == "Hello, world"
        details = whole.json["details"]
        assert details["tokens"][0] == TOKEN
        assert {name: details[name] for name in details if name != "tokens"} == {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 4,
            "skipped_tokens": 0,
            "seed": None,
            "prefill": [],
        }
        for path in ("/", "/invocations"):
            assert (await server.post(path, body)).json == [whole.json]
        short = await server.post("/generate", {"inputs": "hi", "stream": True})
        assert short.json == {"generated_text": "Hello, world"}


@in_loop
async def test_prefill_alternatives_and_full_text() -> None:
    async with serving() as server:
        parameters = {
            "decoder_input_details": True,
            "return_k_alternatives": 2,
            "return_full_text": True,
        }
        answer = (await server.post("/generate", {"inputs": "hi", "parameters": parameters})).json
        assert answer["generated_text"] == "hiHello, world"
        assert answer["details"]["prefill"][:2] == [
            {"id": 1, "text": "\x01", "logprob": None},
            {"id": 104, "text": "h", "logprob": -0.5},
        ]
        alternatives = answer["details"]["tokens"][0]["alternative_tokens"]
        assert alternatives[1] == {"id": 201, "text": chr(201), "logprob": -2.0}


@in_loop
async def test_the_stream_has_all_keys_in_every_event_and_no_done() -> None:
    async with serving() as server:
        body = {"inputs": "hi", "parameters": {"details": True}}
        for path, sent in (("/generate_stream", body), ("/", body | {"stream": True})):
            answer = await server.post(path, sent)
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert answer.headers["X-Accel-Buffering"] == "no"
            events = answer.events
            assert events[0] == {"token": TOKEN, "generated_text": None, "details": None}
            assert [event["token"]["text"] for event in events] == ["Hello", ",", " ", "world"]
            assert events[-1]["generated_text"] == "Hello, world"
            assert events[-1]["details"]["generated_tokens"] == 4
            assert "[DONE]" not in answer.text
        plain = await server.post("/generate_stream", {"inputs": "hi"})
        assert plain.events[-1]["details"] is None


@in_loop
async def test_headers() -> None:
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with serving(engine) as server:
        body = {"inputs": "hi", "parameters": {"adapter_id": "org/x"}}
        headers = (await server.post("/generate", body)).headers
        want = {
            "x-compute-type": "cpu+optimized",
            "x-compute-characters": "2",
            "x-prompt-tokens": "3",
            "x-generated-tokens": "4",
            "x-skipped-tokens": "0",
            "x-total-tokens": "7",
            "x-total-time": "1500",
            "x-queue-time": "250",
            "x-inference-time": "1250",
            "x-time-to-first-token": "500",
            "x-time-per-output-token": "333",
            "x-model-id": "tiny/base",
            "x-adapter-id": "org/x",
            "x-adapter-source": "local",
        }
        assert {name: headers.get(name) for name in want} == want
        streamed = (await server.post("/generate_stream", body)).headers
        assert streamed["x-adapter-id"] == "org/x"
        assert "x-total-time" not in streamed
        assert "x-adapter-id" not in (await server.post("/generate", {"inputs": "hi"})).headers


@in_loop
async def test_info_health_metrics_tokenize() -> None:
    async with serving() as server:
        info = (await server.get("/info")).json
        assert (info["model_id"], info["max_total_tokens"]) == ("tiny/base", 256)
        for path in ("/health", "/", "/ping"):
            answer = await server.get(path)
            assert (answer.status, answer.text) == (200, "")
        assert "jlorax_up 1" in (await server.get("/metrics")).text
        tokens = (await server.post("/tokenize", {"inputs": "ab"})).json
        assert tokens[1] == {"id": 98, "text": "b", "start": 1, "stop": 2}
        assert (await server.post("/tokenize", {"inputs": 3})).status == 422
        server.engine.state = "dead"
        sick = await server.get("/health")
        assert sick.status == 503
        assert sick.json == {"error": "unhealthy", "error_type": "healthcheck"}


@in_loop
async def test_messages_and_token_ids_as_inputs() -> None:
    async with serving() as server:
        await server.post("/generate", {"inputs": [5, 6]})
        await server.post("/generate", {"inputs": [{"role": "user", "content": "a"}]})
        chat = {"inputs": "a", "parameters": {"apply_chat_template": True}}
        await server.post("/generate", chat)
        ids, messages, templated = server.engine.seen
        assert ids.prompt == (5, 6)
        assert not ids.add_special_tokens
        assert templated == messages
        assert messages.prompt == tuple(map(ord, "<user>a"))


NOT_THERE = "no adapter is named 'nope'"


@pytest.mark.parametrize(
    ("error", "status", "error_type", "says"),
    [
        (PromptTooLong(300, 5, 256), 422, "validation", "Input validation error: the prompt has"),
        (InvalidRequest("no template"), 422, "validation", "no template"),
        (AdapterInvalid("x", "f.json", "r is 0"), 422, "adapter_invalid", "f.json: r is 0"),
        (Overloaded("the queue is full: 256", 1.2), 429, "overloaded", "256"),
        (Unavailable("draining", 3.0), 503, "unavailable", "draining"),
        (JLoraxError("x"), 424, "generation", "Request failed during generation: x"),
        (ValueError("secret prompt"), 424, "generation", "internal error"),
    ],
)
@in_loop
async def test_engine_errors_before_the_first_token(
    error: Exception, status: int, error_type: str, says: str
) -> None:
    async with serving(FakeEngine(error=error)) as server:
        for path in ("/", "/generate", "/generate_stream"):
            answer = await server.post(path, {"inputs": "hi"})
            assert (answer.status, answer.json["error_type"]) == (status, error_type)
            assert says in answer.json["error"]
            assert "secret" not in answer.text
            if status in (429, 503):
                assert int(answer.headers["Retry-After"]) in (2, 3)


@in_loop
async def test_an_error_after_the_first_token_comes_inside_the_stream() -> None:
    engine = FakeEngine(error=JLoraxError("lost the device"), fail_at=2)
    async with serving(engine) as server:
        answer = await server.post("/generate_stream", {"inputs": "hi"})
        assert answer.status == 200
        assert [event["token"]["text"] for event in answer.events[:-1]] == ["Hello", ","]
        assert answer.events[-1]["error_type"] == "generation"
        assert "lost the device" in answer.events[-1]["error"]


@in_loop
async def test_an_unknown_adapter_is_404_on_every_route() -> None:
    async with serving() as server:
        body = {"inputs": "hi", "parameters": {"adapter_id": "nope"}}
        for path in ("/", "/generate", "/generate_stream"):
            answer = await server.post(path, body)
            assert (answer.status, answer.json["error_type"]) == (404, "adapter_not_found")
            assert answer.json["error"] == NOT_THERE


@in_loop
async def test_no_template_is_told() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.has_template = False
    async with serving(FakeEngine(tokenizer=tokenizer)) as server:
        answer = await server.post("/generate", {"inputs": [{"role": "user", "content": "a"}]})
        assert (answer.status, answer.json["error_type"]) == (422, "validation")


@in_loop
async def test_a_quiet_stream_is_opened_and_kept_by_comments() -> None:
    gate = asyncio.Semaphore(0)
    async with serving(FakeEngine(gate=gate), sse_comment_s=0.01) as server:
        sent: dict[str, Any] = {"json": {"inputs": "hi"}}
        async with server.session.post(server.url + "/generate_stream", **sent) as response:
            assert await response.content.readline() == b":\n"
            for _ in range(4):
                gate.release()
            rest = (await response.read()).decode()
    assert rest.count("data: ") == 4


@in_loop
async def test_a_late_error_on_an_opened_stream_comes_as_an_event() -> None:
    gate = asyncio.Semaphore(0)
    engine = FakeEngine(gate=gate, error=Unavailable("dead"), fail_at=1)
    async with serving(engine, sse_comment_s=0.01) as server:
        sent: dict[str, Any] = {"json": {"inputs": "hi"}}
        async with server.session.post(server.url + "/generate_stream", **sent) as response:
            assert response.status == 200
            gate.release()
            text = (await response.read()).decode()
    assert '"error_type":"unavailable"' in text
