"""The tools of a request, the choice among them, and conversations that used them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.wire.call import Message, ToolCall, ToolChoice, ToolMode
from jlorax.wire.tools import (
    CallArguments,
    CallBegun,
    TextPiece,
    as_text,
    gathered,
    offered,
)
from tests.wire_calls import USER, chat, tool

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"word": "x"}'},
}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "call_1", "content": "found"}


def test_tools_are_read_as_templates_want_them() -> None:
    bare = {"type": "function", "function": {"name": "now", "description": "The time"}}
    call = chat(tools=[tool(strict=True), bare])
    none = {"type": "object", "properties": {}}
    now = {"name": "now", "description": "The time", "parameters": none}
    assert call.chat.tools == (tool(), {"type": "function", "function": now})
    assert call.tool_choice == ToolChoice()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(ToolMode.NONE)),
        ("required", ToolChoice(ToolMode.REQUIRED)),
        ("look_up", ToolChoice(ToolMode.REQUIRED, "look_up", parallel=False)),
        (
            {"type": "function", "function": {"name": "look_up"}},
            ToolChoice(ToolMode.REQUIRED, "look_up", parallel=False),
        ),
        (
            {"type": "function", "name": "look_up"},
            ToolChoice(ToolMode.REQUIRED, "look_up", parallel=False),
        ),
    ],
)
def test_the_choice_among_tools(choice: object, expected: ToolChoice) -> None:
    call = chat(tools=[tool(), tool("other")], tool_choice=choice)
    assert call.tool_choice == expected
    seen = offered(call.chat.tools, call.tool_choice)
    assert len(seen) == (0 if expected.mode is ToolMode.NONE else 2)


def test_one_call_at_a_time() -> None:
    assert not chat(tools=[tool()], parallel_tool_calls=False).tool_choice.parallel


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": {}}, "`tools` must be a list"),
        ({"tools": ["x"]}, "`tools[0]` must be an object"),
        ({"tools": [tool(f"f{i}") for i in range(10_000)]}, "at most 128 tools, not 10000"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type` must be 'function'"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "Given: 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function` must be an object, not null"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "1 to 64 of"),
        ({"tools": [tool("a" * 65)]}, "64"),
        ({"tools": [tool("f"), tool("f")]}, "two functions named 'f'"),
        ({"tools": [tool(description=3)]}, "description"),
        ({"tools": [tool(parameters=[])]}, "parameters` must be an object"),
        ({"tools": [tool(parameters={"type": "bogus"})]}, "the JSON schema of an object"),
        ({"tools": [tool(parameters={"enum": ["x" * 100] * 1000})]}, "may have 65536 characters"),
        ({"tools": [tool(strict="yes")]}, "strict"),
        ({"tools": [tool()], "tool_choice": "absent"}, "names 'absent', which is not among"),
        ({"tools": [tool()], "tool_choice": 3}, "must be auto, none, required or name"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "Given: 'allowed_tools'"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names 'g'",
        ),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "there are no `tools`"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "`functions` is OpenAI's old word: use `tools`"),
        ({"function_call": {"name": "f"}}, "use `tool_choice`"),
        ({"tool_prompt": "x"}, "tool_prompt"),
    ],
)
def test_wrong_tools_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chat(**fields)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_conversation_with_calls() -> None:
    call = chat(messages=[USER, CALLING, ANSWER])
    assert call.messages is not None
    assert [message.to_template() for message in call.messages] == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                CALL | {"function": {"name": "look_up", "arguments": {"word": "x"}}},
            ],
        },
        ANSWER | {"name": "look_up"},
    ]


def with_call(**changes: Any) -> dict[str, Any]:
    return CALLING | {"tool_calls": [CALL | changes]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id` must say which call"),
        ({"role": "tool", "tool_call_id": "c", "content": None}, "messages[0].content"),
        (USER | {"tool_call_id": "c"}, "is of the role 'tool', not 'user'"),
        (USER | {"tool_calls": [CALL]}, "are of the role 'assistant', not 'user'"),
        (CALLING | {"tool_calls": []}, "messages[0].content"),
        (CALLING | {"tool_calls": [CALL] * 129}, "at most 128 calls, not 129"),
        (CALLING | {"tool_calls": ["x"]}, "messages[0].tool_calls[0]` must be an object"),
        (with_call(type="custom"), "must be 'function'. Given: 'custom'"),
        (with_call(id=None), "messages[0].tool_calls[0].id"),
        (with_call(function=None), "tool_calls[0].function` must be an object"),
        (with_call(function={"name": "f"}), "function.arguments` must be a string"),
        (with_call(function={"name": "f", "arguments": "{"}), "the text of a JSON object"),
        (with_call(function={"name": "f", "arguments": "[]"}), "the text of a JSON object"),
        (with_call(function={"name": "f g", "arguments": ""}), "function.name"),
        (USER | {"function_call": {"name": "f"}}, "use `tool_calls`"),
    ],
)
def test_wrong_calls_are_refused_by_their_place(message: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chat(messages=[message])
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_call_without_arguments_has_an_empty_object() -> None:
    call = chat(messages=[with_call(function={"name": "f", "arguments": " "})])
    assert call.messages is not None
    assert call.messages[0].tool_calls[0].arguments == "{}"


# Templates without tools.


def test_tools_are_told_in_the_system_message() -> None:
    for messages, before in (
        ([USER], ""),
        ([{"role": "system", "content": "Be kind."}, USER], "Be kind.\n\n"),
    ):
        asked = chat(messages=messages, tools=[tool()])
        assert asked.messages is not None
        system, user = as_text(asked.messages, asked.chat.tools)
        assert system.role == "system"
        assert system.content.startswith(f"{before}You can call functions.")
        assert json.dumps(tool(), separators=(",", ":")) in system.content
        assert "<tool_call>" in system.content
        assert user == Message("user", "hi")


def test_calls_and_their_answers_are_told_as_text() -> None:
    asked = chat(messages=[USER, CALLING | {"content": "Wait."}, ANSWER])
    assert asked.messages is not None
    user, calling, answer = as_text(asked.messages, ())
    assert user == Message("user", "hi")
    made = '<tool_call>\n{"name": "look_up", "arguments": {"word":"x"}}\n</tool_call>'
    assert calling == Message("assistant", f"Wait.\n{made}")
    assert answer == Message("user", "<tool_response>\nfound\n</tool_response>")
    assert as_text([Message("user", "hi")], ()) == (Message("user", "hi"),)


def test_pieces_are_gathered() -> None:
    pieces = [
        TextPiece("I "), TextPiece("ask."), CallBegun(0, "c0", "f"), CallArguments(0, '{"a"'),
        CallArguments(0, ":1}"), CallBegun(1, "c1", "g"), CallArguments(1, "{}"),
    ]  # fmt: skip
    calls = (ToolCall("c0", "f", '{"a":1}'), ToolCall("c1", "g", "{}"))
    assert gathered(pieces) == ("I ask.", calls)
