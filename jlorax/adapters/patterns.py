"""Matches a module's name with an adapter's regular expression, in bounded time.

``re`` backtracks: "(a+)+$" in somebody's adapter_config.json would hold the interpreter for hours.
PEFT only asks whether a whole name matches, and for that it is enough to carry the *set* of
positions that each part can end at (Thompson's construction, https://swtch.com/~rsc/regexp/).
What needs more than that (backreferences, possessive repeats, inline flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

# The parser behind re.compile. Private, but unchanged from 3.11 to 3.14; tests compare with re.
from re import _constants as _c  # type: ignore[attr-defined]  # isort: skip
from re import _parser  # type: ignore[attr-defined]  # isort: skip

MAX_PATTERN_CHARS = 16_384
MAX_REPEAT_DEPTH = 3

_Positions = frozenset[int]
_Step = Callable[[str, _Positions], _Positions]
_NONE: _Positions = frozenset()

# Words and dots only: cannot backtrack, and the usual keys of rank_pattern.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


class PatternRefused(ValueError):
    """The expression is wrong, or needs what we do not offer; says which."""


def matches_whole(pattern: str, name: str) -> bool:
    """re.fullmatch(pattern, name) is not None."""
    return len(name) in _compile(pattern)(name, frozenset((0,)))


def matches_suffix(pattern: str, name: str) -> bool:
    r"""re.match(rf"(.*\.)?({pattern})$", name) is not None: PEFT's get_pattern_key."""
    whole = rf"(.*\.)?({pattern})$"
    if len(pattern) <= MAX_PATTERN_CHARS and _PLAIN.fullmatch(pattern):
        return re.match(whole, name) is not None
    return bool(_compile(whole)(name, frozenset((0,))))


@lru_cache(maxsize=256)
def _compile(pattern: str) -> _Step:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternRefused(f"has {len(pattern)} characters, more than {MAX_PATTERN_CHARS}")
    try:
        tree = _parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE.value:
            raise PatternRefused(f"{pattern!r} sets inline flags")
        return _sequence(tree, 0)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternRefused(f"{pattern!r} is not a regular expression: {error}") from error


def _sequence(nodes: Iterable[tuple[Any, Any]], depth: int) -> _Step:
    steps = [_node(op, argument, depth) for op, argument in nodes]

    def step(name: str, at: _Positions) -> _Positions:
        for part in steps:
            at = part(name, at)
            if not at:
                break
        return at

    return step


def _node(op: Any, argument: Any, depth: int) -> _Step:
    if op in (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN):
        return _character(op, argument)
    if op is _c.AT:
        return _anchor(argument)
    if op is _c.SUBPATTERN:
        _, add_flags, del_flags, body = argument
        if not add_flags and not del_flags:
            return _sequence(body, depth)
    if op is _c.BRANCH:
        return _branch([_sequence(body, depth) for body in argument[1]])
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT):
        least, most, body = argument
        return _repeat(least, most, body, depth + 1)
    if op in (_c.ASSERT, _c.ASSERT_NOT):
        return _look(argument, op is _c.ASSERT, depth)
    raise PatternRefused(f"uses {str(op).lower()}, which is not supported in an adapter")


def _character(op: Any, argument: Any) -> _Step:
    accepts = _accepts(op, argument)

    def step(name: str, at: _Positions) -> _Positions:
        return frozenset(p + 1 for p in at if p < len(name) and accepts(name[p]))

    return step


def _accepts(op: Any, argument: Any) -> Callable[[str], bool]:
    if op is _c.ANY:
        return lambda char: char != "\n"
    if op is _c.LITERAL:
        return lambda char: ord(char) == argument
    if op is _c.NOT_LITERAL:
        return lambda char: ord(char) != argument
    if op is _c.RANGE:
        return lambda char: argument[0] <= ord(char) <= argument[1]
    if op is _c.CATEGORY:
        return _category(argument)
    if op is _c.IN:
        negate = bool(argument) and argument[0][0] is _c.NEGATE
        members = [_accepts(o, a) for o, a in argument[negate:]]
        return lambda char: any(member(char) for member in members) != negate
    raise PatternRefused(f"uses {str(op).lower()}, which is not supported in an adapter")


def _category(which: Any) -> Callable[[str], bool]:
    classes = {
        _c.CATEGORY_DIGIT: r"\d",
        _c.CATEGORY_NOT_DIGIT: r"\D",
        _c.CATEGORY_SPACE: r"\s",
        _c.CATEGORY_NOT_SPACE: r"\S",
        _c.CATEGORY_WORD: r"\w",
        _c.CATEGORY_NOT_WORD: r"\W",
    }
    one = re.compile(classes[which])
    return lambda char: one.match(char) is not None


def _anchor(where: Any) -> _Step:
    names = {
        _c.AT_BEGINNING: "^",
        _c.AT_BEGINNING_STRING: r"\A",
        _c.AT_END: "$",
        _c.AT_END_STRING: r"\Z",
        _c.AT_BOUNDARY: r"\b",
        _c.AT_NON_BOUNDARY: r"\B",
    }
    here = re.compile(names[where])
    return lambda name, at: frozenset(p for p in at if here.match(name, p) is not None)


def _branch(branches: list[_Step]) -> _Step:
    return lambda name, at: _NONE.union(*(branch(name, at) for branch in branches))


def _repeat(least: int, most: int, body: Any, depth: int) -> _Step:
    if depth > MAX_REPEAT_DEPTH:
        raise PatternRefused(f"nests repeats more than {MAX_REPEAT_DEPTH} deep")
    once = _sequence(body, depth)

    def step(name: str, at: _Positions) -> _Positions:
        for _ in range(least):
            following = once(name, at)
            if following == at or not following:
                at = following
                break
            at = following
        reached, frontier = set(at), at
        for _ in range(most - least):
            frontier = once(name, frontier) - reached
            if not frontier:
                break
            reached |= frontier
        return frozenset(reached)

    return step


def _look(argument: Any, wanted: bool, depth: int) -> _Step:
    direction, body = argument
    back = body.getwidth()[0] if direction < 0 else 0  # re itself demands a fixed width there
    inside = _sequence(body, depth + 1)

    def holds(name: str, p: int) -> bool:
        if p < back:
            return False
        ends = inside(name, frozenset((p - back,)))
        return p in ends if back or direction < 0 else bool(ends)

    return lambda name, at: frozenset(p for p in at if holds(name, p) == wanted)
