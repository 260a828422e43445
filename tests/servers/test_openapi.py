"""The OpenAPI document says what is served: its routes, the fields that are read, the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from aiohttp import hdrs

from jlorax.config import ServerConfig
from jlorax.wire.adapters import parse_load_adapter, parse_load_lora, parse_unload_lora
from jlorax.wire.call import Limits
from jlorax.wire.embeddings import parse_embeddings
from jlorax.wire.fields import Fields
from jlorax.wire.fine_tuning import parse_create_job
from jlorax.wire.native import (
    parse_classify,
    parse_classify_batch,
    parse_embed,
    parse_native,
    parse_tokenize,
)
from jlorax.wire.openai import parse_chat, parse_completion
from jlorax.wire.responses import parse_response
from jlorax.wire.tokens import parse_detokenize, parse_tokenize_call
from servers.failures import _TABLE
from servers.openapi import document
from servers.rest import create_app
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving
from tests.servers.test_auth import LOCKED, A, bearer

LIMITS = Limits("tiny/base", 1000, 8)
DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
CHAT = [{"role": "user", "content": "hi"}]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].removeprefix("#/components/schemas/")
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def check(name: str, answer: Any) -> None:
    """That an answer is as the schema of this name says."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    jsonschema.Draft202012Validator(schema).validate(answer)


def test_every_route_is_described_and_none_else() -> None:
    app = create_app(FakeEngine(), ServerConfig())
    served = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != hdrs.METH_HEAD
    }
    assert {(method, path) for method, path, _ in operations()} == served


def test_every_schema_is_one_and_is_used() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert set(references(DOCUMENT)) == set(SCHEMAS)
    for _, path, operation in operations():
        names = set(re.findall(r"{(\w+)}", path))
        in_path = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert in_path == names


