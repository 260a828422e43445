"""The /v1 routes in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from jlorax.config import ServerConfig
from jlorax.errors import AdapterInvalid, JLoraxError, Overloaded, PromptTooLong, Unavailable
from jlorax.types import FinishReason, GenerateRequest, TokenEvent
from tests.fakes import FakeEngine
from tests.servers.serving import in_loop, serving

COMPLETION = {"model": "tiny/base", "prompt": "hi"}
CHAT = {"model": "tiny/base", "messages": [{"role": "user", "content": "hi"}]}
TEXTS = ["Hello", ",", " ", "world"]


@in_loop
async def test_completion() -> None:
    async with serving() as server:
        answer = (await server.post("/v1/completions", COMPLETION)).json
        assert answer["object"] == "text_completion"
        assert answer["model"] == "tiny/base"
        assert answer["id"].startswith("cmpl-")
        assert answer["created"] > 1_600_000_000
        assert answer["choices"] == [
            {"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}
        ]
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        (request,) = server.engine.seen
        assert (request.sampling.temperature, request.include_stop_text) == (1.0, False)


@pytest.mark.parametrize(
    ("finish", "word"),
    [
        (FinishReason.LENGTH, "length"),
        (FinishReason.EOS_TOKEN, "stop"),
        (FinishReason.STOP_SEQUENCE, "stop"),
    ],
)
@in_loop
async def test_finish_words(finish: FinishReason, word: str) -> None:
    async with serving(FakeEngine(finish=finish)) as server:
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            assert (await server.post(path, body)).json["choices"][0]["finish_reason"] == word
            events = (await server.post(path, body | {"stream": True})).events
            assert events[-2]["choices"][0]["finish_reason"] == word


@in_loop
async def test_several_prompts_and_samples_are_indexed_prompt_major() -> None:
    async with serving() as server:
        body = COMPLETION | {"prompt": ["a", "bc"], "n": 2, "return_token_ids": True}
        answer = (await server.post("/v1/completions", body)).json
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        ids = [choice["prompt_token_ids"] for choice in answer["choices"]]
        assert ids == [[1, 97], [1, 97], [1, 98, 99], [1, 98, 99]]
        assert answer["choices"][0]["token_ids"] == [100, 101, 102, 103]
        assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}


@in_loop
async def test_logprobs_and_echo() -> None:
    async with serving() as server:
        body = COMPLETION | {"logprobs": 1, "echo": True}
        choice = (await server.post("/v1/completions", body)).json["choices"][0]
        assert choice["text"] == "hiHello, world"
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][:4] == [None, -0.5, -0.5, -0.25]
        assert logprobs["top_logprobs"][3] == {chr(200): -1.0, "d": -0.25}
        assert len({len(column) for column in logprobs.values()}) == 1
        assert server.engine.seen[0].prompt_logprobs


@in_loop
async def test_chat() -> None:
    async with serving() as server:
        body = CHAT | {"logprobs": True, "top_logprobs": 1, "max_completion_tokens": 9}
        answer = (await server.post("/v1/chat/completions", body)).json
        assert answer["object"] == "chat.completion"
        assert isinstance(answer["system_fingerprint"], str)
        choice = answer["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "Hello, world"}
        assert choice["logprobs"]["content"][0] == {
            "token": "d",
            "logprob": -0.25,
            "bytes": [100],
            "top_logprobs": [{"token": chr(200), "logprob": -1.0, "bytes": [195, 136]}],
        }
        (request,) = server.engine.seen
        assert request.prompt == tuple(map(ord, "<user>hi"))
        assert (request.max_new_tokens, request.add_special_tokens) == (9, False)


@in_loop
async def test_a_long_chat_is_tokenized_off_the_loop_to_the_same_ids() -> None:
    async with serving() as server:
        body = CHAT | {"messages": [{"role": "user", "content": "x" * 100_000}]}
        assert (await server.post("/v1/chat/completions", body)).status == 200
        assert len(server.engine.seen[0].prompt) == 100_006


@in_loop
async def test_completion_stream() -> None:
    async with serving() as server:
        body = COMPLETION | {"stream": True, "stream_options": {"include_usage": True}}
        answer = await server.post("/v1/completions", body)
        *chunks, usage, done = answer.events
        assert [chunk["choices"][0]["text"] for chunk in chunks] == TEXTS
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 7
        assert done == "[DONE]"
        assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


@pytest.mark.parametrize(
    ("path", "body"), [("completions", COMPLETION), ("chat/completions", CHAT)]
)
@in_loop
async def test_chunks_in_the_middle_differ_in_their_text_alone(
    path: str, body: dict[str, Any]
) -> None:
    texts = ("a", '"', "\\", "\n\ndata: x", "\u2028\U0001f600", "", "b")
    async with serving(FakeEngine(script=texts)) as server:
        asked = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        *chunks, usage, _ = (await server.post(f"/v1/{path}", body | asked)).events
    assert usage["usage"]["completion_tokens"] == 2 * len(texts)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        deltas = [choice.get("delta", choice) for choice in own]
        key = "content" if "delta" in own[0] else "text"
        assert [delta.pop(key) for delta in deltas if key in delta] == list(texts)
        assert all(choice == own[1] for choice in own[1 : len(texts) - 1])
    assert all(c.keys() == chunks[0].keys() and c["id"] == chunks[0]["id"] for c in chunks)


@pytest.mark.parametrize(
    ("asked", "key", "expected"),
    [
        ({"return_token_ids": True}, "token_ids", [[100], [101], [102], [103]]),
        ({"logprobs": 0}, "logprobs", [(["d"], [0]), (["e"], [5]), (["f"], [6]), (["g"], [7])]),
    ],
)
@in_loop
async def test_every_chunk_has_its_own_details(
    asked: dict[str, Any], key: str, expected: list[Any]
) -> None:
    async with serving() as server:
        body = COMPLETION | {"stream": True} | asked
        *chunks, _ = (await server.post("/v1/completions", body)).events
    shown = [chunk["choices"][0][key] for chunk in chunks]
    if key == "logprobs":
        shown = [(own["tokens"], own["text_offset"]) for own in shown]
    assert shown == expected


class _CutOff(FakeEngine):
    """Its answers end without a result."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield replace(event, result=None)


