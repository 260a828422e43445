"""Tool calls that are always well formed: a grammar of a model family's way to write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.structured.sources import json_rule, schema_rule
from jlorax.structured.tool_format import ToolFormat
from jlorax.types import Constraint, ConstraintKind

MAX_TOOLS = 128
MAX_PARALLEL_CALLS = 16  # a small model that cannot stop calling
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MAYBE_SPACE, _MAYBE_LINE = '" "?', r'"\n"?'
_NO_PARAMETERS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """``parameters``: a JSON schema of an object; None: it has none."""

    name: str
    parameters: Mapping[str, Any] | None = None


class ToolChoice(Enum):
    AUTO = "auto"  # text, or text and then calls
    REQUIRED = "required"  # calls alone


def tool_constraint(
    tools: Sequence[Tool],
    choice: ToolChoice | str,
    tool_format: ToolFormat,
    is_parallel: bool = True,
    answer: Constraint | None = None,
) -> Constraint:
    """``choice``: or the name of the one tool to call. ``is_parallel``: more than one call.

    Calls end the answer; with AUTO any text comes before them, and what follows a call's beginning
    is held to the schemas. ``answer``: what an answer that calls nothing must be, with AUTO; it is
    a JSON schema, and calls stand alone then. Raises InvalidParameter for tools that cannot be, for
    a choice of none of them, and for answers that could not be told from calls; what is wrong
    within a schema, compiling says.
    """
    _check(tools)
    _check_answer(answer, tool_format)
    if isinstance(choice, str):
        tools = [tool for tool in tools if tool.name == choice]
        if not tools:
            raise InvalidParameter("tool_choice", f"names {choice!r}, which is none of the tools")
    most = MAX_PARALLEL_CALLS if is_parallel else 1
    is_free = answer is None or choice is not ToolChoice.AUTO
    rules = [
        f"start: {_start(choice, tool_format) if is_free else _answered(tool_format)}",
        f"calls: {_calls(tool_format, most)}",
        "json: " + " | ".join(f"tool_{index}" for index in range(len(tools))),
    ]
    rules += [
        f"tool_{index}: {_call(tool, index, tool_format)}" for index, tool in enumerate(tools)
    ]
    if answer is not None and not is_free:
        rules.append(f"answer: {schema_rule(answer)}")
    elif choice is ToolChoice.AUTO:
        rules += _text(tool_format)
    return Constraint(ConstraintKind.GRAMMAR, "\n".join(rules))


def _start(choice: ToolChoice | str, tool_format: ToolFormat) -> str:
    opening = _mark(tool_format.opening, tool_format)
    if choice is not ToolChoice.AUTO:
        return f"{opening} calls"
    return "TEXT | opened calls" if tool_format.opening else "TEXT | calls"


def _answered(tool_format: ToolFormat) -> str:
    return f"answer | {_mark(tool_format.opening, tool_format)} calls"


def _check_answer(answer: Constraint | None, tool_format: ToolFormat) -> None:
    if answer is None:
        return
    if answer.kind is not ConstraintKind.JSON_SCHEMA:
        raise InvalidParameter("tools", "exclude another constraint than a JSON schema")
    if not tool_format.opening:
        raise InvalidParameter(
            "tools", "exclude a JSON schema of the answer: this model's calls are bare JSON too"
        )


def _text(tool_format: ToolFormat) -> list[str]:
    """The text before calls. It ends where their opening begins, for it is matched lazily."""
    opening = tool_format.opening
    if not opening:
        return [r"TEXT: /([^{](.|\n)*)?/"]
    any_text = r"TEXT: /(.|\n)*/"
    if opening in tool_format.special:
        return [any_text, f"opened: TEXT {_mark(opening, tool_format)}"]
    return [any_text, f"opened[lazy]: TEXT {json.dumps(opening)}"]


def _calls(tool_format: ToolFormat, most: int) -> str:
    """What follows the opening: one call, to ``most`` of them."""
    opening, end = (_mark(mark, tool_format) for mark in (tool_format.opening, tool_format.end))
    if tool_format.separator is None:
        call = f"{_MAYBE_LINE} json {_MAYBE_LINE} {end}"
        return call + _more(f"{_MAYBE_LINE} {opening} {call}", most)
    begin = f"{_MAYBE_SPACE} {json.dumps(tool_format.begin)}" if tool_format.begin else ""
    another = f"{json.dumps(tool_format.separator)} {_MAYBE_SPACE} json"
    return f"{begin} json{_more(another, most)} {end}"


def _more(call: str, most: int) -> str:
    return f" ({call}){{0,{most - 1}}}" if most > 1 else ""


def _mark(mark: str, tool_format: ToolFormat) -> str:
    if mark in tool_format.special:
        return f"<[{tool_format.special[mark]}]>"
    return json.dumps(mark) if mark else ""


def _call(tool: Tool, index: int, tool_format: ToolFormat) -> str:
    parameters = dict(_NO_PARAMETERS if tool.parameters is None else tool.parameters)
    # An id makes it a document of its own, so that its "#/$defs/..." are its own definitions; an
    # older draft, which its "$schema" would make it, knows no ids beside a "$ref".
    parameters.pop("$schema", None)
    arguments = {"$id": f"urn:tool:{index}", "type": "object"} | parameters
    return json_rule(
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, tool_format.arguments_key: arguments},
            "required": ["name", tool_format.arguments_key],
            "additionalProperties": False,
        }
    )


def _check(tools: Sequence[Tool]) -> None:
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise InvalidParameter("tools", f"has {len(tools)} items, but 1 to {MAX_TOOLS} are allowed")
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if not _NAME.fullmatch(tool.name):
            raise InvalidParameter(
                "tools", f"has the name {tool.name[:80]!r} at {index}: not {_NAME.pattern}"
            )
        if names.index(tool.name) != index:
            raise InvalidParameter("tools", f"has the name {tool.name!r} twice")
        if tool.parameters is not None and tool.parameters.get("type", "object") != "object":
            raise InvalidParameter("tools", f"has parameters that are no object: {tool.name!r}")
