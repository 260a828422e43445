"""LoRAX's ``parameters``, a row a field: what absent and allowed values become, what is refused.

The rows mirror the table of LoRAX's GenerateParameters; those after it are TGI's and ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import pytest

from jlorax.types import (
    AdapterMerge,
    Constraint,
    ConstraintKind,
    GenerateRequest,
    MajoritySign,
    MergeStrategy,
)
from jlorax.wire.call import Limits
from jlorax.wire.constraints import ANY_OBJECT
from jlorax.wire.fields import Fields
from jlorax.wire.native import parse_native
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
AS_SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object","properties":{"b":{},"a":{}}}')
AS_REGEX = Constraint(ConstraintKind.REGEX, "a+")
MERGE = {"ids": ["a", "b"], "weights": [1, 0.5]}


@dataclass(frozen=True)
class Row:
    """``attribute`` of the GenerateRequest holds ``default`` when the field is absent or null, and
    for each (value, expected) of ``good`` that. Each (value, words) of ``bad`` is a 422 with these
    words. ``beside``: other parameters that a value needs."""

    name: str
    attribute: str
    default: Any
    good: list[tuple[Any, Any]] = field(default_factory=list)
    bad: list[tuple[Any, str]] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)


ROWS = [
    Row("adapter_id", "adapter_id", None,
        [("a", "a"), ("", None), ("tiny/base", None), ("tgi", None)],
        [(3, "must be a string, not an integer"), ("../x", "can name no adapter")]),
    Row("adapter_source", "adapter_source", None, [("local", "local"), ("LOCAL", "local")],
        [("hub", "`adapter_source` may be 'local'"), (1, "must be a string")], {"adapter_id": "a"}),
    Row("merged_adapters", "merge", None,
        [(MERGE, AdapterMerge(("a", "b"), (1.0, 0.5))),
         ({"ids": ["a", "b"], "weights": [], "merge_strategy": "linear", "density": 0.0,
           "majority_sign_method": "total"}, AdapterMerge(("a", "b"), (1.0, 1.0))),
         (MERGE | {"merge_strategy": "ties", "density": 0.5, "majority_sign_method": "frequency"},
          AdapterMerge(("a", "b"), (1.0, 0.5), MergeStrategy.TIES, 0.5, MajoritySign.FREQUENCY)),
         (MERGE | {"merge_strategy": "dare_ties", "density": 1.0, "seed": 3},
          AdapterMerge(("a", "b"), (1.0, 0.5), MergeStrategy.DARE_TIES, seed=3))],
        [({"ids": []}, "at least one adapter id"), ([], "must be an object, not a list"),
         ({"ids": ["a"], "weights": [1, 2]},
          "number of adapter IDs must match number of adapter weights. Given: 1 ids and 2 weights"),
         (MERGE | {"merge_strategy": "average"}, "must be one of linear, ties"),
         (MERGE | {"merge_strategy": "ties"}, "must be > 0 and <= 1 for 'ties'"),
         (MERGE | {"density": 1.5}, "Given: 1.5"),
         (MERGE | {"majority_sign_method": "most"}, "must be one of total, frequency")]),
    Row("api_token", "tenant", "default", [("secret", "default")], [(5, "must be a string")]),
    Row("temperature", "sampling.temperature", 0.0, [(0, 0.0), (1, 0.0), (0.5, 0.5), (2, 2.0)],
        [(-0.1, "Given: -0.1"), ("hot", "must be a number, not a string")]),
    Row("repetition_penalty", "sampling.repetition_penalty", 1.0, [(1.2, 1.2)],
        [(0, "Given: 0"), (-1, "Given: -1")]),
    Row("frequency_penalty", "sampling.frequency_penalty", 0.0, [(-2, -2.0), (2, 2.0)],
        [(-2.1, "must be >= -2.0 and <= 2.0. Given: -2.1"), (2.1, "Given: 2.1")]),
    Row("presence_penalty", "sampling.presence_penalty", 0.0, [(-2, -2.0), (2, 2.0)],
        [(-2.1, "must be >= -2.0 and <= 2.0. Given: -2.1"), (2.1, "Given: 2.1")]),
    Row("top_k", "sampling.top_k", 0, [(1, 1), (50, 50)], [(0, "Given: 0"), (-1, "Given: -1")]),
    Row("top_p", "sampling.top_p", 1.0, [(0.9, 0.9), (1.0, 1.0)],
        [(0, "must be > 0.0 and <= 1.0. Given: 0"), (1.1, "Given: 1.1")]),
    Row("typical_p", "sampling.typical_p", 1.0, [(0.9, 0.9)],
        [(0, "must be > 0.0 and <= 1.0. Given: 0"), (1.1, "Given: 1.1")]),
    Row("do_sample", "sampling.temperature", 0.0, [(True, 1.0), (False, 0.0)],
        [("yes", "must be true or false, not a string")]),
    Row("max_new_tokens", "max_new_tokens", None, [(1, 1), (500, 500)],
        [(0, "Given: 0"), (1.5, "must be an integer")]),
    Row("ignore_eos_token", "ignore_eos", False, [(True, True)], [(1, "must be true or false")]),
    Row("stop", "stop", (), [(["a", "b"], ("a", "b")), ("a", ("a",)), ([], ())],
        [(["a"] * 17, "supports up to 16 stop sequences. Given: 17"), ([""], "Given: 0")]),
    Row("truncate", "truncate", None, [(1, 1), (255, 255)],
        [(0, "Given: 0"), (256, "between 1 and 255. Given: 256")]),
    Row("watermark", "sampling.seed", None, [(False, None)], [(True, "does not support")]),
    Row("decoder_input_details", "prompt_logprobs", False, [(True, True)],
        [("x", "true or false")]),
    Row("return_k_alternatives", "num_top_logprobs", 0, [(1, 1), (20, 20)],
        [(0, "Given: 0"), (21, "between 1 and 20. Given: 21")]),
    Row("apply_chat_template", "add_special_tokens", True, [(True, False)], [(2, "true or false")]),
    Row("seed", "sampling.seed", None, [(0, 0), (2**64 - 1, 2**64 - 1)],
        [(-1, "Given: -1"), (2**64, f"Given: {2**64}")]),
    Row("response_format", "constraint", None,
        [({"type": "json_object"}, ANY_OBJECT),
         ({"type": "json_object", "schema": None}, ANY_OBJECT),
         ({"type": "json_object", "schema": SCHEMA}, AS_SCHEMA),
         ({"type": "json_object", "value": SCHEMA}, AS_SCHEMA),  # as huggingface_hub sends it
         ({"type": "JsonSchema", "schema": SCHEMA}, AS_SCHEMA),
         ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, AS_SCHEMA),
         ({"type": "text"}, None)],
        [({"type": "xml"}, "must be text, json_object or json_schema. Given: 'xml'"),
         ({"type": "text", "schema": SCHEMA}, "takes no schema"),
         ({"schema": SCHEMA}, "`response_format.type` is missing"),
         ({"type": "json_object", "regex": "a"}, "`response_format.regex` asks for a feature"),
         ({"type": "json_object", "value": SCHEMA, "schema": SCHEMA}, "`value` excludes `schema`"),
         ("json", "must be an object")]),
    # the answer's form: the request says nothing of it
    Row("details", "detokenize", True, [(True, True)], [("x", "true or false")]),
    Row("return_full_text", "detokenize", True, [(True, True)], [("x", "true or false")]),
    Row("best_of", "num_top_logprobs", 0, [(1, 0)],
        [(0, "between 1 and 2. Given: 0"), (3, "between 1 and 2. Given: 3"),
         (2, "you must use sampling when it is > 1")]),
    # TGI's
    Row("grammar", "constraint", None,
        [({"type": "json", "value": SCHEMA}, AS_SCHEMA),
         ({"type": "json", "value": AS_SCHEMA.source}, AS_SCHEMA),
         ({"type": "regex", "value": "a+"}, AS_REGEX),
         ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, AS_SCHEMA)],
        [({"type": "xml", "value": ""}, "must be json, regex or json_schema. Given: 'xml'"),
         ({"type": "regex"}, "`grammar.value` is missing"), ("a+", "must be an object"),
         ({"type": "json", "value": 5}, "must be an object: a JSON schema")]),
    Row("top_n_tokens", "num_top_logprobs", 0, [(0, 0), (3, 3)], [(21, "Given: 21")]),
    # vLLM's
    Row("guided_json", "constraint", None, [(SCHEMA, AS_SCHEMA), ("", None)], [(5, "JSON schema")]),
    Row("guided_regex", "constraint", None, [("a+", AS_REGEX)], [(5, "must be a string")]),
    Row("guided_choice", "constraint", None,
        [(["x", "y"], Constraint(ConstraintKind.CHOICE, '["x","y"]'))],
        [([5], "must hold strings")]),
    Row("guided_grammar", "constraint", None,
        [("start: /a/", Constraint(ConstraintKind.GRAMMAR, "start: /a/"))], [(5, "a string")]),
    Row("structured_outputs", "constraint", None, [({"regex": "a+"}, AS_REGEX)],
        [({"regex": "a+", "choice": ["a"]}, "an answer has one constraint"), (5, "an object")]),
    # ours
    Row("min_p", "sampling.min_p", 0.0, [(0.1, 0.1)], [(-0.1, "Given: -0.1"), (2, "Given: 2")]),
    Row("stop_token_ids", "stop_token_ids", (), [([4, 5], (4, 5))], [([1000], "0 to 999")]),
    Row("include_stop_text", "include_stop_text", True, [(False, False)], [(1, "true or false")]),
    Row("min_new_tokens", "min_new_tokens", 0, [(5, 5)],
        [(-1, "Given: -1"), (11, "is 11, but `max_new_tokens` is 10")], {"max_new_tokens": 10}),
    Row("logit_bias", "logit_bias", (), [({"5": 1, "7": -100}, ((5, 1.0), (7, -100.0)))],
        [({"1000": 1}, "from 0 to 999"), ({"x": 1}, "'x'"), ({"5": 101}, "Given: 101")]),
    Row("adapter_scale", "adapter_scale", 1.0, [(0.5, 0.5), (-1, -1.0), (0, 0.0)],
        [(1000, "Given: 1000"), ("x", "must be a number")], {"adapter_id": "a"}),
    Row("return_token_ids", "detokenize", True, [(True, True)], [("x", "true or false")]),
]  # fmt: skip
REFUSED = {  # what other servers have, by the values that ask for nothing
    "adapter_parameters": {},
    "allowed_token_ids": [],
    "bad_words": [],
    "guided_decoding_backend": "auto",
    "guided_whitespace_pattern": "",
    "length_penalty": 1.0,
    "logits_processors": [],
    "use_beam_search": False,
}


def registered() -> FakeEngine:
    return FakeEngine(registered={name: adapter_info(name) for name in ("a", "b")})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@in_loop
async def test_a_field(row: Row) -> None:
    async with serving(registered()) as server:

        async def ask(parameters: dict[str, Any]) -> Any:
            body = {"inputs": "hi", "parameters": row.beside | parameters}
            return await server.post("/generate", body)

        def became() -> Any:
            return attrgetter(row.attribute)(server.engine.seen[-1])

        for absent in ({}, {row.name: None}):
            assert (await ask(absent)).status == 200
            assert became() == row.default
        for value, expected in row.good:
            answer = await ask({row.name: value})
            assert answer.status == 200, answer.text
            assert became() == expected, value
        num_seen = len(server.engine.seen)
        for value, words in row.bad:
            answer = await ask({row.name: value})
            assert answer.status == 422, (value, answer.text)
            assert answer.json["error_type"] == "validation"
            assert answer.json["error"].startswith("Input validation error: ")
            assert words in answer.json["error"], value
        assert len(server.engine.seen) == num_seen


@pytest.mark.parametrize("name", REFUSED)
@in_loop
async def test_a_field_that_is_refused_by_its_name(name: str) -> None:
    async with serving() as server:
        harmless = {"inputs": "hi", "parameters": {name: REFUSED[name]}}
        assert (await server.post("/generate", harmless)).status == 200
        answer = await server.post("/generate", {"inputs": "hi", "parameters": {name: ["x"]}})
        assert answer.status == 422
        assert name in answer.json["error"]


def test_there_is_a_row_for_every_field_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    known = Fields.known
    monkeypatch.setattr(Fields, "known", lambda self: asked.update(known(self)) or known(self))
    parse_native({"inputs": "hi"}, Limits("tiny/base", 1000, 8))
    assert asked == {row.name for row in ROWS} | set(REFUSED)


Together = tuple[dict[str, Any], bool, str]
EXCLUSIVE: list[Together] = [
    ({"adapter_id": "a", "merged_adapters": MERGE}, False,
     "at most one of `adapter_id` or `adapters` may be provided"),
    ({"best_of": 2, "do_sample": True, "seed": 5}, False,
     "`seed` must not be set when `best_of` > 1"),
    ({"best_of": 2, "do_sample": True}, True,
     "`best_of` != 1 is not supported when streaming tokens"),
    ({"decoder_input_details": True}, True,
     "`decoder_input_details` == true is not supported when streaming tokens"),
    ({"response_format": {"type": "json_object"}, "grammar": {"type": "regex", "value": "a"}},
     False, "`grammar` excludes `response_format`"),
    ({"adapter_scale": 0.5}, False, "names no adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "stream", "words"), EXCLUSIVE)
@in_loop
async def test_fields_that_exclude_each_other(
    parameters: dict[str, Any], stream: bool, words: str
) -> None:
    async with serving(registered()) as server:
        body = {"inputs": "hi", "parameters": parameters}
        paths = ["/generate_stream"] if stream else ["/generate", "/", "/invocations"]
        for path in paths:
            answer = await server.post(path, body)
            assert (answer.status, answer.json["error_type"]) == (422, "validation")
            assert words in answer.json["error"]


@pytest.mark.parametrize("inputs", ["", [], None, 5, [[1]], {"text": "x"}])
@in_loop
async def test_inputs_that_are_no_prompt(inputs: Any) -> None:
    async with serving() as server:
        answer = await server.post("/generate", {"inputs": inputs})
        assert (answer.status, answer.json["error_type"]) == (422, "validation")
        assert "`inputs`" in answer.json["error"]


@in_loop
async def test_lorax_clients_whole_body_with_its_nulls_is_the_plain_request() -> None:
    async with serving() as server:
        nulls = {row.name: None for row in ROWS} | {
            "do_sample": False, "max_new_tokens": None, "ignore_eos_token": False, "stop": [],
            "return_full_text": False, "watermark": False, "details": True,
            "decoder_input_details": False,
        }  # fmt: skip
        answer = await server.post("/", {"inputs": "hi", "parameters": nulls, "stream": False})
        assert answer.status == 200
        assert server.engine.seen == [GenerateRequest("hi")]
