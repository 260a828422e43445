"""Answers that may call tools: what constrains them, and how their tokens are read."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from jlorax.structured import tools as structured
from jlorax.structured.tool_format import ToolFormat, tool_format_of
from jlorax.structured.tool_parser import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentText,
    ToolCallParser,
)
from jlorax.tokenizer import Tokenizer
from jlorax.types import GenerateResult, Token
from jlorax.wire.call import Call, ToolChoice, ToolMode
from jlorax.wire.tools import CallArguments, CallBegun, Piece, TextPiece, offered
from servers.serving import ServedEngine


def has_tools(call: Call) -> bool:
    """Whether the answers may call."""
    return bool(offered(call.chat.tools, call.tool_choice))


def with_tools(engine: ServedEngine, call: Call) -> Call:
    """The call with its answers held to the tools' schemas, wherever they call, and to their own
    JSON schema where they may but do not."""
    if not has_tools(call):
        return call
    constraint = structured.tool_constraint(
        [_tool(tool["function"]) for tool in call.chat.tools],
        _choice(call.tool_choice),
        _format_of(engine),
        call.tool_choice.parallel,
        answer=call.requests[0].constraint,
    )
    requests = tuple(replace(request, constraint=constraint) for request in call.requests)
    return replace(call, requests=requests, constraint_field="tools")


class AnswerReader:
    """Splits one answer, token by token, into text and calls."""

    def __init__(self, engine: ServedEngine, call: Call) -> None:
        self.has_called = False
        self._format: ToolFormat | None = None
        if has_tools(call):
            self._format = _format_of(engine)
            names = [tool["function"]["name"] for tool in call.chat.tools]
            self._parser = ToolCallParser(self._format, names)

    def push(self, token: Token, *, is_last: bool) -> list[Piece]:
        """Without tools every token is a piece, also one that says nothing yet."""
        if self._format is None:
            return [TextPiece(token.text)]
        events = self._parser.push(self._format.text_of(token))
        if is_last:
            events += self._parser.finish()
        return [self._piece(event) for event in events if not isinstance(event, CallEnded)]

    def read(self, result: GenerateResult) -> list[Piece]:
        """A whole answer."""
        if self._format is None:
            return [TextPiece(result.text)]
        last = len(result.tokens) - 1
        return [
            piece
            for place, token in enumerate(result.tokens)
            for piece in self.push(token, is_last=place == last)
        ]

    def _piece(self, event: ContentText | CallStarted | ArgumentsPiece) -> Piece:
        match event:
            case ContentText(text):
                return TextPiece(text)
            case CallStarted(index, name):
                self.has_called = True
                return CallBegun(index, f"call_{uuid.uuid4().hex}", name)
            case ArgumentsPiece(index, text):
                return CallArguments(index, text)


def _tool(function: Mapping[str, Any]) -> structured.Tool:
    return structured.Tool(function["name"], function["parameters"])


def _choice(choice: ToolChoice) -> structured.ToolChoice | str:
    if choice.name is not None:
        return choice.name
    is_required = choice.mode is ToolMode.REQUIRED
    return structured.ToolChoice.REQUIRED if is_required else structured.ToolChoice.AUTO


def _format_of(engine: ServedEngine) -> ToolFormat:
    return tool_format_of(cast(Tokenizer, engine.tokenizer))
