"""JSON as we accept it and as we write it: strict in, always valid out.

Python's ``json`` is lenient where a server must not be: it keeps the last of two equal keys, reads
NaN, turns 1e400 into infinity, keeps lone surrogates, and recurses with the input.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jlorax.errors import InvalidRequest

MAX_DEPTH = 64

# Linear for every input: possessive, and an unterminated string swallows the rest, so no second
# start is ever tried inside it.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedBody(InvalidRequest):
    """The body is not one strict JSON object in UTF-8."""

    code = "malformed_json"


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """The body's JSON object, or MalformedBody with the place or the number that is wrong."""
    text = _decode(bytes(body))
    _check_depth(text)
    value = _loads(text)
    if not isinstance(value, dict):
        raise MalformedBody(f"the body must be a JSON object, not {kind_of(value)}")
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: object) -> str:
    """Compact JSON; ``finite`` has taken care of NaN and infinity before."""
    return _ENCODER.encode(value)


def finite(value: float | None) -> float | None:
    """NaN and infinities have no JSON: null, as LoRAX writes them."""
    return value if value is not None and math.isfinite(value) else None


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    names = {float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not valid UTF-8 at byte {error.start}") from None


def _check_depth(text: str) -> None:
    """Peels one level of brackets a pass, so that no input makes the parser recurse deeply."""
    brackets = _NOT_BRACKET.sub("", _STRING.sub("", text)).replace("{", "[").replace("}", "]")
    for _ in range(MAX_DEPTH):
        peeled = brackets.replace("[]", "")
        if len(peeled) == len(brackets):
            break
        brackets = peeled
    unclosed = len(brackets)  # of a few, the parser itself can say where
    if unclosed > MAX_DEPTH or "[]" in brackets:
        raise MalformedBody(
            f"the JSON is nested deeper than {MAX_DEPTH} levels or its brackets do not balance"
        )


def _loads(text: str) -> object:
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_bounded_float,
        )
    except MalformedBody:
        raise
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise MalformedBody(f"the body is not valid JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # integers of more than 4300 digits
        raise MalformedBody(f"the body is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedBody(f"the key {key[:64]!r} is given twice in one object")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> float:
    raise MalformedBody(f"{name} is not a JSON number")


def _bounded_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedBody(f"the number {digits[:32]} does not fit a 64-bit float")
    return value


def _check_surrogates(value: object) -> None:
    for text in _strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise MalformedBody(f"a string holds the lone surrogate \\u{code:04x}") from None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
