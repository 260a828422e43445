"""Tool calls over HTTP: what constrains an answer, and how its calls are shown."""

from __future__ import annotations

from typing import Any

import pytest

from jlorax.structured import tools as structured
from jlorax.structured.tool_format import HERMES, MISTRAL
from jlorax.types import Constraint, ConstraintKind, FinishReason
from tests.fakes import FakeEngine, FakeTokenizer
from tests.servers.serving import in_loop, serving
from tests.wire_calls import USER, tool

PATH = "/v1/chat/completions"
CHAT = {"model": "tiny/base", "messages": [USER], "tools": [tool(), tool("other")]}
FLAT = [{"type": "function", **asked["function"]} for asked in (tool(), tool("other"))]
RESPONSE = {"model": "tiny/base", "input": "hi", "tools": FLAT}
TWO_CALLS = (
    "I ", "ask.", "<tool", '_call>\n{"name": "look_up", "argu', 'ments": {"word"', ': "x"}', "}",
    '\n</tool_call>\n<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', "",
)  # fmt: skip


def constraint_of(choice: structured.ToolChoice | str, parallel: bool = True) -> Constraint:
    parameters = tool()["function"]["parameters"]
    tools = [structured.Tool(name, parameters) for name in ("look_up", "other")]
    return structured.tool_constraint(tools, choice, HERMES, parallel)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, constraint_of(structured.ToolChoice.AUTO)),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, constraint_of(structured.ToolChoice.REQUIRED)),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            constraint_of(structured.ToolChoice.REQUIRED, parallel=False),
        ),
        ({"tool_choice": "other"}, constraint_of("other", parallel=False)),
    ],
)
@in_loop
async def test_answers_are_held_to_the_tools(
    fields: dict[str, Any], expected: Constraint | None
) -> None:
    async with serving() as server:
        assert (await server.post(PATH, CHAT | fields | {"n": 2})).status == 200
        assert [request.constraint for request in server.engine.seen] == [expected] * 2
        assert (await server.post("/v1/responses", RESPONSE | fields)).status == 200
        assert server.engine.seen[-1].constraint == expected


