"""/v1/embeddings and vLLM's /tokenize and /detokenize, in and out."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from jlorax.errors import InvalidAdapterId, InvalidParameter
from jlorax.types import EmbedResult
from jlorax.wire.embeddings import (
    EmbedCall,
    check_dimensions,
    parse_embeddings,
    render_embeddings,
)
from jlorax.wire.tokens import is_vllm_tokenize, parse_detokenize, parse_tokenize_call
from tests.wire_calls import LIMITS, USER, tool


def asked(**fields: Any) -> EmbedCall:
    return parse_embeddings({"model": "", "input": "hi", **fields}, LIMITS)


def test_inputs_of_every_form() -> None:
    def inputs(given: object) -> list[tuple[object, bool]]:
        return [(r.prompt, r.add_special_tokens) for r in asked(input=given).requests]

    assert inputs("a") == [("a", True)]
    assert inputs(["a", "b"]) == [("a", True), ("b", True)]
    assert inputs([1, 2]) == [((1, 2), False)]
    assert inputs([[1], [2, 3]]) == [((1,), False), ((2, 3), False)]
    assert not asked(add_special_tokens=False).requests[0].add_special_tokens


def test_the_adapter_is_the_model_or_lorax_parameter() -> None:
    (request,) = asked(model="x", adapter_source="local").requests
    assert (request.adapter_id, request.adapter_source) == ("x", "local")
    inner = {"adapter_id": "x", "adapter_source": "local", "api_token": "t"}
    assert asked(parameters=inner).requests == (request,)
    assert asked(model="x", parameters={"adapter_id": "x"}).model == "x"
    assert asked(user="u", zzz=1).unknown_fields == ("zzz",)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": ""}, "`input` cannot be empty"),
        ({"input": [""]}, "empty"),
        ({"input": ["a"] * 9}, "at most 8 prompts, not 9"),
        ({"input": [1000]}, "id 1000"),
        ({"input": {}}, "must be a string or a list"),
        ({"encoding_format": "int8"}, "float, base64. Given: 'int8'"),
        ({"dimensions": 0}, "`dimensions`"),
        ({"dimensions": "2"}, "`dimensions`"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"model": "x", "parameters": {"adapter_id": "y"}}, "is 'y', but `model` is 'x'"),
        ({"parameters": {"merged_adapters": {"ids": ["a"]}}}, "parameters.merged_adapters"),
        ({"parameters": []}, "`parameters` must be an object"),
        ({"model": None}, "`model` must be a string"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(**fields)
    assert says in str(caught.value)


def test_an_impossible_adapter_is_refused() -> None:
    with pytest.raises(InvalidAdapterId):
        asked(parameters={"adapter_id": "../x"})


RESULTS = [EmbedResult((0.5, -1.25), 3), EmbedResult((1.0, 2.0), 4)]


def test_vectors_as_numbers_under_both_keys() -> None:
    body = json.loads(render_embeddings(asked(input=["a", "b"]), RESULTS))
    assert body["data"] == body["embeddings"]
    assert body["data"] == [
        {"object": "embedding", "index": 0, "embedding": [0.5, -1.25]},
        {"object": "embedding", "index": 1, "embedding": [1.0, 2.0]},
    ]
    assert (body["object"], body["model"]) == ("list", "tiny/base")
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_vectors_as_base64_of_little_endian_floats() -> None:
    body = json.loads(render_embeddings(asked(encoding_format="base64"), RESULTS[:1]))
    packed = base64.b64decode(body["data"][0]["embedding"])
    assert struct.unpack("<2f", packed) == (0.5, -1.25)


def test_dimensions_are_those_of_the_model() -> None:
    check_dimensions(asked(dimensions=2), RESULTS)
    check_dimensions(asked(), RESULTS)
    with pytest.raises(InvalidParameter, match="is 3, but this model's embeddings have 2"):
        check_dimensions(asked(dimensions=3), RESULTS)


def test_a_prompt_or_a_chat_to_tokenize() -> None:
    assert is_vllm_tokenize({"prompt": "a"}) and is_vllm_tokenize({"messages": []})
    assert not is_vllm_tokenize({"inputs": "a"})
    call, wants_texts = parse_tokenize_call({"prompt": "a", "add_special_tokens": False})
    assert (call.requests[0].prompt, call.requests[0].add_special_tokens) == ("a", False)
    assert (call.messages, wants_texts) == (None, False)
    body = {
        "messages": [USER],
        "tools": [tool()],
        "add_generation_prompt": False,
        "return_token_strs": True,
    }
    call, wants_texts = parse_tokenize_call(body)
    assert call.messages is not None and wants_texts
    assert call.chat.tools == (tool(),)
    assert not call.chat.add_generation_prompt


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"prompt": None}, "must be a string, not null"),
        ({"prompt": "x" * 262_145}, "at most 262144 characters, not 262145"),
        ({"prompt": "a", "messages": [USER]}, "`prompt` excludes `messages`"),
        ({"messages": []}, "`messages` must be a list with at least one"),
        ({"messages": [USER], "chat_template": "x"}, "chat_template"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
    ],
)
def test_wrong_bodies_to_tokenize(body: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_tokenize_call(body)
    assert says in str(caught.value)


def test_ids_to_detokenize() -> None:
    assert parse_detokenize({"tokens": [1, 2], "model": "x"}, LIMITS) == (1, 2)
    assert parse_detokenize({"tokens": []}, LIMITS) == ()
    for wrong in (None, "1", [1000], [-1], [1.0], [True]):
        with pytest.raises(InvalidParameter, match="tokens"):
            parse_detokenize({"tokens": wrong}, LIMITS)
