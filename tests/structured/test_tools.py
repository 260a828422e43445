"""Grammars of tool calls: what they let through, and that a parser finds it all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from jlorax.errors import InvalidParameter
from jlorax.models import gguf
from jlorax.structured.grammar import Grammar, GrammarCompiler
from jlorax.structured.tool_format import HERMES, LLAMA3, MISTRAL, ToolFormat, tool_format_of
from jlorax.structured.tool_parser import (
    ArgumentsPiece,
    CallEnded,
    CallStarted,
    ContentText,
    ToolCallParser,
)
from jlorax.structured.tools import MAX_TOOLS, Tool, ToolChoice, tool_constraint
from jlorax.tokenizer import Tokenizer
from jlorax.types import Constraint, ConstraintKind, Token
from tests.models.gguf_files import bpe_metadata, tiny_gguf
from tests.structured.walks import allows, spelled, text_of, walk

NODE = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    Tool(
        "walk",
        {
            "properties": {"from": {"$ref": "#/$defs/node"}},
            "required": ["from"],
            "additionalProperties": False,
            "$defs": {"node": NODE},
        },
    ),
    Tool("stop-now"),
)
FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "llama3": LLAMA3}
WEATHER = ("get_weather", {"city": 'Par"is', "unit": "C"})
WALK = ("walk", {"from": {"x": 1, "next": {"x": -2}}})
STOP: tuple[str, dict[str, Any]] = ("stop-now", {})
WRONG = ("get_weather", {"town": "Paris"})
UNKNOWN: tuple[str, dict[str, Any]] = ("fly", {})

Call = tuple[str, dict[str, Any]]


def written(tool_format: ToolFormat, *calls: Call) -> str:
    """As the family's models write them."""
    objects = [json.dumps({"name": n, tool_format.arguments_key: a}) for n, a in calls]
    if tool_format == HERMES:
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)
    if tool_format == MISTRAL:
        return "[TOOL_CALLS] [" + ", ".join(objects) + "]"
    return "; ".join(objects)


@pytest.fixture(params=FORMATS)
def tool_format(request: pytest.FixtureRequest) -> ToolFormat:
    return FORMATS[request.param]


# --- what is let through


@pytest.mark.parametrize("is_parallel", [True, False])
def test_required_calls_are_calls_and_nothing_else(
    compiler: GrammarCompiler, smollm2: Tokenizer, tool_format: ToolFormat, is_parallel: bool
) -> None:
    grammar = grammar_of(compiler, ToolChoice.REQUIRED, tool_format, is_parallel)
    for call in (WEATHER, WALK, STOP):
        assert spelled(smollm2, grammar, written(tool_format, call)) == (True, True), call
    takes_two = spelled(smollm2, grammar, written(tool_format, WEATHER, STOP)) == (True, True)
    assert takes_two == is_parallel
    for text in ("", "Hello"):
        assert spelled(smollm2, grammar, text) != (True, True)
    for call in (WRONG, UNKNOWN):
        assert not spelled(smollm2, grammar, written(tool_format, call))[0], call


def test_a_named_tool_is_the_only_one(
    compiler: GrammarCompiler, smollm2: Tokenizer, tool_format: ToolFormat
) -> None:
    grammar = grammar_of(compiler, "walk", tool_format)
    assert spelled(smollm2, grammar, written(tool_format, WALK, WALK)) == (True, True)
    assert not spelled(smollm2, grammar, written(tool_format, WEATHER))[0]
    assert spelled(smollm2, grammar, "")[1] is False


@pytest.mark.parametrize("is_parallel", [True, False])
def test_with_auto_any_text_comes_first_and_calls_are_held_to_their_schemas(
    compiler: GrammarCompiler, smollm2: Tokenizer, tool_format: ToolFormat, is_parallel: bool
) -> None:
    grammar = grammar_of(compiler, ToolChoice.AUTO, tool_format, is_parallel)
    text = "Let me see <tool or [TOOL] a { of 日本.\n" if tool_format.opening else ""
    assert spelled(smollm2, grammar, "Grüße, {no} [call] <here>.\n") == (True, True)
    for call in (WEATHER, WALK, STOP):
        assert spelled(smollm2, grammar, text + written(tool_format, call)) == (True, True), call
    two = text + written(tool_format, WEATHER, STOP)
    assert (spelled(smollm2, grammar, two) == (True, True)) == is_parallel
    for call in (WRONG, UNKNOWN):
        assert not spelled(smollm2, grammar, text + written(tool_format, call))[0], call
    assert not spelled(smollm2, grammar, two + " And more.")[0]


