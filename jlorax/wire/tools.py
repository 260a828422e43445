"""The tools that a request offers, and how a chat template without tools gets to know of them.

Chat completions nest a tool's parts under ``function``, responses have them side by side; both
become OpenAI's nested object, which is what chat templates read.

A template that reads no ``tools`` gets them in the style of the Hermes models: a system message
with their signatures, calls as ``<tool_call>{"name", "arguments"}</tool_call>`` in the assistant's
text, and answers as ``<tool_response>`` of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlorax.wire.call import Message, ToolCall, ToolChoice, ToolMode, parse_function_name
from jlorax.wire.fields import Fields
from jlorax.wire.strict_json import dumps, kind_of

MAX_TOOLS = 128
MAX_TOOL_CHARS = 65_536
_NO_PARAMETERS = {"type": "object", "properties": {}}

Tools = tuple[Mapping[str, Any], ...]


def parse_tools(fields: Fields) -> Tools:
    """``tools`` of a chat completion: ``{type: "function", function: {name, ...}}``."""
    return _parse_each(fields, lambda tool: tool.inside("function", tool.get("function")))


def parse_flat_tools(fields: Fields) -> Tools:
    """``tools`` of a response: ``{type: "function", name, ...}``."""
    return _parse_each(fields, lambda tool: tool)


def _parse_each(fields: Fields, function_of: Callable[[Fields], Fields]) -> Tools:
    values = fields.items("tools") or []
    if len(values) > MAX_TOOLS:
        raise fields.wrong("tools", f"may hold at most {MAX_TOOLS} tools, not {len(values)}")
    tools: dict[str, Mapping[str, Any]] = {}
    for place, value in enumerate(values):
        tool = fields.inside(f"tools[{place}]", value)
        kind = tool.get("type")
        if kind != "function":
            raise tool.wrong("type", f"must be 'function'. Given: {str(kind)[:64]!r}")
        function = _parse_function(function_of(tool))
        if function["name"] in tools:
            raise fields.wrong("tools", f"has two functions named {function['name']!r}")
        tools[function["name"]] = {"type": "function", "function": function}
    return tuple(tools.values())


def _parse_function(fields: Fields) -> dict[str, Any]:
    """``strict`` changes nothing: arguments that are constrained always follow the schema."""
    fields.flag("strict")
    description = fields.text("description", max_chars=MAX_TOOL_CHARS)
    parameters = fields.mapping("parameters") or _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise fields.wrong("parameters", "must be the JSON schema of an object")
    if (size := len(dumps(parameters))) > MAX_TOOL_CHARS:
        raise fields.wrong("parameters", f"may have {MAX_TOOL_CHARS} characters, not {size}")
    described = {} if description is None else {"description": description}
    return {"name": parse_function_name(fields), **described, "parameters": parameters}


def parse_tool_choice(fields: Fields, tools: Tools) -> ToolChoice:
    """auto, none, required; ``{type: "function", function: {name}}`` or, as in responses, ``{type,
    name}``; and LoRAX's plain name of a tool."""
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if fields.get(old) not in (None, [], "none", "auto"):
            raise fields.wrong(old, f"is OpenAI's old word: use `{new}`")
    names = [tool["function"]["name"] for tool in tools]
    parallel = fields.flag("parallel_tool_calls", default=True)
    given = fields.get("tool_choice")
    if given is None or given in tuple(mode.value for mode in ToolMode):
        mode = ToolMode.AUTO if given is None else ToolMode(given)
        if mode is ToolMode.REQUIRED and not names:
            raise fields.wrong("tool_choice", "is 'required', but there are no `tools`")
        return ToolChoice(mode, parallel=parallel)
    name = given if isinstance(given, str) else _chosen_name(fields, given)
    if name not in names:
        raise fields.wrong("tool_choice", f"names {name[:64]!r}, which is not among the `tools`")
    return ToolChoice(ToolMode.REQUIRED, name, parallel=False)


def _chosen_name(fields: Fields, given: object) -> str:
    if not isinstance(given, dict):
        raise fields.wrong(
            "tool_choice",
            f"must be auto, none, required or name a function, not {kind_of(given)}",
        )
    choice = fields.inside("tool_choice", given)
    if choice.get("type") != "function":
        raise choice.wrong("type", f"must be 'function'. Given: {str(given.get('type'))[:64]!r}")
    nested = choice.get("function")
    return parse_function_name(choice if nested is None else choice.inside("function", nested))


def offered(tools: Tools, choice: ToolChoice) -> Tools:
    """What the model gets to see: nothing when it must not call."""
    return () if choice.mode is ToolMode.NONE else tools


# For templates that know no tools.


def as_text(messages: Sequence[Message], tools: Tools) -> tuple[Message, ...]:
    """The same conversation in system, user and assistant messages alone."""
    told = [_told(message) for message in messages]
    if not tools:
        return tuple(told)
    system, rest = (told[0].content, told[1:]) if told[0].role == "system" else ("", told)
    introduction = f"{system}\n\n{_introduction(tools)}" if system else _introduction(tools)
    return (Message("system", introduction), *rest)


def _told(message: Message) -> Message:
    if message.tool_call_id is not None:
        answer = f"<tool_response>\n{message.content}\n</tool_response>"
        return Message("user", answer)
    calls = [
        f'<tool_call>\n{{"name": {dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
        for call in message.tool_calls
    ]
    content = "\n".join([message.content, *calls] if message.content else calls)
    return replace(message, content=content, tool_calls=()) if calls else message


def _introduction(tools: Tools) -> str:
    signatures = "\n".join(dumps(tool) for tool in tools)
    return (
        "You can call functions. Their signatures are between <tools> and </tools>:\n"
        f"<tools>\n{signatures}\n</tools>\n"
        "To call one, answer with its name and its arguments as JSON in these tags, a pair of tags "
        "for each call:\n"
        '<tool_call>\n{"name": "function-name", "arguments": {"argument": "value"}}\n</tool_call>'
    )


# What an answer is made of, when it may call tools.


@dataclass(frozen=True)
class TextPiece:
    text: str


@dataclass(frozen=True)
class CallBegun:
    """The answer's call number ``place`` begins; its arguments follow."""

    place: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    place: int
    text: str


Piece = TextPiece | CallBegun | CallArguments


def gathered(pieces: Iterable[Piece]) -> tuple[str, tuple[ToolCall, ...]]:
    """The text outside of calls, and the calls."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case TextPiece(text):
                content += text
            case CallBegun(_, call_id, name):
                calls.append(ToolCall(call_id, name, ""))
            case CallArguments(place, text):
                calls[place] = replace(calls[place], arguments=calls[place].arguments + text)
    return content, tuple(calls)
