"""LoRAX's own routes. Their clients find errors by ``error_type``, also inside a 200 stream."""

from __future__ import annotations

from contextlib import aclosing
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web

from jlorax.errors import JLoraxError
from jlorax.wire.call import Call
from jlorax.wire.fields import MAX_STOP_SEQUENCES
from jlorax.wire.native import parse_native, parse_tokenize, render_event, render_result
from servers.failures import error_body, unexpected
from servers.serving import (
    ENGINE,
    SSE_COMMENT,
    answer_headers,
    answers,
    common_headers,
    events_of,
    json_response,
    notes_of,
    off_loop,
    prompt_text,
    read_call,
    read_generation,
    tokenized,
)
from servers.sse import SseStream, sse_stream

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def routes() -> list[web.RouteDef]:
    return [
        web.post("/", compat_generate),
        web.post("/invocations", compat_generate),
        web.post("/generate", generate),
        web.post("/generate_stream", generate_stream),
        web.post("/tokenize", tokenize),
        web.get("/", health),
        web.get("/ping", health),
        web.get("/health", health),
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


async def tokenize(request: web.Request) -> web.Response:
    text, special = await read_call(request, parse_tokenize)
    tokenizer = request.app[ENGINE].tokenizer
    pieces = await off_loop(len(text), lambda: tokenizer.tokenize_with_offsets(text, special))
    return json_response(
        [
            {"id": id_, "text": piece, "start": start, "stop": stop}
            for id_, piece, start, stop in pieces
        ]
    )


async def health(request: web.Request) -> web.Response:
    """200 and nothing while requests are served; GET / and /ping say the same."""
    if request.app[ENGINE].stats().state == "ready":
        return web.Response()
    body = {"error": "unhealthy", "error_type": "healthcheck"}
    return json_response(body, 503, {"Retry-After": "5"})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[ENGINE].metrics(), headers={"Content-Type": METRICS_TYPE})


async def info(request: web.Request) -> web.Response:
    """LoRAX's fields; null where we have no such thing. The last ones are ours."""
    model = request.app[ENGINE].model_info
    return json_response(
        {
            "model_id": model.model_id,
            "model_sha": None,
            "model_dtype": model.dtype,
            "model_device_type": model.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": model.max_batch,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_length": model.max_seq_len - 1,
            "max_total_tokens": model.max_seq_len,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": model.max_batch * model.max_seq_len,
            "max_waiting_tokens": 0,
            "validation_workers": 0,
            "eager_prefill": False,
            "version": server_version(),
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "model_architecture": model.architecture,
            "max_batch_size": model.max_batch,
            "max_adapter_rank": model.max_rank,
            "max_active_adapters": model.max_slots,
        }
    )


@cache
def server_version() -> str:
    try:
        return version("jlorax")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


async def _read(request: web.Request, stream: bool | None) -> Call:
    return await read_generation(request, lambda body, limits: parse_native(body, limits, stream))


async def _whole(request: web.Request, call: Call, in_list: bool) -> web.Response:
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    call = await tokenized(engine, call)
    results = await answers(engine, call, notes_of(request))
    body: Any = render_result(results[0], call.show, _echoed(request, call))
    headers |= answer_headers(results, call.num_prompts)
    return json_response([body] if in_list else body, headers=headers)


async def _stream(request: web.Request, call: Call) -> web.StreamResponse:
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    call = await tokenized(engine, call)
    async with sse_stream(request, headers, request.app[SSE_COMMENT]) as stream:
        try:
            await _send_events(request, call, stream)
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.is_open:
                raise
            failure = error if isinstance(error, JLoraxError) else unexpected(error)
            notes_of(request).failure = failure.code
            await stream.send(error_body(failure, openai=False)[1])
        return await stream.finish()


async def _send_events(request: web.Request, call: Call, stream: SseStream) -> None:
    notes = notes_of(request)
    notes.adapter_id = call.requests[0].adapter_id
    echoed = _echoed(request, call)
    async with aclosing(events_of(request.app[ENGINE], call)) as events:
        async for _, event in events:
            if event.result is not None:
                notes.count(event.result)
            await stream.send(render_event(event, call.show, echoed))


def _echoed(request: web.Request, call: Call) -> str:
    return prompt_text(request.app[ENGINE], call.requests[0]) if call.show.echo else ""
