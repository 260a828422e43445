"""LoRAX's bodies: hostile values, what decides about sampling, and that what jlorax's client writes
the server reads back. Each field's defaults and messages: tests/servers/test_native_fields.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.types import (
    AdapterMerge,
    Constraint,
    ConstraintKind,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    MajoritySign,
    MergeStrategy,
    PromptToken,
    SamplingParams,
    Token,
    TokenAlternative,
)
from jlorax.wire.call import Limits, Presentation
from jlorax.wire.exposition import metrics_as_json
from jlorax.wire.native import parse_native, parse_tokenize, render_answer
from jlorax.wire.native_client import read_result, read_results, render_request
from jlorax.wire.options import request_of
from jlorax.wire.strict_json import dumps, parse_object

LIMITS = Limits(model_id="tiny/base", vocab_size=1000, max_prompts=8)


def native(parameters: dict[str, Any] | None = None, **outer: Any) -> GenerateRequest:
    call = parse_native({"inputs": "hi", "parameters": parameters, **outer}, LIMITS)
    (request,) = call.requests
    return request


HOSTILE: dict[str, list[Any]] = {
    "temperature": [1e308, "hot", True, []],
    "top_k": [2**40, 1.5],
    "top_p": [-0.0, "x"],
    "repetition_penalty": [1e-300],
    "max_new_tokens": [2**31, 2**63, "5", True],
    "seed": [2**65, "x", 0.5],
    "stop": [["a"] * 1000, "", ["x" * 1_000_000], [1], {}],
    "stop_token_ids": [[-1], [1.5], [True], "1"],
    "best_of": [10**6, -1, "2", True],
    "adapter_source": [3],
    "details": ["yes", 1],
    "response_format": ["text", {"regex": "a"}, {"type": "json_schema", "schema": 5}],
    "grammar": ["a", {}, {"type": "regex", "value": "x" * 200_000}],
    "logit_bias": [{str(i): 1 for i in range(10**5)}, [1], {"-1": 1}, {"5": "x"}],
    "structured_outputs": [{"zzz": 1}, {"regex": "x" * 200_000}],
    "watermark": [True, "x"],
}


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in HOSTILE.items() for v in vs])
def test_a_hostile_value_is_refused_by_name_and_not_repeated(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        native({name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "outer",
    [{"adapter_id": "sql"}, {"max_new_tokens": 5}, {"temperature": 0}, {"stop": "x"}],
)
def test_a_parameter_beside_parameters_is_told_its_place(outer: dict[str, Any]) -> None:
    (name,) = outer
    with pytest.raises(InvalidParameter, match=f"`{name}` belongs inside `parameters`"):
        native({"seed": 1}, **outer)
    assert native(None, **{name: None}) == native()
    assert native(None, adapter_id="", do_sample=False, stop=[]) == native()


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
        ({"temperature": 1e-8}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"typical_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"repetition_penalty": 1.2}, 0.0),
    ],
)
def test_native_is_greedy_until_a_warper_asks_for_a_draw(
    parameters: dict[str, Any], temperature: float
) -> None:
    assert native(parameters).sampling.temperature == temperature


# Both directions.

REQUEST = GenerateRequest(
    prompt="hi",
    adapter_id="org/sql",
    adapter_source="local",
    sampling=SamplingParams(0.7, 5, 0.9, 0.1, 0.8, 1.1, 0.2, -0.3, 2**64 - 1),
    max_new_tokens=9,
    stop=("x", "yy"),
    stop_token_ids=(4, 5),
    ignore_eos=True,
    include_stop_text=False,
    truncate=3,
    num_top_logprobs=2,
    prompt_logprobs=True,
    adapter_scale=0.5,
    constraint=Constraint(ConstraintKind.REGEX, "a+"),
    logit_bias=((5, 1.5), (7, -100.0)),
    min_new_tokens=2,
)
MERGE = AdapterMerge(
    ("a", "b"), (1.0, 0.5), MergeStrategy.DARE_TIES, 0.5, MajoritySign.FREQUENCY, seed=7
)
SVD = AdapterMerge(("a", "b"), (1.0, 0.5), MergeStrategy.SVD, rank=4)


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        GenerateRequest("hi"),
        GenerateRequest("hi", "a"),
        GenerateRequest((5, 6), add_special_tokens=False),
        GenerateRequest("hi", merge=MERGE, adapter_scale=2.0),
        GenerateRequest("hi", merge=SVD),
        *(
            GenerateRequest("hi", constraint=Constraint(kind, source))
            for kind, source in (
                (ConstraintKind.JSON_SCHEMA, '{"type":"object","properties":{"b":{},"a":{}}}'),
                (ConstraintKind.JSON_SCHEMA, "{}"),
                (ConstraintKind.CHOICE, '["x","y"]'),
                (ConstraintKind.GRAMMAR, "start: /a/"),
            )
        ),
    ],
)
def test_what_the_client_writes_the_server_reads_back(request_: GenerateRequest) -> None:
    body = parse_object(dumps(render_request(request_)).encode())
    assert parse_native(body, LIMITS).requests == (request_,)


@pytest.mark.parametrize("kind", ConstraintKind)
def test_a_constraint_that_is_empty_is_not_lost_on_the_way(kind: ConstraintKind) -> None:
    source = "[]" if kind is ConstraintKind.CHOICE else ""
    with pytest.raises(InvalidParameter, match="is empty"):
        render_request(GenerateRequest("hi", constraint=Constraint(kind, source)))


def test_options_become_a_request() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    request = request_of(
        [5, 6],
        {"stop": "x", "logit_bias": {5: 1.0}, "temperature": 0.5, "response_format": form},
    )
    assert request == GenerateRequest(
        (5, 6),
        stop=("x",),
        logit_bias=((5, 1.0),),
        sampling=SamplingParams(temperature=0.5),
        constraint=Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
    )
    with pytest.raises(InvalidParameter, match="excludes `constraint`"):
        request_of("hi", {"response_format": form, "constraint": request.constraint})
    with pytest.raises(TypeError, match="temprature"):
        request_of("hi", {"temprature": 1})  # type: ignore[typeddict-unknown-key]


def never(token_id: int) -> bool:
    return False


def test_a_result_survives_the_way_to_the_client() -> None:
    alternatives = (TokenAlternative(7, "z", -1.0),)
    tokens = (
        Token(5, "a", float("-inf"), False, alternatives),
        Token(2, "", -0.5, True, alternatives),
    )
    prompt = (PromptToken(1, "b", None), PromptToken(2, "c", -0.5, alternatives))
    result = GenerateResult(
        "a", FinishReason.STOP_SEQUENCE, tokens, (1, 2), 7, prompt, queue_s=0.1, total_s=2.5
    )
    show = Presentation(details=True, prefill=True, num_alternatives=1, return_token_ids=True)
    sent = json.loads(dumps(render_answer([result], show, "prompt", never)))
    assert read_result(sent) == result
    assert read_results(sent) == [result]
    other = GenerateResult("b", FinishReason.LENGTH, (), (1, 2), 9)
    both = json.loads(dumps(render_answer([result, other], show, "prompt", never)))
    assert read_results(both) == [result, other]


def test_metrics_as_lorax_shows_them_in_json() -> None:
    text = (
        "# HELP jlorax_up It is.\n# TYPE jlorax_up gauge\njlorax_up 1\n"
        "# HELP jlorax_s Time.\n# TYPE jlorax_s histogram\n"
        'jlorax_s_bucket{le="0.5",kind="a b"} 2.0\njlorax_s_bucket{le="+Inf"} 3.0\n'
        "jlorax_s_count 3.0\njlorax_s_sum NaN\n"
    )
    assert metrics_as_json(text) == {
        "jlorax_up": {"type": "gauge", "data": [{"key": "", "value": 1.0}]},
        "jlorax_s": {
            "type": "histogram",
            "data": [
                {"key": 'jlorax_s_bucket{le="0.5",kind="a b"}', "value": 2.0},
                {"key": 'jlorax_s_bucket{le="+Inf"}', "value": 3.0},
                {"key": "count", "value": 3.0},
                {"key": "sum", "value": None},
            ],
        },
    }


def test_a_text_to_cut_into_tokens_has_a_limit() -> None:
    assert parse_tokenize({"inputs": "x" * 262_144}) == ("x" * 262_144, True)
    with pytest.raises(InvalidParameter, match="at most 262144 characters, not 262145"):
        parse_tokenize({"inputs": "x" * 262_145})
