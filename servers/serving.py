"""What every route shares: the engine as seen from here, reading a body, running a call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from aiohttp import web

from jlorax.config import ServerConfig
from jlorax.errors import InvalidParameter, JLoraxError, RequestCancelled
from jlorax.types import (
    AdapterInfo,
    ConstraintKind,
    EmbedRequest,
    EmbedResult,
    EngineStats,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    TokenEvent,
)
from jlorax.wire.call import Call, Limits
from jlorax.wire.strict_json import dumps, parse_object
from servers.chat import ChatTokenizer, chat_ids, chat_size

log = logging.getLogger("jlorax.http")

LONG_BODY_BYTES = 65536  # above this, parsing leaves the event loop
LONG_TEXT_CHARS = 4096  # above this, tokenizing does
BODY_DEADLINE_S = 30.0
SSE_COMMENT_S = 15.0  # silence after which a stream gets a comment, so that proxies keep it

_CONSTRAINT_KINDS = frozenset(kind.value for kind in ConstraintKind)

T = TypeVar("T")


class ServedTokenizer(ChatTokenizer, Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def tokenize_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> Sequence[tuple[int, str, int, int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def is_special(self, token_id: int) -> bool: ...


class ServedEngine(Protocol):
    """The seam: jlorax.engine.Engine, or a test's fake."""

    @property
    def model_info(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> ServedTokenizer: ...
    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]: ...
    async def embed(self, request: EmbedRequest) -> EmbedResult: ...
    async def chat_tokenizer(self, request: GenerateRequest) -> ChatTokenizer: ...
    async def load_adapter(
        self, adapter_id: str, folder: str, tenant: str = "default", replace: bool = False
    ) -> AdapterInfo: ...
    async def unload_adapter(
        self, adapter_id: str, tenant: str = "default", force: bool = False
    ) -> None: ...
    async def prefetch_adapter(self, adapter_id: str, tenant: str = "default") -> AdapterInfo: ...
    async def pin_adapter(
        self, adapter_id: str, tenant: str = "default", pinned: bool = True
    ) -> AdapterInfo: ...
    async def adapters(self, tenant: str = "default") -> list[AdapterInfo]: ...
    def stats(self) -> EngineStats: ...
    def metrics(self) -> bytes: ...
    async def drain(self) -> None: ...


ENGINE: web.AppKey[ServedEngine] = web.AppKey("engine")
CONFIG: web.AppKey[ServerConfig] = web.AppKey("config")
SSE_COMMENT: web.AppKey[float] = web.AppKey("sse_comment_s")


class NotJson(JLoraxError):
    """The body's type or encoding is not one that we read: 415."""

    code = "unsupported_media_type"


class BodyTimeout(JLoraxError):
    """The body did not arrive in time: 408."""

    code = "request_timeout"


@dataclass
class RequestNotes:
    """What a handler tells the request log. Never text."""

    adapter_id: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failure: str | None = None  # code of an error told inside a 200 stream

    def count(self, result: GenerateResult) -> None:
        self.prompt_tokens += len(result.prompt_token_ids)
        self.generated_tokens += len(result.tokens)


NOTES: web.RequestKey[RequestNotes] = web.RequestKey("notes", RequestNotes)
TENANT: web.RequestKey[str] = web.RequestKey("tenant", str)


def notes_of(request: web.Request) -> RequestNotes:
    return request[NOTES]


def tenant_of(request: web.Request) -> str:
    """Whose key came with it; ``servers.auth`` has seen to that."""
    return request[TENANT]


def limits_of(app: web.Application) -> Limits:
    info, config = app[ENGINE].model_info, app[CONFIG]
    return Limits(
        info.model_id,
        info.vocab_size,
        config.max_batch_prompts,
        config.max_best_of,
        max_input_tokens=info.max_seq_len - 1,
    )


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        text=dumps(body), status=status, headers=headers, content_type="application/json"
    )


async def read_call(request: web.Request, parse: Callable[[dict[str, Any]], T]) -> T:
    """The parsed body; long ones are parsed in a thread, so that the loop goes on."""
    body = await _read_body(request)

    def parsed() -> T:
        return parse(parse_object(body))

    if len(body) > LONG_BODY_BYTES:
        return await asyncio.to_thread(parsed)
    return parsed()


