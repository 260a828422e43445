"""/v1/responses: items in, items and events out."""

from __future__ import annotations

from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.types import Constraint, ConstraintKind, FinishReason, GenerateResult, Token
from jlorax.wire.call import Call, Message, ToolCall, ToolMode
from jlorax.wire.responses import parse_response
from jlorax.wire.responses_answers import ResponseWriter
from jlorax.wire.tools import CallArguments, CallBegun, Piece, TextPiece
from tests.wire_calls import LIMITS, tool

FLAT = {"type": "function", **tool()["function"]}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "look_up",
    "arguments": '{"word":"x"}',
    "status": "completed",
}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "found"}


def asked(**fields: Any) -> Call:
    return parse_response({"model": "", "input": "hi", **fields}, LIMITS).call


def messages(*items: Any, **fields: Any) -> list[Message]:
    return list(asked(input=list(items), **fields).messages or ())


def test_a_text_is_what_the_user_says() -> None:
    assert asked().messages == (Message("user", "hi"),)
    assert asked(instructions="Be kind.").messages == (
        Message("system", "Be kind."),
        Message("user", "hi"),
    )


def test_items_become_messages() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "c", "annotations": []}],
    }
    found = messages({"role": "user", "content": parts}, said, CALL, OUTPUT)
    call = ToolCall("call_1", "look_up", '{"word":"x"}')
    assert found == [
        Message("user", "ab"),
        Message("assistant", "c", tool_calls=(call,)),
        Message("tool", "found", name="look_up", tool_call_id="call_1"),
    ]


def test_calls_of_one_turn_are_one_message() -> None:
    second = CALL | {"call_id": "call_2"}
    found = messages({"role": "user", "content": "a"}, CALL, second)
    assert [call.id for call in found[1].tool_calls] == ["call_1", "call_2"]
    assert len(found) == 2


def test_system_messages_at_the_start_are_one() -> None:
    system = {"role": "developer", "content": "b"}
    user = {"role": "user", "content": "c"}
    found = messages(system, user, system, instructions="a")
    assert found == [Message("system", "a\n\nb"), Message("user", "c"), Message("system", "b")]


