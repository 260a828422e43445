"""What the answer must look like: response_format, guided_*, structured_outputs; and logit_bias.

Here a constraint's form is checked: its kind, its size, and that there is only one. Whether a
schema, pattern or grammar makes sense is for ``jlorax.structured`` to say.
"""

from __future__ import annotations

from collections.abc import Mapping

from jlorax.errors import InvalidParameter
from jlorax.types import MAX_LOGIT_BIASES, Constraint, ConstraintKind
from jlorax.wire.fields import Fields
from jlorax.wire.strict_json import MalformedBody, dumps, kind_of, parse_object

MAX_CONSTRAINT_CHARS = 131_072
MAX_CHOICES = 1024
MAX_LOGIT_BIAS = 100.0

ANY_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')

NamedConstraint = tuple[str, Constraint] | tuple[None, None]

_TEXT = ("text", "Text")  # LoRAX spells its types both ways
_JSON_OBJECT = ("json_object", "JsonObject")
_JSON_SCHEMA = ("json_schema", "JsonSchema")


def parse_constraint(fields: Fields) -> NamedConstraint:
    """The one constraint of an OpenAI or vLLM body; None for free text."""
    return named_one({"response_format": parse_response_format(fields), **parse_guided(fields)})


def named_one(given: Mapping[str, Constraint | None]) -> NamedConstraint:
    """The constraint that is there, with its field's name; InvalidParameter for a second one."""
    found = {name: constraint for name, constraint in given.items() if constraint is not None}
    if len(found) > 1:
        first, second, *_ = found
        raise InvalidParameter(second, f"excludes `{first}`: an answer has one constraint")
    return next(iter(found.items()), (None, None))


def only_one(given: Mapping[str, Constraint | None]) -> Constraint | None:
    return named_one(given)[1]


def parse_response_format(fields: Fields) -> Constraint | None:
    """OpenAI's ``{type, json_schema: {schema}}`` or LoRAX's ``{type, schema}``; None for text."""
    return parse_format(fields, "response_format")


def parse_format(fields: Fields, name: str) -> Constraint | None:
    given = fields.mapping(name)
    if given is None:
        return None
    form = fields.inside(name, given)
    kind = form.text("type", max_chars=64)
    schema = _form_schema(form)
    for unknown in form.unknown():  # a constraint that is not understood would be lost
        form.refuse(unknown)
    if kind is None:
        if any(value is not None for value in given.values()):
            raise form.wrong("type", "is missing: text, json_object or json_schema")
        return None
    if kind in _TEXT:
        if schema is not None:
            raise form.wrong("type", f"is {kind!r}, which takes no schema")
        return None
    if kind in _JSON_OBJECT:
        return schema or ANY_OBJECT
    if kind not in _JSON_SCHEMA:
        raise form.wrong("type", f"must be text, json_object or json_schema. Given: {kind!r}")
    if schema is None:
        raise form.wrong("type", f"is {kind!r}, but there is no schema")
    return schema


def _form_schema(form: Fields) -> Constraint | None:
    """The schema, nested or beside the type, there also as TGI's ``value``, which huggingface_hub
    sends. ``strict`` changes nothing: an answer always follows it."""
    beside = only_one({n: json_schema(form, n) for n in ("schema", "value")})
    nested = form.mapping("json_schema")
    named = form if nested is None else form.inside("json_schema", nested)
    named.text("name", max_chars=64)
    named.text("description", max_chars=MAX_CONSTRAINT_CHARS)
    named.flag("strict")
    if nested is None:
        return beside
    schema = json_schema(named, "schema")
    if schema is None:
        raise named.wrong("schema", "must be an object: a JSON schema")
    if beside is not None:
        raise form.wrong("schema", "is given twice, also in `json_schema`")
    return schema


