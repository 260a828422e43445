"""What an answer must look like, as the routes' fields say it; and biases of tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.types import Constraint, ConstraintKind
from jlorax.wire.constraints import MAX_CHOICES, MAX_CONSTRAINT_CHARS, parse_logit_bias
from jlorax.wire.fields import Fields
from tests.wire_calls import chat, completion

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
OF_SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, TEXT)
OF_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')

GOOD: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "Text", "schema": None}}, None),
    ({"response_format": {}}, None),
    ({"response_format": {"type": "json_object"}}, OF_OBJECT),
    ({"response_format": {"type": "json_object", "schema": None}}, OF_OBJECT),
    ({"response_format": {"type": "JsonObject", "schema": SCHEMA}}, OF_SCHEMA),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, OF_SCHEMA),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
            }
        },
        OF_SCHEMA,
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, OF_SCHEMA),
    ({"guided_json": SCHEMA}, OF_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
    ({"guided_json": {}}, Constraint(ConstraintKind.JSON_SCHEMA, "{}")),
    ({"guided_json": ""}, None),
    ({"guided_regex": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
    ({"guided_regex": ""}, None),
    ({"guided_choice": ["a", "b"]}, Constraint(ConstraintKind.CHOICE, '["a","b"]')),
    ({"guided_choice": []}, None),
    ({"guided_grammar": "start: x"}, Constraint(ConstraintKind.GRAMMAR, "start: x")),
    ({"guided_grammar": "", "guided_decoding_backend": "auto"}, None),
    ({"structured_outputs": {"json": SCHEMA}}, OF_SCHEMA),
    ({"structured_outputs": {"regex": "a"}}, Constraint(ConstraintKind.REGEX, "a")),
    ({"structured_outputs": {"choice": ["a"]}}, Constraint(ConstraintKind.CHOICE, '["a"]')),
    ({"structured_outputs": {"grammar": "g"}}, Constraint(ConstraintKind.GRAMMAR, "g")),
    ({"structured_outputs": {"json_object": True}}, OF_OBJECT),
    ({"structured_outputs": {"json_object": False, "disable_any_whitespace": False}}, None),
    ({"structured_outputs": {}}, None),
]


@pytest.mark.parametrize(("fields", "expected"), GOOD)
def test_a_constraint_is_read(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert completion(**fields).constraint == expected
    assert chat(**fields).requests[0].constraint == expected


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "`response_format` must be an object"),
    ({"response_format": {"type": "xml"}}, "must be text, json_object or json_schema. Given: 'xml"),
    ({"response_format": {"schema": SCHEMA}}, "`response_format.type` is missing"),
    ({"response_format": {"type": "text", "schema": {}}}, "takes no schema"),
    ({"response_format": {"type": "json_schema"}}, "there is no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema.schema`"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "JSON schema"),
    ({"response_format": {"type": "json_schema", "json_schema": []}}, "must be an object"),
    (
        {"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}}},
        "given twice",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {}, "strict": "yes"},
            }
        },
        "strict",
    ),
    ({"response_format": {"type": "structural_tag"}}, "structural_tag"),
    ({"guided_json": "{"}, "is no JSON schema as text"),
    ({"guided_json": "[1]"}, "is no JSON schema as text"),
    ({"guided_json": [1]}, "must be an object"),
    ({"guided_json": {"enum": ["x" * 100] * 2000}}, f"at most {MAX_CONSTRAINT_CHARS}"),
    ({"guided_regex": 3}, "`guided_regex` must be a string"),
    ({"guided_regex": "a" * (MAX_CONSTRAINT_CHARS + 1)}, "guided_regex"),
    ({"guided_choice": "a"}, "`guided_choice` must be a list"),
    ({"guided_choice": ["a", 1]}, "must hold strings"),
    ({"guided_choice": ["a", ""]}, "empty string"),
    ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, f"at most {MAX_CHOICES} choices"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ({"structured_outputs": []}, "must be an object"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json_object": 1}}, "json_object"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "excludes `guided_regex`"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "`structured_outputs.regex` excludes `response_format`",
    ),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "an answer has one constraint"),
]


@pytest.mark.parametrize(("fields", "says"), BAD)
def test_a_wrong_constraint_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    for parse in (completion, chat):
        with pytest.raises(InvalidParameter) as caught:
            parse(**fields)
        assert says in str(caught.value)
        assert len(str(caught.value)) < 300


def test_the_order_of_properties_is_kept() -> None:
    """It is the order in which they are written."""
    constraint = completion(guided_json=SCHEMA).constraint
    assert constraint is not None
    assert constraint.source.index('"b"') < constraint.source.index('"a"')


def test_biases_of_tokens() -> None:
    assert completion(logit_bias={"5": 1, "999": -100}).logit_bias == ((5, 1.0), (999, -100.0))
    assert completion(logit_bias={}).logit_bias == ()
    assert len(completion(logit_bias={str(i): 1 for i in range(300)}).logit_bias) == 300


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        ({str(i): 1 for i in range(301)}, "at most 300 tokens, not 301"),
        ({str(i): 1 for i in range(10**5)}, "not 100000"),
        ({"1000": 1}, "'1000', but keys are token ids from 0 to 999"),
        ({"-1": 1}, "'-1'"),
        ({"05": 1}, "'05'"),
        ({"x": 1}, "'x'"),
        ({"": 1}, "''"),
        ({"\u0665": 1}, "token ids"),
        ({"9" * 5000: 1}, "token ids"),
        ({"5": 101}, "<= 100.0. Given: 101"),
        ({"5": 1e9}, "Given: 1000000000.0"),
        ({"5": "1"}, "must be a number"),
        ({"5": None}, "not null"),
        ({"5": True}, "must be a number"),
        ([1], "must be an object"),
    ],
)
def test_wrong_biases_are_refused(bias: Any, says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_logit_bias(Fields({"logit_bias": bias}), vocab_size=1000)
    assert says in str(caught.value)
    assert "logit_bias" in str(caught.value)
    assert len(str(caught.value)) < 300
