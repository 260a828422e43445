"""Constraints that mean harm, or that nobody can mean: an answer in words, in time, every time."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.structured.grammar import GrammarCompiler
from jlorax.structured.sources import MAX_SOURCE_BYTES
from jlorax.tokenizer import Tokenizer
from jlorax.types import Constraint, ConstraintKind
from tests.structured.walks import allowed, choice, lark, regex, schema, spelled

MAX_WORK_S = 1.0  # of this thread; the trial's process has a limit of its own
Json = dict[str, Any]


def of(value: object) -> Constraint:
    return schema(json.dumps(value))


def nested(keyword: str, depth: int) -> Json:
    """2^depth times the same, by reference."""
    twice = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, depth + 1)}
    return {"$defs": {"d0": {"type": "string"}, **twice}, "$ref": f"#/$defs/d{depth}"}


def deep(depth: int) -> Json:
    inner: Json = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def references(length: int) -> Json:
    links = {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"{length}": {"type": "string"}}, "$ref": "#/$defs/0"}


def properties(count: int) -> Json:
    return {"type": "object", "properties": {f"p{i}": {} for i in range(count)}}


REFUSED = {
    # not schemas
    "broken JSON": (schema("{"), "is not JSON"),
    "a list": (schema("[]"), "is a list, not an object"),
    "a boolean": (schema("true"), "is true, not an object"),
    "100k brackets": (schema("[" * 100_000), "nested too deep"),
    "a word for a schema": (of({"properties": {"foo": "bar"}}), "schema must be an object"),
    "no such type": (of({"type": "bogus"}), "Invalid type: bogus"),
    "half a character": (schema('{"const": "\ud800"}'), "lone surrogate"),
    "our options": (of({"x-guidance": {"lenient": True}}), "may not set 'x-guidance'"),
    # schemas that are not served
    "not": (of({"not": {"type": "string"}}), r'Unimplemented keys: \["not"\]'),
    "if": (of({"if": {"type": "string"}, "then": {"minLength": 3}}), "Unimplemented keys"),
    "unique": (
        of({"type": "array", "uniqueItems": True}),
        r'Unimplemented keys: \["uniqueItems"\]',
    ),
    "one of": (of(nested("oneOf", 20)), "oneOf constraints are not supported"),
    "a format": (of({"type": "string", "format": "int32"}), "Unknown format: int32"),
    "no such pointer": (of({"$ref": "#/$defs/none"}), "Pointer '/\\$defs/none' does not exist"),
    "a pattern": (of({"type": "string", "pattern": "("}), "unclosed group"),
    # nothing follows them
    "no value": (of({"type": "string", "enum": [1]}), "Unsatisfiable"),
    "itself": (of({"$ref": "#"}), "admits no answer"),
    "empty range": (of({"type": "integer", "minimum": 5, "maximum": 4}), "minimum"),
    "empty class": (regex(r"[^\x00-\x{10FFFF}]"), "admits no answer"),
    "empty rule": (lark("start: start"), "admits no answer"),
    "a byte that no token has": (choice('["\\u0004"]'), "admits no answer"),
    # too much
    "200k strings": (of({"enum": [f"v{i}" for i in range(200_000)]}), "2088900 bytes, but at most"),
    "a long regex": (regex("a" * 20_000), "20000 bytes, but at most 16384"),
    "a long choice": (choice(json.dumps(["a" * 200_000])), "200004 bytes, but at most 131072"),
    "a long grammar": (lark('start: "' + "a" * 300_000 + '"'), "bytes, but at most 262144"),
    "400 levels": (of(deep(400)), "recursion limit exceeded"),
    "3000 references": (of(references(3000)), "nested too deep"),
    "8000 properties": (of(properties(8000)), "is too complex|cannot be used"),
    "a million remainders": (of({"type": "integer", "multipleOf": 1_000_003}), "over 0.5 s"),
    "3000 patterns": (
        of({"type": "object", "patternProperties": {f"^p{i:04d}$": {} for i in range(3000)}}),
        "over 0.5 s",
    ),
    "patterns at once": (
        of({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(100)]}),
        "over 0.5 s|too big|cannot be used",
    ),
    # regexes
    "unclosed": (regex("("), "regex parse error: unclosed group"),
    "back reference": (regex(r"(a)\1"), "backreferences are not supported"),
    "look behind": (regex("(?<=a)b"), "look-around"),
    "look ahead": (regex("(?=a)b"), "look-around"),
    "squared": (regex(".{0,99999}{0,99999}"), "too many expressions"),
    "cubed": (regex("((a{0,100}){0,100}){0,100}"), "too many expressions"),
    "optional 2000 times": (regex("a?" * 4000 + "a" * 4000), "is too complex|cannot be used"),
    "5000 parentheses": (regex("(" * 5000 + "a" + ")" * 5000), "nested parentheses"),
    # choices
    "no choice": (choice("[]"), "at least one string"),
    "no list": (choice('{"a": 1}'), "is not a list"),
    "a number": (choice('["a", 7]'), "holds 7 at index 1, not a string"),
    # grammars
    "no start": (lark('foo: "a"'), "no start rule"),
    "no grammar": (lark("start: %%%"), r"1\(9\)"),
    "another kind of grammar": (lark('{"grammars": [{"json_schema": {}}]}'), "cannot be used"),
    "a rule nowhere": (lark("start: @elsewhere"), "unknown grammar @elsewhere"),
    "50k parentheses": (lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000), "too deeply nested"),
    "10k options": (lark("start: " + " ".join(['("a"|"b")?'] * 10_000)), "is too complex"),
    "a schema in it": (lark('start: %json {"type": "bogus"}'), "Invalid type: bogus"),
}

BOUNDED = {
    "10k strings": of({"enum": [f"value{i}" for i in range(10_000)]}),
    "10^9 items": of({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "10^9 characters": of({"type": "string", "maxLength": 10**9}),
    "10^9 properties": of({"type": "object", "minProperties": 10**9}),
    "2^20 any": of(nested("anyOf", 20)),
    "2^20 all": of(nested("allOf", 20)),
    "40 levels": of(deep(40)),
    "200 references": of(references(200)),
    "itself within": of({"type": "object", "properties": {"child": {"$ref": "#"}}}),
    "no end": of({"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}),
    "a plus of a plus": regex("(a+)+$"),
    "backwards": regex("(.*a.{20}){3}"),
    "99999 characters": regex(".{0,99999}"),
    "words of words": regex(r"(\w{1,1000}\s){1,1000}"),
    "10k choices": choice(json.dumps([f"choice {i}" for i in range(7000)])),
    "2^40 letters": lark(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "x"'
    ),
}


@pytest.fixture
def budget() -> Any:
    begin_s = time.thread_time()
    yield
    assert time.thread_time() - begin_s < MAX_WORK_S


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_words(compiler: GrammarCompiler, name: str) -> None:
    constraint, words = REFUSED[name]
    with pytest.raises(InvalidParameter, match=words) as refusal:
        compiler.compile(constraint)
    message = str(refusal.value)
    assert refusal.value.name == constraint.kind.value
    assert len(message) < 400 and "\n" not in message and "llguidance" not in message


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("name", BOUNDED)
def test_it_costs_little_and_every_token_of_it_too(
    compiler: GrammarCompiler, smollm2: Tokenizer, name: str
) -> None:
    matcher = compiler.compile(BOUNDED[name]).matcher()
    for step in range(60):
        may = [i for i in allowed(matcher.mask()) if i not in smollm2.eos_token_ids]
        if matcher.is_dead or not may:
            break
        matcher.accept(int(may[step * 7919 % len(may)]))
        if matcher.is_finished:
            break


@pytest.mark.parametrize("kind", ConstraintKind)
def test_a_source_may_be_as_long_as_it_says(
    compiler: GrammarCompiler, kind: ConstraintKind
) -> None:
    frame = {
        ConstraintKind.JSON_SCHEMA: '{"const": "%s"}',
        ConstraintKind.REGEX: "%s",
        ConstraintKind.CHOICE: '["%s"]',
        ConstraintKind.GRAMMAR: 'start: "%s"',
    }[kind]
    room = MAX_SOURCE_BYTES[kind] - len(frame % "")
    compiler.compile(Constraint(kind, frame % ("a" * room)))
    with pytest.raises(InvalidParameter, match="bytes, but at most"):
        compiler.compile(Constraint(kind, frame % ("ü" * (room // 2 + 1))))


def test_a_reference_elsewhere_is_refused_and_never_fetched(compiler: GrammarCompiler) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for source in ({"$ref": url}, {"$id": url, "items": {"$ref": "other.json"}}):
            with pytest.raises(InvalidParameter, match="is not present in a registry"):
                compiler.compile(of(source))
        with pytest.raises(InvalidParameter, match="is not present in a registry"):
            compiler.compile(of({"$ref": "file:///etc/passwd"}))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_schema_that_refers_to_itself_is_served(
    compiler: GrammarCompiler, smollm2: Tokenizer
) -> None:
    grammar = compiler.compile(BOUNDED["itself within"])
    assert spelled(smollm2, grammar, '{"child": {"child": {}}}') == (True, True)


def test_a_grammars_refusal_says_where(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidParameter, match=r"`grammar` cannot be used: at 2\(4\): "):
        compiler.compile(lark('start: b\nb: %json {"type": "bogus"}'))
