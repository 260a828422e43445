"""What a constraint's source says, checked and written as one text for llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import llguidance

from jlorax.errors import InvalidParameter
from jlorax.types import Constraint, ConstraintKind

MAX_SOURCE_BYTES = {
    ConstraintKind.JSON_SCHEMA: 128 << 10,
    ConstraintKind.REGEX: 16 << 10,
    ConstraintKind.CHOICE: 128 << 10,
    ConstraintKind.GRAMMAR: 256 << 10,  # the schemas of many tools
}

_ANY_JSON = {"type": ["object", "array"]}
_OPTIONS = "x-guidance"
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON on one line, with or without one space after a comma or a colon: as ``json.dumps`` writes
it, or compact. Where any whitespace is allowed, a model that is not sure of what follows may write
newlines until its tokens are spent (OpenAI warns of it for its JSON mode); here no run of them is
possible, and both habits that models have on one line stay."""

# The model cuts the text into tokens as it likes best. Forcing the tokenizer's own cut would run
# the tokenizer for every mask, over the whole of a forced text.
_OWN_TOKENS = '\n%llguidance {"no_forcing": true}\n'


def grammar_of(constraint: Constraint) -> str:
    """Lark, as llguidance reads it. Raises InvalidParameter, named as the constraint's kind."""
    try:
        num_bytes = len(constraint.source.encode())
    except UnicodeEncodeError:
        raise _refused(constraint, "holds half a character (a lone surrogate)") from None
    if num_bytes > MAX_SOURCE_BYTES[constraint.kind]:
        raise _refused(
            constraint,
            f"has {num_bytes} bytes, but at most {MAX_SOURCE_BYTES[constraint.kind]} are allowed",
        )
    return _WRITERS[constraint.kind](constraint) + _OWN_TOKENS


def _json_schema(constraint: Constraint) -> str:
    return f"start: {schema_rule(constraint)}"


def schema_rule(constraint: Constraint) -> str:
    """The text of a Lark rule for a constraint that is a JSON schema."""
    schema = _parsed(constraint)
    if not isinstance(schema, dict):
        raise _refused(constraint, f"is not a schema: it is {_kind(schema)}, not an object")
    if _OPTIONS in schema:
        raise _refused(constraint, f"may not set {_OPTIONS!r}")
    return json_rule(schema or _ANY_JSON)


def json_rule(schema: dict[str, Any]) -> str:
    """The text of a Lark rule for JSON of that schema. Its keys come in the schema's order.

    The schema is enforced as it stands, OpenAI's ``strict`` or not: what it leaves open (more
    properties, optional ones) is open, and what cannot be enforced is refused, never ignored.
    """
    return "%json " + json.dumps(schema | {_OPTIONS: JSON_STYLE})


def _regex(constraint: Constraint) -> str:
    """As Python's re reads it, but that a digit is one of 0 to 9: who asks for digits reads those.

    And ``\\w`` is Unicode's, which counts accents that stand alone as letters.
    """
    return f"start: /{llguidance.regex_to_lark(constraint.source, use_ascii='d')}/"


def _choice(constraint: Constraint) -> str:
    options = _parsed(constraint)
    if not isinstance(options, list) or not options:
        raise _refused(constraint, "is not a list of at least one string")
    for index, option in enumerate(options):
        if not isinstance(option, str):
            raise _refused(constraint, f"holds {_kind(option)} at index {index}, not a string")
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, options))


def _lark(constraint: Constraint) -> str:
    return constraint.source


_WRITERS: dict[ConstraintKind, Callable[[Constraint], str]] = {
    ConstraintKind.JSON_SCHEMA: _json_schema,
    ConstraintKind.REGEX: _regex,
    ConstraintKind.CHOICE: _choice,
    ConstraintKind.GRAMMAR: _lark,
}


def _parsed(constraint: Constraint) -> Any:
    try:
        return json.loads(constraint.source)
    except ValueError as error:
        raise _refused(constraint, f"is not JSON: {error}") from None
    except RecursionError:
        raise _refused(constraint, "is nested too deep") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), json.dumps(value))


def _refused(constraint: Constraint, message: str) -> InvalidParameter:
    return InvalidParameter(constraint.kind.value, message)
