"""What all routes share: strict JSON, adapters' names, errors both ways."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from jlorax import errors
from jlorax.errors import InvalidAdapterId, InvalidParameter, JLoraxError
from jlorax.types import GenerateRequest
from jlorax.wire.adapters import parse_load_adapter, read_adapter, render_adapter
from jlorax.wire.failures import read_error, render_native_error, render_openai_error
from jlorax.wire.fields import checked_adapter_id
from jlorax.wire.native import parse_native
from jlorax.wire.strict_json import MalformedBody, dumps, parse_object
from tests.fakes import adapter_info
from tests.wire_calls import LIMITS


def native(parameters: dict[str, Any] | None = None, **outer: Any) -> GenerateRequest:
    call = parse_native({"inputs": "hi", "parameters": parameters, **outer}, LIMITS)
    (request,) = call.requests
    return request


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


@pytest.mark.parametrize("name", ["", "base", "__base_model__", "tiny/base"])
def test_the_base_models_names(name: str) -> None:
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


# Both directions.


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
