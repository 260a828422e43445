"""OpenAI's routes: completions, chat and models."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from jlorax.errors import JLoraxError
from jlorax.types import GenerateResult, TokenEvent
from jlorax.wire import openai as wire
from jlorax.wire.adapters import ModelCard, render_model
from jlorax.wire.call import Call
from jlorax.wire.strict_json import dumps
from servers.failures import error_body, unexpected
from servers.native import server_version
from servers.serving import (
    ENGINE,
    SSE_COMMENT,
    ServedEngine,
    answer_headers,
    answers,
    common_headers,
    count_prompt_tokens,
    events_of,
    json_response,
    notes_of,
    prompt_text,
    read_generation,
    tenant_of,
    tokenized,
)
from servers.sse import SseStream, sse_stream


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/completions", completions),
        web.post("/v1/chat/completions", chat_completions),
        web.get("/v1/models", models),
    ]


async def completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, await read_generation(request, wire.parse_completion), chat=False)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, await read_generation(request, wire.parse_chat), chat=True)


async def models(request: web.Request) -> web.Response:
    """The base model, then the tenant's own adapters and those of all, the base as ``parent``."""
    engine = request.app[ENGINE]
    base = engine.model_info.model_id
    cards = [ModelCard(base, None)]
    infos = await engine.adapters(tenant_of(request))
    cards += [ModelCard(info.adapter_id, base) for info in infos]
    now_s = int(time.time())
    return json_response({"object": "list", "data": [render_model(c, now_s) for c in cards]})


async def _answer(request: web.Request, call: Call, chat: bool) -> web.StreamResponse:
    engine = request.app[ENGINE]
    headers = common_headers(engine, call)
    show = _Show(engine, await tokenized(engine, call), chat)
    if call.show.stream:
        return await _stream(request, show, headers)
    results = await answers(engine, show.call, notes_of(request))
    headers |= answer_headers(results, show.call.num_prompts)
    return json_response(show.whole(results), headers=headers)


async def _stream(request: web.Request, show: _Show, headers: dict[str, str]) -> web.StreamResponse:
    """An error after the first chunk is a last ``data: {"error"}``, without [DONE]."""
    async with sse_stream(request, headers, request.app[SSE_COMMENT]) as stream:
        try:
            await _send_chunks(request, show, stream)
            await stream.send_done()
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.is_open:
                raise
            failure = error if isinstance(error, JLoraxError) else unexpected(error)
            notes_of(request).failure = failure.code
            await stream.send(error_body(failure, openai=True)[1])
        return await stream.finish()


async def _send_chunks(request: web.Request, show: _Show, stream: SseStream) -> None:
    notes = notes_of(request)
    notes.adapter_id = show.call.requests[0].adapter_id
    async with aclosing(events_of(show.engine, show.call)) as events:
        async for choice, event in events:
            if event.result is not None:
                notes.count(event.result)
            for chunk in show.chunks(choice, event):
                await stream.send_text(chunk)
    if show.call.show.include_usage:
        await stream.send(show.usage_chunk())


@dataclass
class _Show:
    """Shows one call's answers; while streaming it counts what it has shown."""

    engine: ServedEngine
    call: Call
    chat: bool
    envelope: wire.Envelope = field(init=False)
    is_detailed: bool = field(init=False)  # whether a chunk says more of its token than the text
    results: dict[int, GenerateResult] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    num_chars: dict[int, int] = field(default_factory=dict)
    frames: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.envelope = wire.Envelope(
            id=f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            created_s=int(time.time()),
            model=self.call.model,
            fingerprint=f"jlorax-{server_version()}",
        )
        show = self.call.show
        self.is_detailed = show.logprobs or show.return_token_ids or show.continuous_usage

    def whole(self, results: list[GenerateResult]) -> dict[str, Any]:
        usage = wire.usage(
            count_prompt_tokens(results, self.call.num_prompts),
            sum(len(result.tokens) for result in results),
        )
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self.envelope.around(kind, choices, usage=usage)

    def chunks(self, choice: int, event: TokenEvent) -> list[str]:
        """JSON, one chunk a token; chat ends with an empty delta of its own, as OpenAI's does.

        Chunks in the middle of an answer differ in their text alone, so they are built once.
        """
        first = choice not in self.num_tokens
        self.num_tokens[choice] = self.num_tokens.get(choice, 0) + 1
        if first or event.result is not None or self.is_detailed:
            return [dumps(chunk) for chunk in self._whole_chunks(choice, event, first)]
        if choice not in self.frames:
            self.frames[choice] = self._frame(choice, event)
        head, tail = self.frames[choice]
        return [head + dumps(event.token.text) + tail]

    def _frame(self, choice: int, event: TokenEvent) -> tuple[str, str]:
        """What stands before and after the text."""
        mark = uuid.uuid4().hex  # no name of a model can be it
        marked = replace(event, token=replace(event.token, text=mark))
        (chunk,) = self._whole_chunks(choice, marked, first=False)
        head, tail = dumps(chunk).split(dumps(mark))
        return head, tail

    def _whole_chunks(self, choice: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        if event.result is not None:
            self.results[choice] = event.result
        choices = (
            self._chat_deltas(choice, event, first)
            if self.chat
            else self._completion_deltas(choice, event, first)
        )
        return [self._chunk([shown]) for shown in choices]

    def usage_chunk(self) -> dict[str, Any]:
        results = [self.results[choice] for choice in range(len(self.call.requests))]
        counts = wire.usage(
            count_prompt_tokens(results, self.call.num_prompts),
            sum(len(result.tokens) for result in results),
        )
        return self.envelope.around(self._chunk_kind(), [], usage=counts)

    def _choice(self, index: int, result: GenerateResult) -> dict[str, Any]:
        token_text = self.engine.tokenizer.token_text
        if self.chat:
            return wire.chat_choice(index, result, self.call.show, token_text)
        echoed = self._echoed(index)
        return wire.completion_choice(index, result, self.call.show, echoed, token_text)

    def _chat_deltas(self, choice: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        show, token_text = self.call.show, self.engine.tokenizer.token_text
        shown = [wire.chat_delta(choice, event.token, show, first, token_text)]
        return [*shown, wire.chat_end(choice, event.result, show)] if event.result else shown

    def _completion_deltas(
        self, choice: int, event: TokenEvent, first: bool
    ) -> list[dict[str, Any]]:
        """With echo the prompt comes as a chunk of its own before the first token."""
        token_text = self.engine.tokenizer.token_text
        echoed = self._echoed(choice) if first else ""
        offset = self.num_chars.get(choice, len(echoed))
        self.num_chars[choice] = offset + len(event.token.text)
        shown = [] if not echoed else [wire.echo_delta(choice, echoed)]
        delta = wire.completion_delta(
            choice, event.token, event.result, self.call.show, offset, token_text
        )
        return [*shown, delta]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        show = self.call.show
        if show.continuous_usage:
            return self._around(choices, usage=self._usage_so_far())
        return self._around(choices, usage=None) if show.include_usage else self._around(choices)

    def _around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self.envelope.around(self._chunk_kind(), choices, **more)

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _usage_so_far(self) -> dict[str, int]:
        """Prompts are token ids here: serving.tokenized saw to it."""
        prompts = self.call.requests[:: len(self.call.requests) // self.call.num_prompts]
        prompt_tokens = sum(len(request.prompt) for request in prompts)
        return wire.usage(prompt_tokens, sum(self.num_tokens.values()))

    def _echoed(self, choice: int) -> str:
        if not self.call.show.echo:
            return ""
        return prompt_text(self.engine, self.call.requests[choice])