def parse_guided(fields: Fields) -> dict[str, Constraint | None]:
    """vLLM's guided_json, guided_regex, guided_choice and guided_grammar, and the newer
    structured_outputs ``{json | regex | choice | grammar | json_object}``, by their names."""
    for name in ("guided_whitespace_pattern", "guided_decoding_backend"):
        fields.refuse(name, "", "auto")
    newer = fields.inside("structured_outputs", fields.mapping("structured_outputs") or {})
    found = {
        "guided_json": json_schema(fields, "guided_json"),
        "guided_regex": regex(fields, "guided_regex"),
        "guided_choice": choice(fields, "guided_choice"),
        "guided_grammar": grammar(fields, "guided_grammar"),
        "structured_outputs.json": json_schema(newer, "json"),
        "structured_outputs.regex": regex(newer, "regex"),
        "structured_outputs.choice": choice(newer, "choice"),
        "structured_outputs.grammar": grammar(newer, "grammar"),
        "structured_outputs.json_object": ANY_OBJECT if newer.flag("json_object") else None,
    }
    for name in newer.unknown():
        newer.refuse(name, False, "", [])
    return found


def json_schema(fields: Fields, name: str) -> Constraint | None:
    """A JSON schema: an object, or its JSON text. The order of its properties is kept."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = _parsed_schema(fields, name, value)
    if not isinstance(value, dict):
        raise fields.wrong(name, f"must be an object: a JSON schema, not {kind_of(value)}")
    return _constraint(fields, name, ConstraintKind.JSON_SCHEMA, dumps(value))


def _parsed_schema(fields: Fields, name: str, text: str) -> object:
    _check_length(fields, name, text)
    try:
        return parse_object(text.encode())
    except MalformedBody as error:
        raise fields.wrong(name, f"is no JSON schema as text: {error}") from None


def regex(fields: Fields, name: str) -> Constraint | None:
    return _of_text(fields, name, ConstraintKind.REGEX)


def grammar(fields: Fields, name: str) -> Constraint | None:
    return _of_text(fields, name, ConstraintKind.GRAMMAR)


def choice(fields: Fields, name: str) -> Constraint | None:
    """A list of strings, of which the answer is one."""
    values = fields.items(name)
    if not values:
        return None
    if len(values) > MAX_CHOICES:
        raise fields.wrong(name, f"may hold at most {MAX_CHOICES} choices, not {len(values)}")
    for value in values:
        if not isinstance(value, str):
            raise fields.wrong(name, f"must hold strings, not {kind_of(value)}")
        if not value:
            raise fields.wrong(name, "holds an empty string")
    return _constraint(fields, name, ConstraintKind.CHOICE, dumps(values))


def _of_text(fields: Fields, name: str, kind: ConstraintKind) -> Constraint | None:
    text = fields.text(name)
    return _constraint(fields, name, kind, text) if text else None


def _constraint(fields: Fields, name: str, kind: ConstraintKind, source: str) -> Constraint:
    _check_length(fields, name, source)
    return Constraint(kind, source)


def _check_length(fields: Fields, name: str, source: str) -> None:
    if len(source) > MAX_CONSTRAINT_CHARS:
        raise fields.wrong(
            name, f"may have at most {MAX_CONSTRAINT_CHARS} characters, not {len(source)}"
        )


def parse_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """OpenAI's ``{"token id": bias}``: at most 300 ids, biases in [-100, 100]."""
    given = fields.mapping("logit_bias") or {}
    if len(given) > MAX_LOGIT_BIASES:
        raise fields.wrong(
            "logit_bias", f"may hold at most {MAX_LOGIT_BIASES} tokens, not {len(given)}"
        )
    return tuple(_bias(fields, key, given, vocab_size) for key in given)


def _bias(
    fields: Fields, key: str, given: Mapping[str, object], vocab_size: int
) -> tuple[int, float]:
    digits = key if len(key) <= 10 and key.isascii() and key.isdigit() else ""
    if not digits or str(int(digits)) != digits or int(digits) >= vocab_size:
        raise fields.wrong(
            "logit_bias",
            f"has the key {key[:32]!r}, but keys are token ids from 0 to {vocab_size - 1}",
        )
    bias = Fields(given, prefix="logit_bias at ").number(key, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    if bias is None:
        raise fields.wrong("logit_bias", f"at {key} must be a number, not null")
    return int(digits), bias