POINT = Constraint(
    ConstraintKind.JSON_SCHEMA,
    json.dumps({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}),
)


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_an_answer_that_calls_nothing_may_have_a_schema(
    compiler: GrammarCompiler, smollm2: Tokenizer, name: str
) -> None:
    tool_format = FORMATS[name]
    held = tool_constraint(TOOLS, ToolChoice.AUTO, tool_format, answer=POINT)
    grammar = compiler.compile(held)
    assert spelled(smollm2, grammar, '{"x": 3}') == (True, True)
    assert spelled(smollm2, grammar, written(tool_format, WEATHER, STOP)) == (True, True)
    for text in ("Hello", '{"y": 3}', "I call " + written(tool_format, STOP)):
        assert not spelled(smollm2, grammar, text)[0], text
    assert not spelled(smollm2, grammar, written(tool_format, WRONG))[0]
    required = tool_constraint(TOOLS, ToolChoice.REQUIRED, tool_format, answer=POINT)
    assert required == tool_constraint(TOOLS, ToolChoice.REQUIRED, tool_format)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("llama3", POINT), ("hermes", Constraint(ConstraintKind.REGEX, "a"))],
)
def test_answers_that_could_not_be_told_from_calls(name: str, answer: Constraint) -> None:
    with pytest.raises(InvalidParameter, match="exclude"):
        tool_constraint(TOOLS, ToolChoice.AUTO, FORMATS[name], answer=answer)


