"""OpenAI's /v1/responses, in: items and instructions become a chat.

Stateless. Nothing is stored, so what refers to something stored is refused by its name; ``store``
is OpenAI's default and has no effect, and the answer says false. Instructions and the system
messages that the input begins with become one system message, since many chat templates take no
more. Beside OpenAI's fields, the sampling fields of the other /v1 routes are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jlorax.wire.call import (
    MAX_TOP_LOGPROBS,
    Call,
    Limits,
    Message,
    Presentation,
    ToolCall,
    ToolChoice,
    name_tool_messages,
    parse_arguments,
    parse_content,
    parse_function_name,
)
from jlorax.wire.constraints import NamedConstraint, named_one, parse_format, parse_guided
from jlorax.wire.fields import Fields
from jlorax.wire.openai import answer_model, parse_chat_options, parse_model, parse_request
from jlorax.wire.strict_json import kind_of
from jlorax.wire.tools import parse_flat_tools, parse_tool_choice

MAX_ITEMS = 4096
MAX_INSTRUCTIONS_CHARS = 1_000_000
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")
_STORED = {
    "previous_response_id": "send the earlier items in `input`",
    "conversation": "send the earlier items in `input`",
    "background": "it answers while the connection is open",
    "prompt": "send its text in `instructions`",
}


@dataclass(frozen=True)
class ResponseCall:
    """A call, and what of the request the answer repeats."""

    call: Call
    echo: Mapping[str, Any]


def parse_response(body: Mapping[str, Any], limits: Limits) -> ResponseCall:
    fields = Fields(body)
    model = parse_model(fields)
    _refuse(fields)
    logprobs = _parse_include(fields)
    num_top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    constrained_by, constraint = _parse_constraint(fields)
    request = parse_request(
        fields, model, limits, num_top_logprobs, constraint, ("max_output_tokens",)
    )
    tools = parse_flat_tools(fields)
    choice = parse_tool_choice(fields, tools)
    instructions = fields.text("instructions", max_chars=MAX_INSTRUCTIONS_CHARS)
    call = Call(
        requests=(request,),
        messages=_parse_input(fields, instructions),
        chat=replace(parse_chat_options(fields), tools=tools),
        tool_choice=choice,
        constraint_field=constrained_by,
        show=Presentation(stream=fields.flag("stream"), logprobs=logprobs or num_top_logprobs > 0),
        model=answer_model(request, limits),
    )
    echo = {
        "instructions": instructions,
        "max_output_tokens": request.max_new_tokens,
        "metadata": fields.mapping("metadata") or {},
        "parallel_tool_calls": choice.parallel,
        "temperature": request.sampling.temperature,
        "text": {"format": (fields.mapping("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": _shown_choice(choice),
        "tools": [_shown_tool(tool) for tool in tools],
        "top_logprobs": num_top_logprobs,
        "top_p": request.sampling.top_p,
        "user": fields.get("user"),
    }
    return ResponseCall(replace(call, unknown_fields=fields.unknown()), echo)


def _refuse(fields: Fields) -> None:
    for name, instead in _STORED.items():
        if fields.get(name) not in (None, False):
            raise fields.wrong(name, f"needs what this server does not keep: {instead}")
    fields.refuse("truncation", "disabled")
    fields.refuse("reasoning", {})
    fields.refuse("context_management", [])
    fields.refuse("max_tool_calls")
    fields.refuse("chat_template")
    options = fields.inside("stream_options", fields.mapping("stream_options") or {})
    options.refuse("include_obfuscation", False)


def _parse_include(fields: Fields) -> bool:
    """Whether log-probabilities are asked for."""
    values = fields.items("include") or []
    for value in values:
        if value != _LOGPROBS:
            raise fields.wrong("include", f"may hold {_LOGPROBS!r}, not {str(value)[:64]!r}")
    return bool(values)


def _parse_constraint(fields: Fields) -> NamedConstraint:
    text = fields.inside("text", fields.mapping("text") or {})
    text.refuse("verbosity", "medium")
    return named_one({"text.format": parse_format(text, "format"), **parse_guided(fields)})


def _parse_input(fields: Fields, instructions: str | None) -> tuple[Message, ...]:
    given = fields.get("input")
    if given in (None, "", []):
        raise fields.wrong("input", "cannot be empty")
    messages = [] if instructions is None else [Message("system", instructions)]
    if isinstance(given, str):
        return (*messages, Message("user", given))
    if not isinstance(given, list):
        raise fields.wrong("input", f"must be a string or a list of items, not {kind_of(given)}")
    if len(given) > MAX_ITEMS:
        raise fields.wrong("input", f"may hold at most {MAX_ITEMS} items, not {len(given)}")
    for place, value in enumerate(given):
        _join(messages, _parse_item(fields.inside(f"input[{place}]", value)))
    return name_tool_messages(messages)


def _join(messages: list[Message], message: Message) -> None:
    """Appends it, or adds it to the last: calls to the turn that makes them, and a system message
    to the system messages at the start."""
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant" and message.tool_calls:
        messages[-1] = replace(last, tool_calls=(*last.tool_calls, *message.tool_calls))
    elif last is not None and len(messages) == 1 and last.role == message.role == "system":
        messages[-1] = replace(last, content=f"{last.content}\n\n{message.content}")
    else:
        messages.append(message)


def _parse_item(item: Fields) -> Message:
    kind = item.text("type", max_chars=64)
    if kind in (None, "message"):
        return _parse_message(item)
    if kind == "function_call":
        call = ToolCall(_call_id(item), parse_function_name(item), parse_arguments(item))
        return Message("assistant", "", tool_calls=(call,))
    if kind == "function_call_output":
        output = Fields({"content": item.get("output")}, prefix="output of a call: ")
        return Message("tool", parse_content(output, _TEXT_PARTS), tool_call_id=_call_id(item))
    if kind == "item_reference":
        raise item.wrong("type", "is 'item_reference', but no items are stored: send it whole")
    raise item.wrong(
        "type", f"must be message, function_call or function_call_output. Given: {kind!r}"
    )


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _parse_message(item: Fields) -> Message:
    role = item.text("role", max_chars=64)
    if role not in _ROLES:
        raise item.wrong("role", f"must be one of {', '.join(_ROLES)}. Given: {role!r}")
    return Message(_ROLES[role], parse_content(item, _TEXT_PARTS))


def _call_id(item: Fields) -> str:
    call_id = item.text("call_id", max_chars=256)
    if not call_id:
        raise item.wrong("call_id", "must be a string")
    return call_id


def _shown_choice(choice: ToolChoice) -> object:
    if choice.name is not None:
        return {"type": "function", "name": choice.name}
    return choice.mode.value


def _shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "strict": True, **tool["function"]}
