"""Calls found in a text that comes in pieces."""

from __future__ import annotations

import random

import pytest

from jlorax.structured.tool_format import HERMES, LLAMA3, MISTRAL, ToolFormat
from jlorax.structured.tool_parser import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentText,
    ToolCallParser,
    ToolEvent,
)

NAMES = ("f", "g")


def call(index: int, name: str, arguments: str) -> list[ToolEvent]:
    return [CallStarted(index, name), ArgumentsPiece(index, arguments), CallEnded(index)]


def text(content: str) -> list[ToolEvent]:
    return [ContentText(content)]


F, G = '{"name": "f", "arguments": {"a": "}\\"{"}}', '{"name":"g","arguments":{}}'
F_CALL, G_CALL = call(0, "f", '{"a": "}\\"{"}'), call(1, "g", "{}")
P = '{"name": "f", "parameters": {"q": [1, {"r": 2}]}}'
P_CALL = call(0, "f", '{"q": [1, {"r": 2}]}')

CASES: list[tuple[ToolFormat, str, list[ToolEvent]]] = [
    (HERMES, "", []),
    (HERMES, "just text, {} and <tool> ", text("just text, {} and <tool> ")),
    (HERMES, f"<tool_call>\n{F}\n</tool_call>", F_CALL),
    (HERMES, f"<tool_call>{F}</tool_call><tool_call>{G}</tool_call>", F_CALL + G_CALL),
    (HERMES, f"a \n<tool_call>\n{F}\n</tool_call>\n", text("a \n") + F_CALL),
    (
        HERMES,
        f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>\n",
        F_CALL + G_CALL,
    ),
    (HERMES, f"<tool_call>{F}</tool_call>\nbye", F_CALL + text("\nbye")),
    (HERMES, f"<tool_call>{F}</tool_call>\n<tool", F_CALL + text("\n<tool")),
    (
        HERMES,  # the name does not come first
        '<tool_call>{"arguments": {"ü": 1}, "name": "f"}</tool_call>',
        call(0, "f", '{"ü": 1}'),
    ),
    # cut off
    (HERMES, "a <tool_cal", text("a <tool_cal")),
    (HERMES, '<tool_call>{"name": "f", "argu', text('<tool_call>{"name": "f", "argu')),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": [1, ',
        [CallStarted(0, "f"), ArgumentsPiece(0, '{"a": [1, ')],
    ),
    (HERMES, f"<tool_call>{F}</tool_c", F_CALL),
    (HERMES, f"<tool_call>{F[:-1]}", F_CALL),
    # no calls
    (HERMES, f"<tool_call>{F}", F_CALL),
    (HERMES, f"<tool_call>{F}, and", F_CALL + text(", and")),
    (HERMES, f'<tool_call>{F[:-1]}, "x": 1}}</tool_call>', F_CALL + text(', "x": 1}</tool_call>')),
    (
        HERMES,
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        text('<tool_call>{"name": "h", "arguments": {}}</tool_call>'),
    ),
    (HERMES, "<tool_call>no</tool_call>", text("<tool_call>no</tool_call>")),
    (HERMES, '<tool_call>{"name": "f"}', text('<tool_call>{"name": "f"}')),
    (HERMES, '<tool_call>{"name" "f"}', text('<tool_call>{"name" "f"}')),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        text('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
    ),
    (
        HERMES,
        f"<tool_call>no <tool_call>{F}</tool_call>",
        text("<tool_call>no ") + F_CALL,
    ),
    # Mistral
    (MISTRAL, f"x[TOOL_CALLS] [{F}, {G}]", text("x") + F_CALL + G_CALL),
    (MISTRAL, f"[TOOL_CALLS][{F}]\n", F_CALL),
    (MISTRAL, f"[TOOL_CALLS][{F}] bye", F_CALL + text(" bye")),
    (MISTRAL, "[TOOL_CALLS]no", text("[TOOL_CALLS]no")),
    (MISTRAL, "[TOOL_CALLS] [", text("[TOOL_CALLS] [")),
    (MISTRAL, f"[TOOL_CALLS][{F},]", F_CALL + text(",]")),
    # Llama 3
    (LLAMA3, P, P_CALL),
    (LLAMA3, f" {P}\n", P_CALL),
    (LLAMA3, f"{P}; {P}", P_CALL + call(1, "f", '{"q": [1, {"r": 2}]}')),
    (LLAMA3, f"{P} bye", P_CALL + text(" bye")),
    (LLAMA3, f"Hello {P}", text(f"Hello {P}")),
    (LLAMA3, '{"a": 1}', text('{"a": 1}')),
    (LLAMA3, "  ", text("  ")),
]


def parsed(tool_format: ToolFormat, pieces: list[str]) -> list[ToolEvent]:
    """Neighbours put together, as a reader of the stream does."""
    parser = ToolCallParser(tool_format, NAMES)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    joined: list[ToolEvent] = []
    for event in events:
        match (joined[-1] if joined else None), event:
            case ContentText(before), ContentText(after):
                joined[-1] = ContentText(before + after)
            case ArgumentsPiece(index, before), ArgumentsPiece(same, after) if index == same:
                joined[-1] = ArgumentsPiece(index, before + after)
            case _:
                joined.append(event)
    return joined


@pytest.mark.parametrize(("tool_format", "answer", "expected"), CASES)
def test_the_borders_of_pieces_never_matter(
    tool_format: ToolFormat, answer: str, expected: list[ToolEvent]
) -> None:
    assert parsed(tool_format, [answer]) == expected
    assert parsed(tool_format, list(answer)) == expected
    for seed in range(30):
        assert parsed(tool_format, cut(answer, random.Random(seed))) == expected


def cut(answer: str, chance: random.Random) -> list[str]:
    pieces = []
    while answer:
        length = chance.choice((1, 2, 3, 7, 20))
        pieces.append(answer[:length])
        answer = answer[length:]
    return pieces


def test_what_is_certain_is_told_at_once() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("Yes <to") == [ContentText("Yes ")]
    assert parser.push("day") == [ContentText("<today")]
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"a": ') == [CallStarted(0, "f"), ArgumentsPiece(0, '{"a": ')]
    assert parser.push('"x') == [ArgumentsPiece(0, '"x')]
    assert parser.push('"}') == [ArgumentsPiece(0, '"}'), CallEnded(0)]
    assert parser.push("}</tool_call>") == []
    assert parser.push(" <tool_call>no") == [ContentText("<tool_call>"), ContentText("no")]
    assert parser.finish() == []


@pytest.mark.timeout(30)  # minutes, if every piece had the call read from its beginning
def test_a_long_call_out_of_order_is_read_once() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    parser.push("<tool_call>")
    head = '{"arguments": {"a": "'
    for character in head + "x" * 50_000:
        assert parser.push(character) == []
    events = parser.push('"}, "name": "f"}</tool_call>')
    assert [type(event) for event in events] == [CallStarted, ArgumentsPiece, CallEnded]
