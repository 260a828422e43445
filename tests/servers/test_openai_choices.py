"""Which of several answers are shown, what of their tokens, and what reaches the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.types import (
    AdapterMerge,
    Constraint,
    ConstraintKind,
    GenerateRequest,
    MergeStrategy,
    TokenEvent,
)
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving
from tests.wire_calls import tool

COMPLETION = {"model": "tiny/base", "prompt": "hi"}
CHAT = {"model": "tiny/base", "messages": [{"role": "user", "content": "hi"}]}


class Uneven(FakeEngine):
    """Its answer to seed s is the text "s", and the likelier the nearer s is to 7."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        seed = request.sampling.seed or 0
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                token = replace(event.token, text=str(seed), logprob=-abs(seed - 7.0))
                result = event.result and replace(event.result, text=str(seed), tokens=(token,))
                yield replace(event, token=token, result=result)


@in_loop
async def test_the_best_are_shown_by_their_mean_log_probability() -> None:
    async with serving(Uneven(script=("x",))) as server:
        body = COMPLETION | {"prompt": ["a", "bc"], "best_of": 4, "n": 2, "seed": 5, "echo": True}
        answer = (await server.post("/v1/completions", body)).json
    shown = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert shown[0] == (0, "a7")
    assert shown[1][1] in ("a6", "a8")
    assert shown[2] == (2, "bc7")
    assert len(server.engine.seen) == 8
    # each prompt once, every token that was made
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}


@in_loop
async def test_long_answers_are_not_worse_for_being_long() -> None:
    class Lengths(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
            short = request.sampling.seed == 1
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    result = event.result
                    if result is not None:
                        logprob = -1.5 if short else -1.0
                        tokens = [replace(token, logprob=logprob) for token in result.tokens]
                        tokens = tokens[:1] if short else tokens
                        result = replace(result, text=str(len(tokens)), tokens=tuple(tokens))
                    yield replace(event, result=result)

    async with serving(Lengths()) as server:
        body = COMPLETION | {"best_of": 2, "seed": 0}
        (choice,) = (await server.post("/v1/completions", body)).json["choices"]
    assert choice["text"] == "4"


@in_loop
async def test_echo_shows_the_prompts_tokens_and_their_alternatives() -> None:
    async with serving() as server:
        body = COMPLETION | {"prompt": [104, 105], "logprobs": 1, "echo": True, "max_tokens": 4}
        choice = (await server.post("/v1/completions", body)).json["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hiHello, world"
    assert logprobs["tokens"][:3] == ["h", "i", "d"]
    assert logprobs["token_logprobs"][:3] == [None, -0.5, -0.25]
    assert logprobs["top_logprobs"][:3] == [
        None,
        {chr(200): -1.0, "i": -0.5},
        {chr(200): -1.0, "d": -0.25},
    ]
    assert logprobs["text_offset"] == [0, 1, 2, 7, 8, 9]


@in_loop
async def test_every_field_reaches_the_engine() -> None:
    engine = FakeEngine(registered={"a": adapter_info("a"), "b": adapter_info("b")})
    async with serving(engine) as server:
        body = {
            "merged_adapters": {"ids": ["a", "b"], "merge_strategy": "cat"},
            "adapter_scale": 0.5,
            "logit_bias": {"7": -3},
            "min_tokens": 2,
            "guided_choice": ["x", "y"],
        }
        for path, asked in (("completions", COMPLETION), ("chat/completions", CHAT)):
            answer = await server.post(f"/v1/{path}", asked | body)
            assert answer.status == 200, answer.text
            assert answer.headers["x-adapter-id"] == "a,b"
            assert answer.json["model"] == "tiny/base"
            request = engine.seen[-1]
            assert request.merge == AdapterMerge(("a", "b"), (1.0, 1.0), MergeStrategy.CAT)
            assert (request.adapter_scale, request.logit_bias) == (0.5, ((7, -3.0),))
            assert request.min_new_tokens == 2
            assert request.constraint == Constraint(ConstraintKind.CHOICE, '["x","y"]')


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"guided_regex": "(a"}, "regex", "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "json_schema", "response_format"),
        ({"tools": [tool()]}, "grammar", "tools"),
        ({"tools": [tool()]}, "prompt", "prompt"),
    ],
)
@in_loop
async def test_a_constraint_that_the_engine_refuses_is_named_by_its_field(
    fields: dict[str, Any], kind: str, field: str
) -> None:
    async with serving(FakeEngine(error=InvalidParameter(kind, "is wrong"))) as server:
        for n in (1, 2):
            answer = await server.post("/v1/chat/completions", CHAT | fields | {"n": n})
            assert (answer.status, answer.json["error"]["param"]) == (400, field)
            assert answer.json["error"]["message"] == f"`{field}` is wrong"


BAD: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 0}),
    ("best_of", {"n": 2, "best_of": 1}),
    ("logit_bias", {"logit_bias": {"1000": 1}}),
    ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
    ("guided_regex", {"guided_json": {}, "guided_regex": "a"}),
    ("merged_adapters", {"model": "a", "merged_adapters": {"ids": ["b"]}}),
    ("merged_adapters.weights", {"merged_adapters": {"ids": ["b"], "weights": [1, 2]}}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("echo", {"echo": True, "logprobs": 1, "stream": True}),
    ("response_format.type", {"response_format": {"type": "json_schema"}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD)
@in_loop
async def test_what_is_wrong_is_400_and_named(param: str, fields: dict[str, Any]) -> None:
    async with serving() as server:
        answer = await server.post("/v1/completions", COMPLETION | fields)
        assert (answer.status, answer.json["error"]["param"]) == (400, param)
        assert not server.engine.seen
        assert (await server.post("/v1/completions", COMPLETION)).status == 200
