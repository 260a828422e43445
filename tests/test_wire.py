"""JSON in and out: strictness, ranges, and that what the client writes the server reads back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from jlorax import errors
from jlorax.errors import InvalidAdapterId, InvalidParameter, JLoraxError
from jlorax.types import FinishReason, GenerateRequest, GenerateResult, SamplingParams, Token
from jlorax.wire.adapters import parse_load_adapter, read_adapter, render_adapter
from jlorax.wire.call import Limits, Presentation
from jlorax.wire.failures import read_error, render_native_error, render_openai_error
from jlorax.wire.fields import checked_adapter_id
from jlorax.wire.native import parse_native, read_result, render_request, render_result
from jlorax.wire.openai import parse_chat, parse_completion
from jlorax.wire.strict_json import MalformedBody, dumps, parse_object
from tests.fakes import adapter_info

LIMITS = Limits(model_id="tiny/base", vocab_size=1000, max_prompts=8)


def native(parameters: dict[str, Any] | None = None, **outer: Any) -> GenerateRequest:
    call = parse_native({"inputs": "hi", "parameters": parameters, **outer}, LIMITS)
    (request,) = call.requests
    return request


def completion(**fields: Any) -> GenerateRequest:
    return parse_completion({"model": "", "prompt": "hi", **fields}, LIMITS).requests[0]


def chat(**fields: Any) -> Any:
    body = {"model": "", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(body, LIMITS)


# Strict JSON.


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "not null"),
        (b'{"a":1}x', "not valid JSON"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 64"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64"),
        (b'{"n":1,"n":2}', "'n' is given twice"),
        (b'{"a":{"n":1,"n":2}}', "'n' is given twice"),
        (b'{"a":NaN}', "NaN is not a JSON number"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":1e400}', "1e400 does not fit"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":"\xff"}', "UTF-8 at byte 6"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (rb'{"a":"\ud800"}', r"lone surrogate \ud800"),
        (rb'{"a":["x",{"\uDFFF":1}]}', r"lone surrogate \udfff"),
        (b'{"a":"' + b'\\"' * 500_000, "not valid JSON"),
    ],
)
def test_malformed_bodies_say_what_is_wrong_and_fast(body: bytes, says: str) -> None:
    start_s = time.process_time()
    with pytest.raises(MalformedBody) as caught:
        parse_object(body)
    assert says in str(caught.value)
    assert time.process_time() - start_s < 0.5  # a quadratic scan would take minutes


def test_good_bodies_are_read_as_they_are() -> None:
    deep = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_object(deep)
    brackets = json.dumps({"a": "[" * 1000 + '\\"{'}).encode()
    assert parse_object(brackets) == {"a": "[" * 1000 + '\\"{'}
    assert parse_object(rb'{"a":"\ud83d\ude00"}') == {"a": "\N{GRINNING FACE}"}


# Ranges: (parser, field, bad values).

BAD_ANYWHERE: dict[str, list[Any]] = {
    "adapter_parameters": [{"ids": ["a"]}],
    "allowed_token_ids": [[1]],
    "bad_words": [["x"]],
    "guided_choice": [["a", "b"]],
    "guided_grammar": ["root ::= x"],
    "guided_json": [{}, {"type": "object"}],
    "guided_regex": ["a+"],
    "length_penalty": [0.5, 2],
    "logit_bias": [{"5": 1}, {str(i): 1 for i in range(10**5)}, [1]],
    "logits_processors": [["x"]],
    "merged_adapters": [{"ids": ["a"]}],
    "min_tokens": [5],
    "structured_outputs": [{"regex": "a"}],
    "use_beam_search": [True],
    "watermark": [True],
}
HARMLESS_ANYWHERE: dict[str, Any] = {
    "adapter_parameters": {},
    "allowed_token_ids": [],
    "bad_words": [],
    "best_of": 1,
    "guided_choice": [],
    "guided_grammar": "",
    "guided_regex": "",
    "length_penalty": 1.0,
    "logit_bias": {},
    "logits_processors": [],
    "min_tokens": 0,
    "response_format": {},
    "structured_outputs": {},
    "use_beam_search": False,
    "watermark": False,
}
BAD_NATIVE: dict[str, list[Any]] = {
    "temperature": [-1, -0.1, 1e308, "hot", True, []],
    "top_k": [0, -5, 2**40, 1.5],
    "top_p": [0, -0.0, 1.1, "x"],
    "typical_p": [0, 1.1],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, -1, 1e-300],
    "frequency_penalty": [-2.1, 3],
    "presence_penalty": [3],
    "max_new_tokens": [0, -1, 2**31, 2**63, 1.0, "5", True],
    "seed": [-1, 2**65, "x", 0.5],
    "stop": [["a"] * 1000, [""], "", ["x" * 1_000_000], [1], {}],
    "stop_token_ids": [[1000], [-1], [1.5], [True], "1"],
    "truncate": [0],
    "return_k_alternatives": [0, 21],
    "best_of": [2, 10**6, 0, -1, "2", True],
    "adapter_source": [3],
    "details": ["yes", 1],
    "do_sample": ["true"],
    "response_format": [
        {"type": "json_object"}, {"type": "json_schema", "schema": {}}, "text", {"schema": {}},
        {"type": "text", "schema": {}}, {"regex": "a"},
    ],
    "grammar": [{"type": "json", "value": {}}, "a"],
    "top_n_tokens": [5],
    **BAD_ANYWHERE,
}  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in BAD_NATIVE.items() for v in vs])
def test_native_refuses_by_name(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        native({name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300  # a huge value is not repeated


BAD_V1: dict[str, list[Any]] = {
    **BAD_ANYWHERE,
    "best_of": [2, 0, -1, "2"],
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "include_stop_str_in_output": [True],
    "prompt_logprobs": [1],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema"},
        {"schema": {}},
        {"json_schema": {"schema": {}}},
        {"type": "text", "json_schema": {}},
    ],
    "skip_special_tokens": [False],
    "suffix": ["x"],
    "tool_choice": ["required", {"type": "function"}],
    "tools": [[{"type": "function"}]],
    "truncate_prompt_tokens": [5, -1],
}
BAD_COMPLETION: dict[str, list[Any]] = {
    "n": [0, -1, 10**9, 9, 1.5, "2", True],
    "max_tokens": [0, -1, 2**31],
    "logprobs": [-1, 21, 10**6, True],
    "add_special_tokens": [1],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, {}],
    "temperature": [-1, 1e308],
    "top_k": [-5, 2**40],
    "prompt": [
        "", [], None, [""], ["a"] * 9, [1, "a"], ["a", 1], [[1], "a"], [[]], [1000], [-1], [1.5],
        [True], [[1000]], {}, 5, [None],
    ],
    "user": ["x" * 5000, 1],
    "metadata": [{str(i): "x" for i in range(10_000)}],
    **BAD_V1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in BAD_COMPLETION.items() for v in vs])
def test_completions_refuse_by_name(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        completion(**{name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


BAD_CHAT: dict[str, list[Any]] = {
    "messages": [
        None,
        [],
        "hi",
        ["hi"],
        [{"role": "user", "content": "x"}] * 100_000,
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    ],
    "top_logprobs": [3, 21, -1],
    "logprobs": [1],
    **BAD_V1,
    "max_completion_tokens": [0],
    "guideline": ["x"],
    "reasoning_effort": ["high"],
    "add_special_tokens": [True],
    "add_generation_prompt": [False],
    "continue_final_message": [True],
    "chat_template_kwargs": [{"enable_thinking": True}],
    "documents": [[{"text": "x"}]],
}


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in BAD_CHAT.items() for v in vs])
def test_chat_refuses_by_name(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chat(**{name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("parse", [lambda v: native({"best_of": v}), lambda v: chat(best_of=v)])
def test_a_best_of_that_means_nothing_is_out_of_range(parse: Any) -> None:
    for bad in (0, -1):
        with pytest.raises(InvalidParameter, match=f"must be between 1 and .* Given: {bad}"):
            parse(bad)
    with pytest.raises(InvalidParameter, match="must be an integer, not a string"):
        parse("2")
    with pytest.raises(InvalidParameter, match="does not support"):
        parse(2)


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


def test_the_numbers_are_in_the_message() -> None:
    with pytest.raises(InvalidParameter, match=r"`top_p` must be > 0.0 and <= 1.0. Given: 7"):
        native({"top_p": 7})
    with pytest.raises(InvalidParameter, match=r"at most 8 prompts, not 9"):
        completion(prompt=["a"] * 9)
    with pytest.raises(InvalidParameter, match=r"id 1000, but ids go from 0 to 999"):
        completion(prompt=[3, 1000])


# What absent, null and harmless fields mean.


def test_null_is_absent_everywhere() -> None:
    names = [*BAD_NATIVE, "api_token", "return_full_text", "decoder_input_details", "adapter_id"]
    assert native(dict.fromkeys(names)) == native()
    fields = [name for name in (*BAD_COMPLETION, *BAD_CHAT) if name not in ("prompt", "messages")]
    assert completion(**dict.fromkeys(fields)) == completion()
    assert chat(**dict.fromkeys(fields)).requests == chat().requests


def test_unknown_and_harmless_fields_change_nothing() -> None:
    call = parse_completion({"model": "", "prompt": "hi", "user": "u", "zzz": 1}, LIMITS)
    assert call.requests[0] == completion()
    assert call.unknown_fields == ("zzz",)
    harmless = {"tools": [], "tool_choice": "auto", "n": 1}
    text = {"type": "text", "schema": None}
    assert native({"response_format": text}) == native()
    assert completion(response_format=text) == completion()
    assert chat(**harmless, logit_bias={}, metadata={"a": "b"}).requests == chat().requests
    v1 = HARMLESS_ANYWHERE | {
        "functions": [],
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "suffix": "",
    }
    of_chat = {
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template_kwargs": {},
        "documents": [],
    }
    assert native(HARMLESS_ANYWHERE) == native()
    assert completion(**harmless, **v1) == completion()
    assert chat(**harmless, **v1, **of_chat).requests == chat().requests


def test_completions_may_leave_out_the_special_tokens() -> None:
    assert completion(add_special_tokens=True) == completion()
    assert not completion(add_special_tokens=False).add_special_tokens
    assert completion(prompt=[1], add_special_tokens=True) == completion(prompt=[1])


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


def test_v1_samples_at_one_unless_told_otherwise() -> None:
    assert completion().sampling.temperature == 1.0
    assert chat().requests[0].sampling.temperature == 1.0
    assert completion(temperature=0).sampling.temperature == 0.0
    assert completion(top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize("name", ["", "base", "__base_model__", "tiny/base"])
def test_the_base_models_names(name: str) -> None:
    assert completion(model=name).adapter_id is None
    assert native({"adapter_id": name}).adapter_id is None
    assert native({"adapter_id": name, "adapter_source": "hub"}).adapter_source is None


@pytest.mark.parametrize("name", ["sql", "org/sql", "a--b/c", "v1.2_x:3@r", "a" * 256])
def test_adapter_ids_that_are_names(name: str) -> None:
    assert native({"adapter_id": name}).adapter_id == name


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", "..%2f..%2f", "a/../../b",
        "....//", "a\0b", "a\nb", "a\u202eb", "a" * 10_000, ".", "..", "-rf", "a//b", "a/", " ",
        "http://169.254.169.254/x", "s3://bucket/path", "é",
    ],
)  # fmt: skip
def test_adapter_ids_that_can_name_nothing(name: str) -> None:
    for parse in (checked_adapter_id, lambda n: native({"adapter_id": n})):
        with pytest.raises(InvalidAdapterId):
            parse(name)


def test_sources() -> None:
    local = native({"adapter_id": "x", "adapter_source": "LOCAL"})
    assert local.adapter_source == "local"
    for source in ("hub", "s3", "pbase", "zzz"):
        with pytest.raises(InvalidParameter, match="adapter_source"):
            native({"adapter_id": "x", "adapter_source": source})


def test_prompts_of_every_form() -> None:
    def prompts(prompt: object, n: int = 1) -> list[object]:
        call = parse_completion({"model": "", "prompt": prompt, "n": n}, LIMITS)
        return [request.prompt for request in call.requests]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"], n=2) == ["a", "a", "b", "b"]
    assert prompts([1, 2]) == [(1, 2)]
    assert prompts([[1], [2, 3]]) == [(1,), (2, 3)]
    assert prompts("  ") == ["  "]
    assert not parse_completion({"model": "", "prompt": [1]}, LIMITS).requests[0].add_special_tokens
    with pytest.raises(InvalidParameter, match="makes 10 answers"):
        prompts(["a", "b"], n=5)


def test_samples_of_one_prompt_get_seeds_of_their_own() -> None:
    call = parse_completion({"model": "", "prompt": "a", "n": 3, "seed": 5}, LIMITS)
    assert [request.sampling.seed for request in call.requests] == [5, 6, 7]


def test_messages_keep_roles_and_join_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(
        messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    )
    assert [m.to_template() for m in call.messages] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab"},
    ]


def test_token_limits_agree_or_are_refused() -> None:
    assert chat(max_completion_tokens=7).requests[0].max_new_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).requests[0].max_new_tokens == 7
    with pytest.raises(InvalidParameter, match="is 7, but `max_tokens` is 8"):
        chat(max_completion_tokens=7, max_tokens=8)


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
)


@pytest.mark.parametrize("request_", [REQUEST, GenerateRequest("hi"), GenerateRequest("hi", "a")])
def test_what_the_client_writes_the_server_reads_back(request_: GenerateRequest) -> None:
    body = parse_object(dumps(render_request(request_, stream=False)).encode())
    assert parse_native(body, LIMITS).requests == (request_,)


def test_a_result_survives_the_way_to_the_client() -> None:
    tokens = (Token(5, "a", float("-inf"), False), Token(2, "", -0.5, True))
    result = GenerateResult(
        "a", FinishReason.STOP_SEQUENCE, tokens, (1, 2), 7, (), queue_s=0.1, total_s=2.5
    )
    show = Presentation(details=True, return_token_ids=True)
    sent = dumps(render_result(result, show, "prompt"))
    assert read_result(json.loads(sent)) == result


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidParameter("top_p", "must be small"),
        errors.PromptTooLong(9001, 5, 8192),
        errors.InvalidAdapterId("no"),
        errors.AdapterNotFound("x/y"),
        errors.AdapterInvalid("x", "adapter_model.safetensors", "NaN in layer 3"),
        errors.UnsupportedAdapter("x", "adapter_config.json", "DoRA", "changes the numbers"),
        errors.AdapterConflict("in use by 3 requests"),
        errors.Overloaded("queue full: 256", 2.5),
        errors.Unavailable("draining", 3.5),
        errors.RequestCancelled("gone"),
        errors.JLoraxError("broken"),
        MalformedBody("at byte 5"),
    ],
)
def test_an_error_survives_the_way_to_the_client(error: JLoraxError) -> None:
    for body in (
        render_native_error(error, "validation"),
        render_native_error(error, "generation"),
        render_openai_error(error, "invalid_request_error"),
    ):
        back = read_error(400, json.loads(dumps(body)))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, errors.InvalidRequest), (404, errors.AdapterNotFound), (429, errors.Overloaded),
     (503, errors.Unavailable), (500, JLoraxError), (502, JLoraxError)],
)  # fmt: skip
def test_another_servers_answer_is_read_by_its_status(status: int, kind: type[JLoraxError]) -> None:
    bodies: list[object] = [None, [], {"error": 3}, {"error": {"message": "x", "details": 5}}]
    for body in bodies:
        assert type(read_error(status, body, retry_after_s=4.0)) is kind


def test_adapters_both_ways() -> None:
    info = adapter_info("org/x", last_used_s=3.5)
    assert read_adapter(json.loads(dumps(render_adapter(info)))) == info
    load = parse_load_adapter({"adapter_id": "org/x", "folder": "a/b c"}, LIMITS)
    assert (load.adapter_id, load.folder) == ("org/x", "a/b c")
    for folder in ("", None, "/etc", "../x", "a/../../b", "C:\\x", "a\\..\\b", "a\0", "file:///x"):
        with pytest.raises(InvalidParameter, match="folder"):
            parse_load_adapter({"adapter_id": "x", "folder": folder}, LIMITS)
    with pytest.raises(errors.AdapterConflict, match="base model"):
        parse_load_adapter({"adapter_id": "tiny/base", "folder": "x"}, LIMITS)
