"""/v1/responses: one answer over items, whole or as OpenAI's named events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing

from aiohttp import web

from jlorax.errors import JLoraxError
from jlorax.types import TokenEvent
from jlorax.wire.call import Call
from jlorax.wire.responses import parse_response
from jlorax.wire.responses_answers import Event, ResponseWriter
from servers.failures import error_body
from servers.serving import (
    ENGINE,
    adapter_name,
    answer_headers,
    answers,
    as_tenant,
    check_unknown,
    common_headers,
    events_of,
    json_response,
    limits_of,
    notes_of,
    read_call,
    tokenized,
)
from servers.sse import SseStream
from servers.streaming import stream_answer
from servers.tools import AnswerReader, with_tools


def routes() -> list[web.RouteDef]:
    return [web.post("/v1/responses", responses)]


async def responses(request: web.Request) -> web.StreamResponse:
    limits, engine = limits_of(request.app), request.app[ENGINE]
    asked = await read_call(request, lambda body: parse_response(body, limits))
    check_unknown(request.app, asked.call.unknown_fields)
    call = as_tenant(request, asked.call)
    headers = common_headers(engine, call)
    call = with_tools(engine, await tokenized(engine, call))
    token_text = engine.tokenizer.token_text if call.show.logprobs else None
    writer = ResponseWriter(call.model, int(time.time()), asked.echo, token_text)
    if call.show.stream:
        return await _stream(request, call, writer, headers)
    (result,) = results = await answers(engine, call, notes_of(request))
    pieces = AnswerReader(engine, call).read(result)
    for _ in (*writer.add(result.tokens, pieces), *writer.end(result)):
        pass  # the events build the items
    headers |= answer_headers(results, call.num_prompts)
    return json_response(writer.whole(result), headers=headers)


async def _stream(
    request: web.Request, call: Call, writer: ResponseWriter, headers: dict[str, str]
) -> web.StreamResponse:
    async def send(stream: SseStream) -> None:
        await _send_events(request, call, writer, stream)

    async def send_failure(stream: SseStream, failure: JLoraxError) -> None:
        await _send(stream, writer.failed(error_body(failure, openai=True)[1]))

    return await stream_answer(request, headers, send, send_failure)


async def _send_events(
    request: web.Request, call: Call, writer: ResponseWriter, stream: SseStream
) -> None:
    engine = request.app[ENGINE]
    notes, reader = notes_of(request), AnswerReader(engine, call)
    notes.adapter_id = adapter_name(call.requests[0])
    async with aclosing(events_of(engine, call)) as events:
        async for _, event in events:
            if event.result is not None:
                notes.count(event.result)
            for shown in _events(writer, reader, event):
                await _send(stream, shown)


def _events(writer: ResponseWriter, reader: AnswerReader, event: TokenEvent) -> Iterator[Event]:
    if event.index == 0:
        yield from writer.begin()
    pieces = reader.push(event.token, is_last=event.result is not None)
    yield from writer.add((event.token,), pieces)
    if event.result is not None:
        yield from writer.end(event.result)


async def _send(stream: SseStream, event: Event) -> None:
    await stream.send_named(event["type"], event)
