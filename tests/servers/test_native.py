"""LoRAX's routes, as its clients read them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from jlorax.config import ApiKey, Scope, ServerConfig
from jlorax.errors import (
    AdapterInvalid,
    InvalidRequest,
    JLoraxError,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from jlorax.types import EmbedRequest, GenerateRequest, TokenEvent
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
        first, second = answer["details"]["prefill"][:2]
        assert first == {"id": 1, "text": "\x01", "logprob": None}
        assert [alternative["id"] for alternative in second.pop("alternative_tokens")] == [200, 201]
        assert second == {"id": 104, "text": "h", "logprob": -0.5}
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
            first = {"index": 1, "token": TOKEN, "generated_text": None, "details": None}
            assert events[0] == first
            assert [event["index"] for event in events] == [1, 2, 3, 4]
            assert [event["token"]["text"] for event in events] == ["Hello", ",", " ", "world"]
            assert events[-1]["generated_text"] == "Hello, world"
            assert events[-1]["details"] == {
                "finish_reason": "eos_token",
                "prompt_tokens": 3,
                "input_length": 3,
                "generated_tokens": 4,
                "skipped_tokens": 0,
                "seed": None,
            }
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
async def test_top_tokens_are_tgis_alternatives_and_each_gets_as_many_as_asked() -> None:
    async with serving() as server:
        parameters = {"top_n_tokens": 3, "return_k_alternatives": 1, "details": True}
        body = {"inputs": "hi", "parameters": parameters}
        details = (await server.post("/generate", body)).json["details"]
        assert len(details["top_tokens"]) == 4
        third = {"id": 202, "text": chr(202), "logprob": -3.0, "special": False}
        assert details["top_tokens"][0][2] == third
        assert [len(token["alternative_tokens"]) for token in details["tokens"]] == [1] * 4
        events = (await server.post("/generate_stream", body)).events
        assert [len(event["top_tokens"]) for event in events] == [3] * 4
        plain = (
            await server.post("/generate", {"inputs": "hi", "parameters": {"details": True}})
        ).json
        assert "top_tokens" not in plain["details"]
        assert "alternative_tokens" not in plain["details"]["tokens"][0]


class DrawingEngine(FakeEngine):
    """Every request gets another script; a token's logprob falls with its place."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        scripts = (("a", "b", "c"), ("d",), ("e", "f"))
        one = FakeEngine(script=scripts[len(self.seen)])
        self.seen.append(request)
        async for event in one.generate(request):
            yield event


@in_loop
async def test_best_of_gives_the_likeliest_and_the_others_in_its_details() -> None:
    async with serving(DrawingEngine(), ServerConfig(max_best_of=3)) as server:
        parameters = {"best_of": 3, "do_sample": True, "details": True, "return_full_text": True}
        whole = await server.post("/", {"inputs": "hi", "parameters": parameters})
        (answer,) = whole.json
        assert answer["generated_text"] == "hid"
        others = answer["details"]["best_of_sequences"]
        assert [other["generated_text"] for other in others] == ["hief", "hiabc"]
        assert set(others[0]) >= {
            "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
        }  # fmt: skip
        assert (whole.headers["x-prompt-tokens"], whole.headers["x-generated-tokens"]) == ("3", "6")
        assert (await server.get("/info")).json["max_best_of"] == 3
    async with serving(DrawingEngine()) as server:
        parameters = {"best_of": 2, "temperature": 0.5}
        answer = (await server.post("/generate", {"inputs": "hi", "parameters": parameters})).json
        assert answer == {"generated_text": "d"}


@in_loop
async def test_a_chat_with_best_of_is_tokenized_for_each_answer() -> None:
    async with serving(DrawingEngine()) as server:
        parameters = {"best_of": 2, "do_sample": True, "apply_chat_template": True}
        await server.post("/generate", {"inputs": "a", "parameters": parameters})
        assert [request.prompt for request in server.engine.seen] == [
            tuple(map(ord, "<user>a"))
        ] * 2