@pytest.mark.parametrize("n", [1, 2])
@in_loop
async def test_an_answer_that_is_cut_off_is_an_error(n: int) -> None:
    async with serving(_CutOff()) as server:
        answer = await server.post("/v1/completions", COMPLETION | {"n": n})
        assert (answer.status, answer.json["error"]["code"]) == (500, "cancelled")
        events = (await server.post("/v1/completions", COMPLETION | {"stream": True})).events
        assert events[-1]["error"]["code"] == "cancelled"


@in_loop
async def test_chat_stream() -> None:
    async with serving() as server:
        answer = await server.post("/v1/chat/completions", CHAT | {"stream": True})
        *chunks, end, done = answer.events
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Hello"}
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == TEXTS
        assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
        assert "usage" not in end
        assert done == "[DONE]"


@in_loop
async def test_choices_of_a_stream_interleave_and_each_is_whole() -> None:
    async with serving() as server:
        body = COMPLETION | {"stream": True, "prompt": ["a", "b"], "n": 2, "echo": True}
        *chunks, done = (await server.post("/v1/completions", body)).events
        assert done == "[DONE]"
        texts = ["", "", "", ""]
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == [f"{prompt}Hello, world" for prompt in "aabb"]


@in_loop
async def test_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serving() as server:
        body = COMPLETION | {"stream": True, "stream_options": options}
        *chunks, usage, _ = (await server.post("/v1/completions", body)).events
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
        assert usage["usage"]["total_tokens"] == 7


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLong(300, 5, 256), 400, "context_length_exceeded"),
        (AdapterInvalid("x", "f.json", "r is 0"), 422, "adapter_invalid"),
        (Overloaded("the queue is full: 256"), 429, "overloaded"),
        (Unavailable("draining"), 503, "unavailable"),
        (JLoraxError("x"), 500, "internal"),
        (KeyError("secret"), 500, "internal"),
    ],
)
@in_loop
async def test_errors_before_the_first_token(error: Exception, status: int, code: str) -> None:
    async with serving(FakeEngine(error=error)) as server:
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            for extra in ({}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}):
                answer = await server.post(path, body | extra)
                assert (answer.status, answer.json["error"]["code"]) == (status, code)
                assert set(answer.json["error"]) >= {"message", "type", "param", "code"}
                assert "secret" not in answer.text
                assert ("Retry-After" in answer.headers) == (status in (429, 503))
                await _all_closed(server.engine)


async def _all_closed(engine: FakeEngine) -> None:
    assert engine.num_open == 0
    await asyncio.sleep(0)


@in_loop
async def test_an_error_after_the_first_chunk_ends_the_stream_without_done() -> None:
    async with serving(FakeEngine(error=Unavailable("dead"), fail_at=1)) as server:
        events = (await server.post("/v1/completions", COMPLETION | {"stream": True})).events
        assert events[-1]["error"]["message"] == "dead"
        assert "[DONE]" not in events


@in_loop
async def test_validation_names_the_field() -> None:
    async with serving() as server:
        answer = await server.post("/v1/completions", COMPLETION | {"top_p": 7})
        assert answer.status == 400
        assert answer.json["error"]["param"] == "top_p"
        assert answer.json["error"]["type"] == "invalid_request_error"


@in_loop
async def test_fields_that_nobody_reads_are_noted_and_ignored() -> None:
    records: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("jlorax.http")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        async with serving() as server:
            body = COMPLETION | {"zzz\n": "secret", "user": "u"}
            assert (await server.post("/v1/completions", body)).status == 200
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    (noted,) = (line for line in records if "unknown" in line)
    assert noted == "1 unknown fields are ignored: 'zzz\\n'"


@in_loop
async def test_a_strict_server_refuses_them() -> None:
    async with serving(config=ServerConfig(strict_fields=True)) as server:
        for path, body in (
            ("completions", COMPLETION),
            ("chat/completions", CHAT),
            ("responses", {"model": "", "input": "hi"}),
            ("embeddings", {"model": "", "input": "hi"}),
        ):
            assert (await server.post(f"/v1/{path}", body)).status == 200
            answer = await server.post(f"/v1/{path}", body | {"zzz": 1})
            assert (answer.status, answer.json["error"]["param"]) == (400, "zzz")
        assert (await server.post("/generate", {"inputs": "hi", "zzz": 1})).status == 422