async def read_generation(
    request: web.Request, parse: Callable[[dict[str, Any], Limits], Call]
) -> Call:
    """A body that asks for answers, as its tenant's call."""
    limits = limits_of(request.app)
    call = await read_call(request, lambda body: parse(body, limits))
    check_unknown(request.app, call.unknown_fields)
    return as_tenant(request, call)


def as_tenant(request: web.Request, call: Call) -> Call:
    tenant = tenant_of(request)
    return replace(call, requests=tuple(replace(r, tenant=tenant) for r in call.requests))


def check_unknown(app: web.Application, names: Sequence[str]) -> None:
    """Fields that nobody reads are ignored, as clients of newer APIs need it, unless the server is
    strict."""
    if not names:
        return
    shown = ", ".join(repr(name[:64]) for name in names[:8])
    if app[CONFIG].strict_fields:
        raise InvalidParameter(names[0][:64], f"is read by nobody here. Unknown fields: {shown}")
    log.debug("%d unknown fields are ignored: %s", len(names), shown)


async def _read_body(request: web.Request) -> bytes:
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise NotJson(f"the Content-Type must be application/json, not {kind[:64]!r}")
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise NotJson(f"the Content-Encoding must be identity, not {encoding[:64]!r}")
    if (charset := (request.charset or "utf-8").lower()) not in ("utf-8", "utf8"):
        raise NotJson(f"the charset must be utf-8, not {charset[:64]!r}")
    cap = request.app[CONFIG].max_body_bytes
    if request.content_length is not None and request.content_length > cap:
        raise web.HTTPRequestEntityTooLarge(cap, request.content_length)
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await request.read()
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {BODY_DEADLINE_S:.0f} s") from None


async def tokenized(engine: ServedEngine, call: Call) -> Call:
    """Chat messages become token ids; text stays text, the engine tokenizes it.

    ``continuous_usage`` needs the prompt's length before the answer ends, so it tokenizes here.
    """
    if call.messages is not None:
        tokenizer = await engine.chat_tokenizer(call.requests[0])
        ids = await off_loop(chat_size(call), lambda: chat_ids(tokenizer, call))
        return call.with_prompts([ids])
    if call.show.continuous_usage:
        prompts = [await encoded(engine.tokenizer, request) for request in call.prompts]
        return call.with_prompts(prompts)
    return call


async def encoded(tokenizer: ServedTokenizer, request: GenerateRequest) -> tuple[int, ...]:
    prompt = request.prompt
    if isinstance(prompt, tuple):
        return prompt
    special = request.add_special_tokens
    return tuple(await off_loop(len(prompt), lambda: tokenizer.encode(prompt, special)))


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Runs ``work`` in a thread where it would hold the loop for long."""
    return await asyncio.to_thread(work) if num_chars > LONG_TEXT_CHARS else work()


def prompt_text(engine: ServedEngine, request: GenerateRequest) -> str:
    """The prompt as text, for echo and return_full_text."""
    prompt = request.prompt
    return prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)


async def answers(engine: ServedEngine, call: Call, notes: RequestNotes) -> list[GenerateResult]:
    """Every choice's whole answer, generated together; one failure cancels the others."""
    notes.adapter_id = adapter_name(call.requests[0])
    results: dict[int, GenerateResult] = {}
    async with aclosing(events_of(engine, call)) as events:
        async for choice, event in events:
            if event.result is not None:
                results[choice] = event.result
                notes.count(event.result)
    return [results[choice] for choice in range(len(call.requests))]


def events_of(engine: ServedEngine, call: Call) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """(choice, event) as they come, over all choices. Closing it cancels what still runs."""
    streams = [engine.generate(request) for request in call.requests]
    if call.constraint_field is not None:
        streams = [_naming(call.constraint_field, stream) for stream in streams]
    return _numbered(0, streams[0]) if len(streams) == 1 else _merged(streams)