def test_parallel_calls_have_an_end(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    grammar = grammar_of(compiler, ToolChoice.REQUIRED, HERMES)
    assert spelled(smollm2, grammar, written(HERMES, *[STOP] * 16)) == (True, True)
    assert not spelled(smollm2, grammar, written(HERMES, *[STOP] * 17))[0]


@pytest.mark.parametrize("draft", ["draft-04", "draft-07", "draft/2020-12"])
def test_a_tools_definitions_are_its_own_in_every_draft(
    compiler: GrammarCompiler, smollm2: Tokenizer, draft: str
) -> None:
    parameters = {
        "$schema": f"http://json-schema.org/{draft}/schema#",
        "$ref": "#/definitions/node",
        "definitions": {"node": NODE | {"properties": {"x": {"type": "integer"}}}},
    }
    tools = [Tool("older", parameters), *TOOLS]
    grammar = compiler.compile(tool_constraint(tools, ToolChoice.REQUIRED, HERMES))
    assert spelled(smollm2, grammar, written(HERMES, ("older", {"x": 1}), WALK)) == (True, True)
    assert not spelled(smollm2, grammar, written(HERMES, ("older", {"y": 1})))[0]


def test_compact_calls_are_calls_too(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    grammar = grammar_of(compiler, ToolChoice.REQUIRED, HERMES)
    text = '<tool_call>{"name":"stop-now","arguments":{}}</tool_call>'
    assert spelled(smollm2, grammar, text + text) == (True, True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", [*ToolChoice, "walk"])
def test_a_random_answer_holds_calls_that_are_valid(
    compiler: GrammarCompiler,
    smollm2: Tokenizer,
    tool_format: ToolFormat,
    choice: ToolChoice | str,
    seed: int,
) -> None:
    grammar = grammar_of(compiler, choice, tool_format)
    prefix = "Well, " + tool_format.opening if choice is ToolChoice.AUTO else ""
    if not tool_format.opening:
        prefix = prefix and '{"'
    ids = smollm2.encode(prefix)
    ids += walk(grammar, smollm2, random.Random(seed), prefix=ids)
    parser = ToolCallParser(tool_format, [tool.name for tool in TOOLS])
    events = parser.push(text_of(smollm2, ids)) + parser.finish()
    names = {e.index: e.name for e in events if isinstance(e, CallStarted)}
    pieces = {e.index: e.text for e in events if isinstance(e, ArgumentsPiece)}
    text = "".join(e.text for e in events if isinstance(e, ContentText))
    assert text == ("Well, " if prefix.startswith("Well") else "")
    assert 1 <= len(names) == len(pieces) == sum(isinstance(e, CallEnded) for e in events)
    for index, name in names.items():
        schema = next(tool.parameters for tool in TOOLS if tool.name == name) or {
            "maxProperties": 0
        }
        Draft202012Validator(schema).validate(json.loads(pieces[index]))


def test_as_many_tools_as_are_allowed(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    tools = [Tool(f"tool_{i}", TOOLS[0].parameters) for i in range(MAX_TOOLS)]
    grammar = compiler.compile(tool_constraint(tools, ToolChoice.AUTO, HERMES))
    last = written(HERMES, ("tool_127", {"city": "x"}))
    assert spelled(smollm2, grammar, "Now: " + last) == (True, True)


# --- what is refused


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ([], ToolChoice.AUTO, "`tools` has 0 items, but 1 to 128"),
        ([Tool(f"t{i}") for i in range(129)], ToolChoice.AUTO, "`tools` has 129 items"),
        ([Tool("a b")], ToolChoice.AUTO, "`tools` has the name 'a b' at 0"),
        ([Tool("x"), Tool("x")], ToolChoice.AUTO, "`tools` has the name 'x' twice"),
        ([Tool("x", {"type": "array"})], ToolChoice.AUTO, "parameters that are no object: 'x'"),
        ([Tool("x")], "y", "`tool_choice` names 'y', which is none of the tools"),
    ],
)
def test_tools_that_cannot_be(tools: list[Tool], choice: ToolChoice | str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        tool_constraint(tools, choice, HERMES)


def test_a_schema_that_cannot_be_is_refused_with_its_place(compiler: GrammarCompiler) -> None:
    tools = [*TOOLS, Tool("bad", {"properties": {"x": {"type": "bogus"}}})]
    with pytest.raises(InvalidParameter, match=r"at 7\(.*\): .*Invalid type: bogus"):
        compiler.compile(tool_constraint(tools, ToolChoice.AUTO, HERMES))


# --- families


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        ("... within <tool_call></tool_call> XML tags", HERMES),
        ("{{- '[TOOL_CALLS] [' }}", MISTRAL),
        ("{{- '<|python_tag|>' + call }}", LLAMA3),
        ({"default": "{{ messages }}", "tool_use": "[TOOL_CALLS]"}, MISTRAL),
        ('respond {"name": function name, "parameters": dictionary of', LLAMA3),
    ],
)
def test_the_chat_template_tells_the_family(
    marked: Tokenizer, template: str | dict[str, str] | None, expected: ToolFormat
) -> None:
    marked.chat_template = template
    found = tool_format_of(marked)
    assert (found.opening, found.arguments_key) == (expected.opening, expected.arguments_key)


@pytest.fixture
def marked(tmp_path: Path) -> Tokenizer:
    """[TOOL_CALLS] is a special token of it, <tool_call> is a token but not special."""
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.tokens"] += ["[TOOL_CALLS]", "<tool_call>"]
    metadata["tokenizer.ggml.token_type"] += [3, 4]
    return Tokenizer.load(gguf.prepare(tiny_gguf(tmp_path / "m.gguf", metadata), tmp_path / "hf"))


def test_a_mark_may_be_a_special_token(marked: Tokenizer) -> None:
    marked.chat_template = "[TOOL_CALLS]"
    tool_format = tool_format_of(marked)
    (mark,) = marked.encode("[TOOL_CALLS]", add_special_tokens=False)
    assert tool_format.special == {"[TOOL_CALLS]": mark}
    compiler = GrammarCompiler(marked, marked.vocab_size)
    try:
        required = grammar_of(compiler, ToolChoice.REQUIRED, tool_format)
        auto = grammar_of(compiler, ToolChoice.AUTO, tool_format)
    finally:
        compiler.close()
    text = written(MISTRAL, WEATHER, STOP)
    assert spelled(marked, required, text) == (True, True)
    assert spelled(marked, auto, "hello" + text) == (True, True)
    assert not spelled(marked, auto, "hello" + written(MISTRAL, WRONG))[0]
    ids = marked.encode(text, add_special_tokens=False)
    tokens = [Token(i, marked.decode([i]), 0.0, marked.is_special(i)) for i in ids]
    assert "".join(token.text for token in tokens) == text.removeprefix("[TOOL_CALLS]")
    assert "".join(map(tool_format.text_of, tokens)) == text


def test_a_mark_may_be_one_token_that_is_text(marked: Tokenizer) -> None:
    marked.chat_template = "<tool_call>"
    tool_format = tool_format_of(marked)
    assert tool_format.special == {}
    (mark,) = marked.encode("<tool_call>", add_special_tokens=False)
    compiler = GrammarCompiler(marked, marked.vocab_size)
    try:
        grammar = grammar_of(compiler, ToolChoice.REQUIRED, tool_format)
    finally:
        compiler.close()
    mask = grammar.matcher().mask()
    assert allows(mask, mark) and allows(mask, marked.encode("<")[0])
    assert spelled(marked, grammar, written(HERMES, STOP)) == (True, True)


def grammar_of(
    compiler: GrammarCompiler,
    choice: ToolChoice | str,
    tool_format: ToolFormat,
    is_parallel: bool = True,
) -> Grammar:
    return compiler.compile(tool_constraint(TOOLS, choice, tool_format, is_parallel))
