"""LoRAX's own routes. Their clients find errors by ``error_type``, also inside a 200 stream."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Any

from aiohttp import hdrs, web

from jlorax.errors import InvalidParameter, JLoraxError, Overloaded, Unavailable
from jlorax.types import GenerateRequest
from jlorax.version import own_version
from jlorax.wire.call import Call
from jlorax.wire.exposition import metrics_as_json
from jlorax.wire.fields import MAX_STOP_SEQUENCES
from jlorax.wire.native import (
    parse_classify,
    parse_classify_batch,
    parse_embed,
    parse_native,
    render_answer,
    render_event,
)
from servers.failures import error_body
from servers.serving import (
    CONFIG,
    ENGINE,
    adapter_name,
    answer_headers,
    answers,
    common_headers,
    events_of,
    json_response,
    limits_of,
    notes_of,
    prompt_text,
    read_call,
    read_generation,
    tenant_of,
    tokenized,
)
from servers.sse import SseStream
from servers.streaming import stream_answer

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NotAClassifier(JLoraxError):
    """LoRAX classifies with models of another kind; with one like ours it answers 424."""

    code = "unsupported_task"


def routes() -> list[web.RouteDef]:
    return [
        web.post("/", compat_generate),
        web.post("/invocations", compat_generate),
        web.post("/generate", generate),
        web.post("/generate_stream", generate_stream),
        web.post("/embed", embed),
        web.post("/classify", classify),
        web.post("/classify_batch", classify_batch),
        web.get("/", health),
        web.get("/ping", health),
        web.get("/health", health),
        web.get("/startup", startup),
        web.get("/info", info),
        web.get("/metrics", metrics),
    ]


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """`/`: the field decides about streaming, and a whole answer comes in a list."""
    call = await _read(request, stream=None)
    return await (_stream(request, call) if call.show.stream else _whole(request, call, True))


async def generate(request: web.Request) -> web.StreamResponse:
    return await _whole(request, await _read(request, stream=False), False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    return await _stream(request, await _read(request, stream=True))


async def embed(request: web.Request) -> web.Response:
    limits, tenant = limits_of(request.app), tenant_of(request)
    asked = await read_call(request, lambda body: parse_embed(body, limits))
    notes = notes_of(request)
    notes.adapter_id = asked.adapter_id
    result = await request.app[ENGINE].embed(replace(asked, tenant=tenant))
    notes.prompt_tokens = result.num_tokens
    return json_response({"embeddings": list(result.embedding)})


async def classify(request: web.Request) -> web.Response:
    await read_call(request, parse_classify)
    raise _cannot_classify(request)


async def classify_batch(request: web.Request) -> web.Response:
    await read_call(request, parse_classify_batch)
    raise _cannot_classify(request)


def _cannot_classify(request: web.Request) -> NotAClassifier:
    model = request.app[ENGINE].model_info.model_id
    return NotAClassifier(f"the model {model!r} generates text: it has no classes of tokens")


async def health(request: web.Request) -> web.Response:
    """200 and nothing while requests are served; GET / and /ping say the same."""
    if request.app[ENGINE].stats().state == "ready":
        return web.Response()
    body = {"error": "unhealthy", "error_type": "healthcheck"}
    return json_response(body, 503, {"Retry-After": "5"})


async def startup(request: web.Request) -> web.Response:
    """200 and nothing once a real request was answered: LoRAX's probe for Kubernetes."""
    probe = GenerateRequest("Who?", tenant=tenant_of(request), max_new_tokens=1)
    try:
        await answers(request.app[ENGINE], Call((probe,)), notes_of(request))
    except (Overloaded, Unavailable):  # the requests of others, or a server that is ending
        raise
    except JLoraxError as error:
        return json_response({"error": str(error), "error_type": "failed healthcheck"}, 500)
    return web.Response()


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text, or LoRAX's JSON of it for who accepts JSON."""
    exposition = request.app[ENGINE].metrics()
    accepts_json = "application/json" in request.headers.get(hdrs.ACCEPT, "")
    wanted = request.query.get("format", "json" if accepts_json else "prometheus")
    if wanted not in ("json", "prometheus"):
        raise InvalidParameter("format", f"must be json or prometheus. Given: {wanted[:64]!r}")
    if wanted == "json":
        return json_response(metrics_as_json(exposition.decode()))
    return web.Response(body=exposition, headers={hdrs.CONTENT_TYPE: METRICS_TYPE})


async def info(request: web.Request) -> web.Response:
    """LoRAX's fields; null where we have no such thing. The last ones are ours."""
    model, config = request.app[ENGINE].model_info, request.app[CONFIG]
    return json_response(
        {
            "model_id": model.model_id,
            "model_sha": None,
            "model_dtype": model.dtype,
            "model_device_type": model.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": model.max_batch,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_length": model.max_seq_len - 1,
            "max_total_tokens": model.max_seq_len,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": model.max_batch * model.max_seq_len,
            "max_waiting_tokens": 0,
            "validation_workers": 0,
            "eager_prefill": False,
            "version": own_version(),
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "model_architecture": model.architecture,
            "max_batch_size": model.max_batch,
            "max_adapter_rank": model.max_rank,
            "max_active_adapters": model.max_slots,
        }
    )


async def _read(request: web.Request, stream: bool | None) -> Call:
    return await read_generation(request, lambda body, limits: parse_native(body, limits, stream))


async def _whole(request: web.Request, call: Call, in_list: bool) -> web.Response:
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    call = await tokenized(engine, call)
    results = await answers(engine, call, notes_of(request))
    is_special = engine.tokenizer.is_special
    body: Any = render_answer(call.shown(results), call.show, _echoed(request, call), is_special)
    headers |= answer_headers(results, call.num_prompts)
    return json_response([body] if in_list else body, headers=headers)


async def _stream(request: web.Request, call: Call) -> web.StreamResponse:
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    call = await tokenized(engine, call)

    async def send(stream: SseStream) -> None:
        await _send_events(request, call, stream)

    async def send_failure(stream: SseStream, failure: JLoraxError) -> None:
        await stream.send(error_body(failure, openai=False)[1])

    return await stream_answer(request, headers, send, send_failure)


async def _send_events(request: web.Request, call: Call, stream: SseStream) -> None:
    notes = notes_of(request)
    notes.adapter_id = adapter_name(call.requests[0])
    is_special = request.app[ENGINE].tokenizer.is_special
    echoed = _echoed(request, call)
    async with aclosing(events_of(request.app[ENGINE], call)) as events:
        async for _, event in events:
            if event.result is not None:
                notes.count(event.result)
            await stream.send(render_event(event, call.show, echoed, is_special))


def _echoed(request: web.Request, call: Call) -> str:
    return prompt_text(request.app[ENGINE], call.requests[0]) if call.show.echo else ""