async def _naming(
    constraint_field: str, stream: AsyncIterator[TokenEvent]
) -> AsyncIterator[TokenEvent]:
    """A refused constraint is known to the engine by its kind: its user knows the field."""
    try:
        async with aclosing(stream) as events:  # type: ignore[type-var]
            async for event in events:
                yield event
    except InvalidParameter as error:
        if error.name not in _CONSTRAINT_KINDS:
            raise
        reason = str(error).removeprefix(f"`{error.name}` ")
        raise InvalidParameter(constraint_field, reason) from None


async def _numbered(
    choice: int, stream: AsyncIterator[TokenEvent]
) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    is_whole = False
    async with aclosing(stream) as events:  # type: ignore[type-var]
        async for event in events:
            is_whole = event.result is not None
            yield choice, event
    if not is_whole:  # a stream may end only with its result
        raise RequestCancelled(f"answer {choice} was cut off")


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


@dataclass
class _Merge:
    """One bounded queue that all streams of a call feed: a slow reader slows them all."""

    streams: list[AsyncIterator[TokenEvent]]
    inbox: asyncio.Queue[tuple[int, TokenEvent] | _Ended] = field(init=False)

    def __post_init__(self) -> None:
        self.inbox = asyncio.Queue(maxsize=2 * len(self.streams))

    async def pump(self, choice: int) -> None:
        try:
            async with aclosing(_numbered(choice, self.streams[choice])) as events:
                async for item in events:
                    await self.inbox.put(item)
        except Exception as error:
            await self.inbox.put(_Ended(error))
        else:
            await self.inbox.put(_Ended(None))


async def _merged(
    streams: list[AsyncIterator[TokenEvent]],
) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    merge = _Merge(streams)
    pumps = [asyncio.create_task(merge.pump(choice)) for choice in range(len(streams))]
    num_open = len(pumps)
    try:
        while num_open:
            item = await merge.inbox.get()
            if not isinstance(item, _Ended):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                num_open -= 1
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def common_headers(engine: ServedEngine, call: Call) -> dict[str, str]:
    """The headers that streams have too."""
    first = call.requests[0]
    characters = sum(
        len(request.prompt) for request in call.prompts if isinstance(request.prompt, str)
    ) + sum(len(message.content) for message in call.messages or ())
    headers = {
        "x-compute-type": f"{header_text(engine.model_info.device)}+optimized",
        "x-compute-characters": str(characters),
        "x-model-id": header_text(engine.model_info.model_id),
    }
    if (name := adapter_name(first)) is not None:
        headers["x-adapter-id"] = name
        headers["x-adapter-source"] = first.adapter_source or "local"
    return headers


def adapter_name(request: GenerateRequest) -> str | None:
    """For headers and logs; a merge by all its names."""
    return request.adapter_id if request.merge is None else ",".join(request.merge.adapter_ids)


def answer_headers(results: Sequence[GenerateResult], num_prompts: int) -> dict[str, str]:
    """Counts are sums over the call; times, in ms, are those of its slowest answer."""
    prompt_tokens = count_prompt_tokens(results, num_prompts)
    generated = sum(len(result.tokens) for result in results)
    slow = max(results, key=lambda result: result.total_s)
    inference_s = slow.total_s - slow.queue_s
    decode_s = slow.total_s - slow.time_to_first_token_s
    times = {
        "x-total-time": slow.total_s,
        "x-compute-time": slow.total_s,
        "x-validation-time": 0.0,
        "x-queue-time": slow.queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, len(slow.tokens)),
        "x-time-to-first-token": slow.time_to_first_token_s,
        "x-time-per-output-token": decode_s / max(1, len(slow.tokens) - 1),
    }
    return {
        "x-prompt-tokens": str(prompt_tokens),
        "x-generated-tokens": str(generated),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(prompt_tokens + generated),
    } | {name: str(round(seconds * 1000)) for name, seconds in times.items()}


def count_prompt_tokens(results: Sequence[GenerateResult], num_prompts: int) -> int:
    """Each prompt once, however many answers it got."""
    step = len(results) // num_prompts
    return sum(len(result.prompt_token_ids) for result in results[::step])


def header_text(text: str) -> str:
    """Printable ASCII: a model's path may hold anything."""
    return quote(text, safe=" !#$&'()*+,/:;=?@[]~")