@in_loop
async def test_tools_beside_a_response_format() -> None:
    """A call, or an answer of the form; a call that is required leaves no room for the form."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    answer = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')
    parameters = tool()["function"]["parameters"]
    tools = [structured.Tool(name, parameters) for name in ("look_up", "other")]
    expected = {
        "auto": structured.tool_constraint(
            tools, structured.ToolChoice.AUTO, HERMES, answer=answer
        ),
        "none": answer,
        "required": constraint_of(structured.ToolChoice.REQUIRED),
    }
    async with serving() as server:
        for choice, constraint in expected.items():
            body = CHAT | {"tool_choice": choice, "response_format": form}
            assert (await server.post(PATH, body)).status == 200
            assert server.engine.seen[-1].constraint == constraint
        regex = CHAT | {"guided_regex": "a"}
        answered = await server.post(PATH, regex)
        assert answered.status == 400 and "exclude" in answered.json["error"]["message"]


@in_loop
async def test_calls_are_written_as_the_models_family_does() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = "[TOOL_CALLS]"
    async with serving(FakeEngine(tokenizer=tokenizer)) as server:
        await server.post(PATH, CHAT | {"tools": [tool()], "tool_choice": "required"})
        looking = structured.Tool("look_up", tool()["function"]["parameters"])
        required = structured.ToolChoice.REQUIRED
        assert server.engine.seen[0].constraint == structured.tool_constraint(
            [looking], required, MISTRAL
        )


@in_loop
async def test_a_whole_answer_with_calls() -> None:
    async with serving(FakeEngine(script=TWO_CALLS)) as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I ask."
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "look_up", "arguments": '{"word": "x"}'}
    assert second["function"] == {"name": "other", "arguments": "{}"}
    assert first["id"].startswith("call_") and first["id"] != second["id"]


@in_loop
async def test_an_answer_of_calls_alone_has_null_content() -> None:
    async with serving(FakeEngine(script=TWO_CALLS[2:])) as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
    assert choice["message"]["content"] is None


@in_loop
async def test_an_answer_without_calls_is_a_text() -> None:
    async with serving() as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Hello, world"}
        assert choice["finish_reason"] == "stop"
        events = (await server.post(PATH, CHAT | {"stream": True})).events
        assert events[-2]["choices"][0]["finish_reason"] == "stop"


@in_loop
async def test_what_only_looked_like_a_call_is_text() -> None:
    async with serving(FakeEngine(script=("a", "<tool"))) as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
        assert choice["message"] == {"role": "assistant", "content": "a<tool"}
        events = (await server.post(PATH, CHAT | {"stream": True})).events
        assert "".join(delta.get("content", "") for delta in deltas(events)) == "a<tool"


class _Marked(FakeTokenizer):
    """Its mark of a call is one special token, the first of every answer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [100] if text == HERMES.opening else super().encode(text, add_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id == 100 or super().is_special(token_id)


@in_loop
async def test_a_mark_that_is_a_special_token_is_seen() -> None:
    script = ("", '{"name": "other", "arguments": {}}', "</tool_call>")
    async with serving(FakeEngine(script=script, tokenizer=_Marked())) as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "other"
        output = (await server.post("/v1/responses", RESPONSE)).json["output"]
        assert [item["type"] for item in output] == ["function_call"]


@in_loop
async def test_a_call_that_was_cut_off_ends_by_its_length() -> None:
    engine = FakeEngine(script=TWO_CALLS[2:5], finish=FinishReason.LENGTH)
    async with serving(engine) as server:
        (choice,) = (await server.post(PATH, CHAT)).json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"word"'


def deltas(events: list[Any]) -> list[dict[str, Any]]:
    return [event["choices"][0]["delta"] for event in events if event != "[DONE]"]


@in_loop
async def test_streamed_calls_come_in_pieces() -> None:
    async with serving(FakeEngine(script=TWO_CALLS)) as server:
        *chunks, end, done = (await server.post(PATH, CHAT | {"stream": True})).events
    assert done == "[DONE]"
    assert (deltas([end])[0], end["choices"][0]["finish_reason"]) == ({}, "tool_calls")
    shown = deltas(chunks)
    assert shown[:2] == [{"role": "assistant", "content": "I "}, {"content": "ask."}]
    calls = [delta["tool_calls"][0] for delta in shown[2:]]
    assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
    begun = [call for call in calls if "id" in call]
    assert [call["function"]["name"] for call in begun] == ["look_up", "other"]
    arguments = ["", ""]
    for call in calls:
        arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == ['{"word": "x"}', "{}"]
    assert len(calls) > 4, "the arguments came at once"


@in_loop
async def test_a_stream_that_begins_with_a_call_still_says_its_role() -> None:
    async with serving(FakeEngine(script=TWO_CALLS[2:])) as server:
        events = (await server.post(PATH, CHAT | {"stream": True})).events
    assert deltas(events)[0] == {"role": "assistant", "content": ""}


@in_loop
async def test_every_token_keeps_its_details_in_a_stream_of_calls() -> None:
    async with serving(FakeEngine(script=TWO_CALLS)) as server:
        body = CHAT | {"stream": True, "logprobs": True, "return_token_ids": True}
        *chunks, _, _ = (await server.post(PATH, body)).events
    choices = [chunk["choices"][0] for chunk in chunks]
    ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert ids == [100 + place for place in range(len(TWO_CALLS))]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert len(entries) == len(TWO_CALLS)


@in_loop
async def test_without_tools_a_call_is_text() -> None:
    async with serving(FakeEngine(script=TWO_CALLS)) as server:
        (choice,) = (await server.post(PATH, CHAT | {"tool_choice": "none"})).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": "".join(TWO_CALLS)}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, CHAT | {"guided_regex": "a"}),
        ("/v1/responses", RESPONSE | {"guided_choice": ["a"]}),
    ],
)
@in_loop
async def test_tools_exclude_what_is_no_schema(path: str, body: dict[str, Any]) -> None:
    async with serving() as server:
        answer = await server.post(path, body)
        assert (answer.status, answer.json["error"]["param"]) == (400, "tools")
        assert (await server.post(path, body | {"tool_choice": "none"})).status == 200


@in_loop
async def test_a_response_with_calls() -> None:
    async with serving(FakeEngine(script=TWO_CALLS)) as server:
        whole = (await server.post("/v1/responses", RESPONSE)).json["output"]
        events = (await server.post("/v1/responses", RESPONSE | {"stream": True})).events
    message, first, second = whole
    assert message["content"][0]["text"] == "I ask."
    assert (first["name"], first["arguments"]) == ("look_up", '{"word": "x"}')
    assert first["call_id"].startswith("call_")
    assert (second["name"], second["arguments"]) == ("other", "{}")
    pieces = [event for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(p["delta"] for p in pieces if p["output_index"] == 1) == '{"word": "x"}'
    streamed = events[-1]["response"]["output"]
    assert [item["type"] for item in streamed] == ["message", "function_call", "function_call"]
