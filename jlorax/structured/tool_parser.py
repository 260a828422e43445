"""Tool calls found in an answer's text while it grows.

content ── opening ──> head ── "{" of the arguments ──> arguments ── their "}" ──> tail
   ^                    │ no call of a tool                                         │
   └── it was content ──┴─────────────────── end mark ──────────────────────────────┘
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jlorax.structured.tool_format import ToolFormat


@dataclass(frozen=True)
class ContentText:
    text: str


@dataclass(frozen=True)
class CallStarted:
    """``index`` counts the answer's calls."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """The pieces of one call, put together, are its arguments as JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """Its arguments are whole. A call that is cut off has none of it."""

    index: int


ToolEvent = ContentText | CallStarted | ArgumentsPiece | CallEnded


class ToolCallParser:
    """Takes the answer's text in pieces of any size, and tells the same events for all of them.

    A call of none of ``names``, or one that is malformed before its arguments begin, comes back as
    content. From there on a call is told as it comes; a grammar may vouch for it. Blank text
    between calls is no content.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str]) -> None:
        self._format = tool_format
        self._names = frozenset(names)
        self._head_pattern = re.compile(
            r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"'
            + tool_format.arguments_key
            + r'"\s*:\s*(?=\{)'
        )
        self._text = ""  # not understood yet
        self._opened = ""  # what it took for the beginning of a call
        self._object_end = _ObjectEnd()
        self._num_calls = 0
        self._events: list[ToolEvent] = []
        self._state = self._content if tool_format.opening else self._beginning

    def push(self, text: str) -> list[ToolEvent]:
        self._text += text
        while self._state():
            pass
        return self._told()

    def finish(self) -> list[ToolEvent]:
        """The answer ends here: what was held back is content, unless a call had begun."""
        is_blank_between = self._state == self._between and not self._text.strip()
        if not is_blank_between and self._state not in (self._tail, self._ending):
            self._tell_content(self._opened + self._text)
        self._text = ""
        return self._told()

    # Each state understands what it can of the text, and says whether the next should go on.

    def _beginning(self) -> bool:
        """Of an answer in a format whose calls have no opening."""
        rest = self._text.lstrip()
        if not rest:
            return False
        return self._go(self._head if rest[0] == "{" else self._content)

    def _content(self) -> bool:
        opening = self._format.opening
        start = self._text.find(opening) if opening else -1
        if start >= 0:
            self._tell_content(self._taken(start))
            self._opened = self._taken(len(opening))
            return self._go(self._begin)
        self._tell_content(self._taken(len(self._text) - _num_begun(self._text, opening)))
        return False

    def _begin(self) -> bool:
        rest, begin = self._text.lstrip(), self._format.begin
        if begin and not rest:
            return False
        if not rest.startswith(begin):
            return self._was_content()
        if begin:
            self._opened += self._taken(len(self._text) - len(rest) + len(begin))
        return self._go(self._head)

    def _head(self) -> bool:
        head = self._head_pattern.match(self._text)
        if head is not None:
            if head[1] not in self._names:
                return self._was_content()
            self._taken(head.end())
            self._tell_start(head[1])
            return self._go(self._arguments)
        rest = self._text.lstrip()
        if rest and rest[0] != "{":
            return self._was_content()
        end = self._object_end.find(self._text)
        return end is not None and self._whole_call(end)

    def _whole_call(self, end: int) -> bool:
        """An object whose name does not come first is a call once all of it is there."""
        call = _parsed(self._text[:end])
        name, arguments = call.get("name"), call.get(self._format.arguments_key)
        if name not in self._names or not isinstance(arguments, dict):
            return self._was_content()
        self._taken(end)
        self._tell_start(name)
        self._tell_arguments(json.dumps(arguments, ensure_ascii=False))
        self._events.append(CallEnded(self._num_calls - 1))
        return self._go(self._ending)

    def _arguments(self) -> bool:
        end = self._object_end.find(self._text)
        self._tell_arguments(self._taken(len(self._text) if end is None else end))
        if end is None:
            self._object_end.num_read = 0
            return False
        self._events.append(CallEnded(self._num_calls - 1))
        return self._go(self._tail)

    def _tail(self) -> bool:
        """Of the object around the arguments."""
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] != "}":
            return self._go(self._content)
        self._taken(len(self._text) - len(rest) + 1)
        return self._go(self._ending)

    def _ending(self) -> bool:
        rest = self._text.lstrip()
        separator, end = self._format.separator, self._format.end
        if separator and rest.startswith(separator):
            self._opened = self._taken(len(self._text) - len(rest) + len(separator))
            return self._go(self._head)
        if end and rest.startswith(end):
            self._taken(len(self._text) - len(rest) + len(end))
            return self._go(self._between)
        if end.startswith(rest):  # of which it may be the beginning
            return False
        return self._go(self._content)

    def _between(self) -> bool:
        rest = self._text.lstrip()
        if self._format.opening.startswith(rest):
            return False
        if rest.startswith(self._format.opening):
            self._taken(len(self._text) - len(rest))
        return self._go(self._content)

    def _was_content(self) -> bool:
        self._tell_content(self._opened)
        self._opened = ""
        return self._go(self._content)

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        self._object_end = _ObjectEnd()
        return True

    def _taken(self, num_characters: int) -> str:
        taken, self._text = self._text[:num_characters], self._text[num_characters:]
        return taken

    def _tell_content(self, text: str) -> None:
        if text:
            self._events.append(ContentText(text))

    def _tell_start(self, name: str) -> None:
        self._opened = ""
        self._events.append(CallStarted(self._num_calls, name))
        self._num_calls += 1

    def _tell_arguments(self, text: str) -> None:
        if text:
            self._events.append(ArgumentsPiece(self._num_calls - 1, text))

    def _told(self) -> list[ToolEvent]:
        told, self._events = self._events, []
        return told


class _ObjectEnd:
    """Where the JSON object ends that a growing text begins with."""

    def __init__(self) -> None:
        self.num_read = 0
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """``text``: what was given before and more."""
        for position in range(self.num_read, len(text)):
            self._read(text[position])
            if self._depth == 0 and text[position] in "}]":
                return position + 1
        self.num_read = len(text)
        return None

    def _read(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1


def _num_begun(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for num in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:num]):
            return num
    return 0


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
