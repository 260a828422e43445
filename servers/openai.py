"""OpenAI's routes of answers: completions and chat completions."""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from jlorax.errors import JLoraxError
from jlorax.wire import openai as wire
from servers.failures import error_body
from servers.serving import (
    ENGINE,
    adapter_name,
    answer_headers,
    answers,
    common_headers,
    events_of,
    json_response,
    notes_of,
    read_generation,
    tokenized,
)
from servers.showing import ChatShow, CompletionShow, Show
from servers.sse import SseStream
from servers.streaming import stream_answer
from servers.tools import with_tools


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/completions", completions),
        web.post("/v1/chat/completions", chat_completions),
    ]


async def completions(request: web.Request) -> web.StreamResponse:
    call = await read_generation(request, wire.parse_completion)
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    return await _answer(request, CompletionShow(engine, await tokenized(engine, call)), headers)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    call = await read_generation(request, wire.parse_chat)
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    call = with_tools(engine, await tokenized(engine, call))
    return await _answer(request, ChatShow(engine, call), headers)


async def _answer(request: web.Request, show: Show, headers: dict[str, str]) -> web.StreamResponse:
    if show.call.show.stream:
        return await _stream(request, show, headers)
    results = await answers(show.engine, show.call, notes_of(request))
    headers |= answer_headers(results, show.call.num_prompts)
    return json_response(show.whole(results), headers=headers)


async def _stream(request: web.Request, show: Show, headers: dict[str, str]) -> web.StreamResponse:
    """An error after the first chunk is a last ``data: {"error"}``, without [DONE]."""

    async def send(stream: SseStream) -> None:
        await _send_chunks(request, show, stream)
        await stream.send_done()

    async def send_failure(stream: SseStream, failure: JLoraxError) -> None:
        await stream.send(error_body(failure, openai=True)[1])

    return await stream_answer(request, headers, send, send_failure)


async def _send_chunks(request: web.Request, show: Show, stream: SseStream) -> None:
    notes = notes_of(request)
    notes.adapter_id = adapter_name(show.call.requests[0])
    async with aclosing(events_of(show.engine, show.call)) as events:
        async for index, event in events:
            if event.result is not None:
                notes.count(event.result)
            for chunk in show.chunks(index, event):
                await stream.send_text(chunk)
    if show.call.show.include_usage:
        await stream.send(show.usage_chunk())