def test_fields_arrive() -> None:
    call = asked(
        max_output_tokens=9, temperature=0.5, top_p=0.9, stream=True, top_k=5, min_tokens=2,
        tools=[FLAT], tool_choice="required", parallel_tool_calls=False, store=True,
        include=["message.output_text.logprobs"], top_logprobs=3, truncation="disabled",
        reasoning={}, previous_response_id=None, background=False, zzz=1,
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    (request,) = call.requests
    assert (request.max_new_tokens, request.min_new_tokens) == (9, 2)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.9)
    assert (request.sampling.top_k, request.num_top_logprobs) == (5, 3)
    assert request.constraint == Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')
    assert call.show.stream and call.show.logprobs
    assert call.chat.tools == (tool(),)
    assert (call.tool_choice.mode, call.tool_choice.parallel) == (ToolMode.REQUIRED, False)
    assert call.unknown_fields == ("zzz",)
    assert not asked().show.logprobs


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_1"}, "`previous_response_id` needs what this server does"),
        ({"conversation": "conv_1"}, "send the earlier items"),
        ({"background": True}, "`background`"),
        ({"prompt": {"id": "p"}}, "`prompt`"),
        ({"truncation": "auto"}, "`truncation`"),
        ({"reasoning": {"effort": "high"}}, "`reasoning`"),
        ({"context_management": [{}]}, "`context_management`"),
        ({"max_tool_calls": 3}, "`max_tool_calls`"),
        ({"include": ["reasoning.encrypted_content"]}, "reasoning.encrypted_content"),
        ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.type"),
        ({"text": []}, "`text` must be an object"),
        (
            {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "`guided_regex` excludes `text.format`",
        ),
        ({"max_output_tokens": 0}, "`max_output_tokens` must be between 1"),
        ({"input": ""}, "`input` cannot be empty"),
        ({"input": []}, "`input` cannot be empty"),
        ({"input": None}, "`input` cannot be empty"),
        ({"input": {}}, "`input` must be a string or a list"),
        ({"input": ["x"]}, "`input[0]` must be an object"),
        ({"input": [{"role": "user", "content": "x"}] * 10_000}, "at most 4096 items, not 10000"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "no items are stored"),
        ({"input": [{"type": "reasoning"}]}, "Given: 'reasoning'"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image'"),
        ({"input": [CALL | {"call_id": None}]}, "input[0].call_id"),
        ({"input": [CALL | {"arguments": "{"}]}, "input[0].arguments"),
        ({"input": [OUTPUT | {"output": None}]}, "output of a call"),
        ({"tools": [{"type": "web_search"}]}, "Given: 'web_search'"),
        ({"tools": [tool()]}, "tools[0].name"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "g"}}, "names 'g'"),
        ({"temperature": 101}, "temperature"),
        ({"model": None}, "`model` must be a string"),
        ({"instructions": 3}, "instructions"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(**fields)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_the_answer_repeats() -> None:
    echo = parse_response(
        {
            "model": "",
            "input": "hi",
            "instructions": "i",
            "max_output_tokens": 5,
            "metadata": {"k": "v"},
            "tools": [FLAT],
            "tool_choice": {"type": "function", "name": "look_up"},
            "text": {"format": {"type": "json_object"}},
        },
        LIMITS,
    ).echo
    assert (echo["instructions"], echo["max_output_tokens"]) == ("i", 5)
    assert (echo["temperature"], echo["top_p"]) == (1.0, 1.0)
    assert echo["metadata"] == {"k": "v"}
    assert echo["tools"] == [FLAT | {"strict": True}]
    assert echo["tool_choice"] == {"type": "function", "name": "look_up"}
    assert echo["text"] == {"format": {"type": "json_object"}}
    plain = parse_response({"model": "", "input": "hi"}, LIMITS).echo
    assert (plain["tool_choice"], plain["text"]) == ("auto", {"format": {"type": "text"}})


# Answers.

TOKENS = (Token(100, "a", -0.5, False), Token(101, "b", -0.25, False))


def written(
    *pieces: Piece, finish: FinishReason = FinishReason.EOS_TOKEN, logprobs: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events, a token for each piece, and the last one's response."""
    writer = ResponseWriter("m", 1, {"metadata": {}}, chr if logprobs else None)
    result = GenerateResult("ab", finish, TOKENS, (1, 2, 3), None)
    events = [*writer.begin()]
    for place, piece in enumerate(pieces):
        events += writer.add(TOKENS[place : place + 1], [piece])
    events += writer.end(result)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == writer.whole(result)
    return events, events[-1]["response"]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_the_events_of_a_text() -> None:
    events, response = written(TextPiece("a"), TextPiece(""), TextPiece("b"))
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
    assert [event["delta"] for event in events[4:6]] == ["a", "b"]
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == events[6]["text"] == "ab"
    assert events[8]["item"] == item
    assert {event["item_id"] for event in events[3:8]} == {item["id"]}
    assert (response["status"], response["store"]) == ("completed", False)
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (3, 2, 5)
    assert events[0]["response"]["usage"] is None


def test_the_events_of_calls() -> None:
    events, response = written(
        TextPiece("I ask."),
        CallBegun(0, "call_1", "f"),
        CallArguments(0, '{"a"'),
        CallArguments(0, ":1}"),
        CallBegun(1, "call_2", "g"),
        CallArguments(1, "{}"),
    )
    assert kinds(events)[5:] == [
        "output_text.done", "content_part.done", "output_item.done", "output_item.added",
        "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "output_item.added",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    message, first, second = response["output"]
    assert message["content"][0]["text"] == "I ask."
    assert (first["call_id"], first["name"], first["arguments"]) == ("call_1", "f", '{"a":1}')
    assert (second["call_id"], second["arguments"], second["status"]) == (
        "call_2", "{}", "completed",
    )  # fmt: skip
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert added[1]["item"]["arguments"] == ""


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    _, response = written(TextPiece(""))
    assert response["output"][0]["content"][0]["text"] == ""


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    events, response = written(TextPiece("a"), finish=FinishReason.LENGTH)
    assert events[-1]["type"] == "response.incomplete"
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_log_probabilities_go_with_the_text_that_their_tokens_say() -> None:
    events, response = written(TextPiece(""), TextPiece("b"), logprobs=True)
    (delta,) = (event for event in events if event["type"].endswith("text.delta"))
    assert [entry["token"] for entry in delta["logprobs"]] == ["d", "e"]
    part = response["output"][0]["content"][0]
    assert [entry["logprob"] for entry in part["logprobs"]] == [-0.5, -0.25]
    assert written(TextPiece("b"))[1]["output"][0]["content"][0]["logprobs"] == []
