"""What jlorax's clients ask beyond one answer to one prompt: best_of, merges, constraints, tools,
embeddings, tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

import jlorax
from jlorax.config import ServerConfig
from jlorax.errors import AdapterNotFound, InvalidParameter
from jlorax.types import (
    AdapterMerge,
    Constraint,
    ConstraintKind,
    EmbedRequest,
    MergeStrategy,
    SamplingParams,
)
from jlorax.wire.call import ToolCall
from jlorax.wire.native_client import TextPiece
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving
from tests.servers.test_native import DrawingEngine

MERGE = AdapterMerge(("a", "b"), (1.0, 0.5), MergeStrategy.TIES, density=0.5)
WORD = Constraint(ConstraintKind.REGEX, "[a-z]+")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
MESSAGES = [{"role": "user", "content": "hi"}]


def adapters() -> FakeEngine:
    return FakeEngine(registered={name: adapter_info(name) for name in ("a", "b")})


@in_loop
async def test_what_a_request_may_say_reaches_the_engine() -> None:
    options: dict[str, Any] = {
        "merge": MERGE,
        "adapter_scale": 0.5,
        "constraint": WORD,
        "min_new_tokens": 2,
    }
    async with serving(adapters()) as server, jlorax.AsyncClient(server.url) as client:
        await client.generate("hi", logit_bias={5: 1.0}, **options)
        async for _ in client.stream("hi", logit_bias=[(5, 1.0)], **options):
            pass
        await client.chat(MESSAGES, logit_bias={5: 1.0}, **options)
        for request in server.engine.seen:
            assert {name: getattr(request, name) for name in options} == options
            assert request.logit_bias == ((5, 1.0),)


@in_loop
async def test_a_response_format_is_a_constraint() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        await client.generate("hi", response_format=form)
        (request,) = server.engine.seen
        assert request.constraint == Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')


@in_loop
async def test_best_of_comes_best_first() -> None:
    async with (
        serving(DrawingEngine(), ServerConfig(max_best_of=3)) as server,
        jlorax.AsyncClient(server.url) as client,
    ):
        results = await client.generate_best_of("hi", 3, temperature=1.0)
        assert [result.text for result in results] == ["d", "ef", "abc"]
        assert results[0].prompt_token_ids == (1, ord("h"), ord("i"))
        with pytest.raises(InvalidParameter, match="you must use sampling"):
            await client.generate_best_of("hi", 2)


@in_loop
async def test_prompt_logprobs_are_for_whole_answers() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        result = await client.generate("hi", prompt_logprobs=True)
        assert [token.logprob for token in result.prompt_tokens] == [None, -0.5, -0.5]
        with pytest.raises(InvalidParameter, match="not supported when streaming"):
            async for _ in client.stream("hi", prompt_logprobs=True):
                pass


@in_loop
async def test_a_chat_with_tools_goes_on_with_what_they_say() -> None:
    said = ['<tool_call>\n{"name": "look_up", "arguments": {"word": "x"}}\n</tool_call>']
    async with (
        serving(FakeEngine(script=said, registered={"a": adapter_info("a")})) as server,
        jlorax.AsyncClient(server.url) as client,
    ):
        answer = await client.chat_with_tools(
            MESSAGES, [TOOL], adapter_id="a", temperature=0.5, stop="x", max_new_tokens=9
        )
        (call,) = answer.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("look_up", {"word": "x"})
        assert (answer.finish_reason, answer.text) == ("tool_calls", "")
        assert (answer.num_prompt_tokens, answer.num_tokens) == (len("<user>hi"), 1)
        (request,) = server.engine.seen
        assert (request.adapter_id, request.stop, request.max_new_tokens) == ("a", ("x",), 9)
        assert request.sampling == SamplingParams(temperature=0.5)
        assert not request.include_stop_text
        result = {"role": "tool", "tool_call_id": call.id, "content": "found"}
        await client.chat_with_tools([*MESSAGES, answer.message(), result], [TOOL])
        rendered = server.engine.tokenizer.rendered[-1]["messages"]
        assert [message["role"] for message in rendered] == ["user", "assistant", "tool"]
        assert rendered[1]["tool_calls"][0]["function"]["name"] == "look_up"


@in_loop
async def test_a_chat_with_tools_that_calls_none() -> None:
    async with serving(adapters()) as server, jlorax.AsyncClient(server.url) as client:
        answer = await client.chat_with_tools(
            MESSAGES, [TOOL], tool_choice="none", merge=MERGE, adapter_scale=2.0
        )
        assert (answer.text, answer.tool_calls) == ("Hello, world", ())
        assert answer.message() == {"role": "assistant", "content": "Hello, world"}
        assert server.engine.seen[0].merge == MERGE
        assert server.engine.seen[0].adapter_scale == 2.0
        assert server.engine.seen[0].sampling.temperature == 0.0
        for option in ({"truncate": 5}, {"num_top_logprobs": 2}, {"prompt_logprobs": True}):
            with pytest.raises(InvalidParameter, match="not supported in a chat with tools"):
                await client.chat_with_tools(MESSAGES, [TOOL], **option)  # type: ignore[arg-type]
        with pytest.raises(InvalidParameter, match="tool_choice"):
            await client.chat_with_tools(MESSAGES, [TOOL], tool_choice="no_such")


@in_loop
async def test_embeddings() -> None:
    async with serving(adapters()) as server, jlorax.AsyncClient(server.url) as client:
        one, two = await client.embed(["hi", "longer"], adapter_id="a")
        assert len(one) == len(two) > 0
        assert all(isinstance(value, float) for value in one)
        assert server.engine.embedded == [EmbedRequest("hi", "a"), EmbedRequest("longer", "a")]
        await client.embed([[5, 6]])
        assert server.engine.embedded[-1].prompt == (5, 6)
        with pytest.raises(AdapterNotFound):
            await client.embed(["hi"], adapter_id="nope")


@in_loop
async def test_tokens() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        assert await client.tokenize("ab") == [TextPiece(97, "a", 0, 1), TextPiece(98, "b", 1, 2)]


def test_a_tool_call_is_told_as_openai_tells_it() -> None:
    from jlorax.wire.openai_client import ChatAnswer

    call = ToolCall("call_1", "look_up", '{"word":"x"}')
    assert ChatAnswer("so", (call,), "tool_calls", 5, 6).message() == {
        "role": "assistant",
        "content": "so",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "look_up", "arguments": '{"word":"x"}'},
            }
        ],
    }