Parse = Callable[[], Any]
BODIES: list[tuple[str, int, list[Parse]]] = [
    ("GenerateParameters", 1, [lambda: parse_native({"inputs": "hi"}, LIMITS)]),
    ("EmbedRequest", 0, [lambda: parse_embed({"inputs": "hi"}, LIMITS)]),
    ("ClassifyRequest", 0, [lambda: parse_classify({"inputs": "hi"})]),
    ("BatchClassifyRequest", 0, [lambda: parse_classify_batch({"inputs": ["hi"]})]),
    ("CompletionRequest", 0, [lambda: parse_completion({"model": "", "prompt": "hi"}, LIMITS)]),
    ("ChatRequest", 0, [lambda: parse_chat({"model": "", "messages": CHAT}, LIMITS)]),
    ("ResponseRequest", 0, [lambda: parse_response({"model": "", "input": "hi"}, LIMITS)]),
    ("EmbeddingsRequest", 0, [lambda: parse_embeddings({"model": "", "input": "hi"}, LIMITS)]),
    ("TokenizeRequest", 0, [
        lambda: parse_tokenize({"inputs": "hi"}),
        lambda: parse_tokenize_call({"prompt": "hi"}),
        lambda: parse_tokenize_call({"messages": CHAT}),
    ]),
    ("DetokenizeRequest", 0, [lambda: parse_detokenize({"tokens": [1]}, LIMITS)]),
    ("LoadAdapter", 0, [lambda: parse_load_adapter({"adapter_id": "x", "folder": "x"}, LIMITS)]),
    ("LoadLora", 0, [lambda: parse_load_lora({"lora_name": "x", "lora_path": "x"}, LIMITS)]),
    ("CreateFineTuningJob", 0, [
        lambda: parse_create_job({"model": "", "training_file": "file-1"}, LIMITS)
    ]),
    ("UnloadLora", 0, [lambda: parse_unload_lora({"lora_name": "x"}, LIMITS)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "parsers"), BODIES, ids=[body[0] for body in BODIES])
def test_the_fields_that_are_read_are_described(
    name: str, place: int, parsers: list[Parse], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``place``: which object of those that a parser reads, in their order."""
    made: list[Fields] = []
    init = Fields.__init__

    def remember(self: Fields, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Fields, "__init__", remember)
    read: set[str] = set()
    for parse in parsers:
        made.clear()
        parse()
        read |= set(made[place].known())
    if name == "EmbedRequest":  # it looks for parameters beside `parameters`, to tell their place
        read -= {"adapter_id", "adapter_source", "api_token", "merged_adapters"}
    schema = SCHEMAS[name]
    described = set(schema["properties"])
    refused = set(schema.get("x-refused", ()))
    assert described | refused == read
    assert not described & refused


def test_a_generate_request_has_its_three_fields() -> None:
    assert set(SCHEMAS["GenerateRequest"]["properties"]) == {"inputs", "parameters", "stream"}


@pytest.mark.parametrize(
    ("path", "place"), [("/generate", 0), ("/v1/completions", 1), ("/v1/responses", 1)]
)
def test_every_status_of_an_error_is_described(path: str, place: int) -> None:
    statuses = {str(row[1 + place][0]) for row in _TABLE}
    described = set(DOCUMENT["paths"][path]["post"]["responses"])
    assert statuses <= described | {"424", "507"}  # 507: of uploads alone
    assert "200" in described and "413" in described


@in_loop
async def test_it_is_served_at_both_places_and_a_page_shows_it() -> None:
    async with serving() as server:
        for path in ("/openapi.json", "/api-doc/openapi.json"):
            answer = await server.get(path)
            assert answer.status == 200
            assert answer.json == DOCUMENT
        page = await server.get("/docs")
        assert page.status == 200
        assert page.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert not re.search(r"(src|href)=.?https?:|//[a-z]+\.[a-z]", page.text)  # nobody else's
        assert 'fetch("openapi.json"' in page.text


@in_loop
async def test_with_keys_the_document_needs_one_and_the_page_none() -> None:
    async with serving(config=LOCKED) as server:
        assert (await server.get("/docs")).status == 200
        assert (await server.get("/openapi.json")).status == 401
        assert (await server.get("/openapi.json", headers=bearer(A))).json == DOCUMENT


@in_loop
async def test_answers_are_as_described() -> None:
    engine = FakeEngine(registered={"a": adapter_info("a")})
    parameters = {
        "details": True,
        "decoder_input_details": True,
        "return_k_alternatives": 2,
        "top_n_tokens": 2,
        "best_of": 2,
        "do_sample": True,
        "return_token_ids": True,
    }
    streamed = {
        k: v for k, v in parameters.items() if k not in ("decoder_input_details", "best_of")
    }
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("GenerateResponse", "/generate", {"inputs": "hi"}),
        ("GenerateResponse", "/generate", {"inputs": "hi", "parameters": parameters}),
        ("EmbedResponse", "/embed", {"inputs": "hi"}),
        ("Pieces", "/tokenize", {"inputs": "hi"}),
        ("TokenIds", "/tokenize", {"prompt": "hi", "return_token_strs": True}),
        ("Detokenized", "/detokenize", {"tokens": [104]}),
        ("Completion", "/v1/completions", {"model": "", "prompt": ["a", "b"], "logprobs": 2}),
        ("Chat", "/v1/chat/completions", {"model": "a", "messages": CHAT, "n": 2}),
        ("Response", "/v1/responses", {"model": "", "input": "hi"}),
        ("Embeddings", "/v1/embeddings", {"model": "", "input": ["a", "b"]}),
        ("Embeddings", "/v1/embeddings",
         {"model": "", "input": "a", "encoding_format": "base64"}),
    ]  # fmt: skip
    async with serving(engine) as server:
        for name, path, body in asked:
            answer = await server.post(path, body)
            assert answer.status == 200, (path, answer.text)
            check(name, answer.json)
        events = await server.post("/generate_stream", {"inputs": "hi", "parameters": streamed})
        for event in events.events:
            check("StreamResponse", event)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        for name, path, body in (
            ("CompletionChunk", "/v1/completions", {"model": "", "prompt": "a", **usage}),
            ("ChatChunk", "/v1/chat/completions", {"model": "", "messages": CHAT, **usage}),
            ("ResponseEvent", "/v1/responses", {"model": "", "input": "a", "stream": True}),
        ):
            chunks = (await server.post(path, body)).events
            for chunk in chunks if chunks[-1] != "[DONE]" else chunks[:-1]:
                check(name, chunk)
        check("Info", (await server.get("/info")).json)
        check("Metrics", (await server.get("/metrics?format=json")).json)
        check("AdapterList", (await server.get("/v1/adapters")).json)
        check("ModelList", (await server.get("/v1/models")).json)
        check("Model", (await server.get("/v1/models/a")).json)
        check("Adapter", (await server.post("/v1/adapters/a/prefetch", {})).json)
        check("Error", (await server.post("/generate", {})).json)
        check("OpenAIError", (await server.post("/v1/completions", {})).json)
        engine.state = "dead"
        check("Error", (await server.get("/health")).json)


@in_loop
async def test_what_the_schema_allows_is_accepted_and_what_it_forbids_is_not() -> None:
    """The limits of a field are the parser's."""
    async with serving(FakeEngine(registered={"a": adapter_info("a")})) as server:
        for name, field in SCHEMAS["GenerateParameters"]["properties"].items():
            beside = {"adapter_id": "a"} if name == "adapter_scale" else {"do_sample": True}
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if bound not in field or field[bound] in (2**31 - 1, 2**31 - 2):
                    continue  # `truncate` and `best_of` have the server's own limits
                inside = {"inputs": "hi", "parameters": beside | {name: field[bound]}}
                assert (await server.post("/generate", inside)).status == 200, (name, bound)
                outside = {"inputs": "hi", "parameters": beside | {name: field[bound] + step}}
                assert (await server.post("/generate", outside)).status == 422, (name, bound)