@in_loop
async def test_a_merge_is_named_by_its_adapters() -> None:
    engine = FakeEngine(registered={name: adapter_info(name) for name in ("a", "b")})
    async with serving(engine) as server:
        merge = {"ids": ["a", "b"], "weights": [1, 2]}
        body = {"inputs": "hi", "parameters": {"merged_adapters": merge}}
        for path in ("/generate", "/generate_stream"):
            headers = (await server.post(path, body)).headers
            assert (headers["x-adapter-id"], headers["x-adapter-source"]) == ("a,b", "local")


@in_loop
async def test_startup_runs_a_real_request() -> None:
    async with serving() as server:
        answer = await server.get("/startup")
        assert (answer.status, answer.text) == (200, "")
        assert server.engine.seen == [GenerateRequest("Who?", max_new_tokens=1)]
        server.engine.state = "draining"
        assert (await server.get("/startup")).status == 503
    async with serving(FakeEngine(error=JLoraxError("lost the device"))) as server:
        answer = await server.get("/startup")
        assert answer.status == 500
        assert answer.json == {"error": "lost the device", "error_type": "failed healthcheck"}
    async with serving(FakeEngine(error=Overloaded("full: 256"))) as server:
        assert (await server.get("/startup")).status == 429


@in_loop
async def test_metrics_in_the_form_that_is_accepted() -> None:
    async with serving() as server:
        text = await server.get("/metrics", headers={"Accept": "text/plain"})
        assert text.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "jlorax_up 1" in text.text
        up = {"jlorax_up": {"type": "gauge", "data": [{"key": "", "value": 1.0}]}}
        asked = {"headers": {"Accept": "application/json"}}
        assert (await server.get("/metrics", **asked)).json == up
        assert (await server.get("/metrics?format=json")).json == up
        assert "jlorax_up 1" in (await server.get("/metrics?format=prometheus", **asked)).text
        wrong = await server.get("/metrics?format=xml")
        assert (wrong.status, wrong.json["error_type"]) == (422, "validation")


@in_loop
async def test_embed() -> None:
    engine = FakeEngine(registered={"a": adapter_info("a")})
    async with serving(engine) as server:
        sent = {"inputs": "hi", "parameters": None, "stream": False}  # as lorax-client sends it
        answer = await server.post("/embed", sent)
        assert answer.status == 200
        assert all(isinstance(value, float) for value in answer.json["embeddings"])
        body = {"inputs": "hi", "parameters": {"adapter_id": "a", "adapter_source": "local"}}
        assert (await server.post("/embed", body)).status == 200
        assert engine.embedded == [EmbedRequest("hi"), EmbedRequest("hi", "a", "local")]
        for bad in ("", 5, None):
            refused = await server.post("/embed", {"inputs": bad})
            assert (refused.status, refused.json["error_type"]) == (422, "validation")
        merge = {"inputs": "hi", "parameters": {"merged_adapters": {"ids": ["a"]}}}
        assert (await server.post("/embed", merge)).status == 422
        unknown = {"inputs": "hi", "parameters": {"adapter_id": "nope"}}
        assert (await server.post("/embed", unknown)).status == 404


@in_loop
async def test_embeddings_and_probes_are_their_tenants() -> None:
    digest = hashlib.sha256(b"key").digest()
    config = ServerConfig(api_keys={digest: ApiKey("a", frozenset(Scope))})
    async with serving(config=config) as server:
        key = {"headers": {"x-api-key": "key"}}
        assert (await server.post("/embed", {"inputs": "hi"}, **key)).status == 200
        assert (await server.get("/startup", **key)).status == 200
        assert server.engine.embedded[0].tenant == server.engine.seen[0].tenant == "a"


@in_loop
async def test_a_model_that_generates_does_not_classify() -> None:
    async with serving() as server:
        for path, inputs in (("/classify", "x"), ("/classify_batch", ["x", "y"])):
            answer = await server.post(path, {"inputs": inputs})
            assert (answer.status, answer.json["error_type"]) == (424, "generation")
            assert "'tiny/base' generates text" in answer.json["error"]
            assert answer.json["code"] == "unsupported_task"
            assert (await server.post(path, {"inputs": 5})).status == 422


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
        (PromptTooLong(300, 5, 256), 422, "validation", "Input validation error: the prompt is"),
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
