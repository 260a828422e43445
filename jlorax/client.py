"""The client: the engine's verbs over HTTP, typed results, typed errors. No jax, no engine.

``AsyncClient`` does the work; ``Client`` runs the same coroutines on a loop thread of its own.
Answers are read from the native routes, whose details carry everything of a GenerateResult.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import aiohttp
from yarl import URL

from jlorax.errors import JLoraxError, RequestCancelled, Unavailable
from jlorax.types import (
    AdapterInfo,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    Token,
    TokenEvent,
)
from jlorax.wire.adapters import ModelCard, read_adapter, read_model
from jlorax.wire.failures import read_error
from jlorax.wire.native import read_details, read_result, read_token, render_request

DEFAULT_URL = "http://127.0.0.1:8080"
T = TypeVar("T")
Prompt = str | Sequence[int]
Message = Mapping[str, str]


class Options(TypedDict, total=False):
    """Everything of a GenerateRequest and its SamplingParams but the prompt, by the same names."""

    adapter_id: str | None
    adapter_source: str | None
    max_new_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_text: bool
    truncate: int | None
    num_top_logprobs: int
    prompt_logprobs: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None


_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)


def _request(prompt: Prompt, options: Options) -> GenerateRequest:
    given: dict[str, Any] = dict(options)
    unknown = given.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    sampling = {name: given.pop(name) for name in _SAMPLING & given.keys()}
    stop = given.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    return GenerateRequest(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        sampling=SamplingParams(**sampling),
        **given,
    )


class AsyncClient:
    """Talks to one server. Use as ``async with AsyncClient(url) as client``, or ``close()`` it.

    ``timeout_s`` bounds the silence between two pieces of an answer, not the whole answer.
    ``api_key``: for a server that wants one; without it, or with a wrong one, its calls raise
    Unauthorized, and Forbidden where the key is not good for them.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, timeout_s: float = 300.0, api_key: str | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GenerateResult:
        """One prompt's whole answer. Greedy unless ``temperature`` is above 0."""
        return await self._generate(render_request(_request(prompt, options), stream=False))

    def stream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncGenerator[TokenEvent, None]:
        """The answer token by token; the last event has the result. Leaving early cancels."""
        return self._stream(render_request(_request(prompt, options), stream=True))

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> GenerateResult:
        """As generate, over messages ``{"role", "content"}`` and the model's chat template."""
        return await self._generate(_chat_body(messages, options, stream=False))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[Options]
    ) -> AsyncGenerator[TokenEvent, None]:
        return self._stream(_chat_body(messages, options, stream=True))

    async def load_adapter(
        self, adapter_id: str, folder: str, replace: bool = False
    ) -> AdapterInfo:
        """Registers a folder under the server's root; ``replace``: the name may be taken."""
        body = {"adapter_id": adapter_id, "folder": folder, "replace": replace}
        return read_adapter(await self._json("POST", "/v1/adapters", body))

    async def unload_adapter(self, adapter_id: str, force: bool = False) -> None:
        query = "?force=true" if force else ""
        await self._json("DELETE", _adapter_path(adapter_id) + query)

    async def prefetch_adapter(self, adapter_id: str) -> AdapterInfo:
        """Has the server read it into RAM."""
        return read_adapter(await self._json("POST", f"{_adapter_path(adapter_id)}/prefetch"))

    async def pin_adapter(self, adapter_id: str, pinned: bool = True) -> AdapterInfo:
        """Has the server bring it to the device, to stay there until it is unpinned."""
        method = "POST" if pinned else "DELETE"
        return read_adapter(await self._json(method, f"{_adapter_path(adapter_id)}/pin"))

    async def adapters(self) -> list[AdapterInfo]:
        listed = await self._json("GET", "/v1/adapters")
        return [read_adapter(adapter) for adapter in listed["data"]]

    async def models(self) -> list[ModelCard]:
        """The base model first, then the adapters that stand on it."""
        listed = await self._json("GET", "/v1/models")
        return [read_model(model) for model in listed["data"]]

    async def health(self) -> bool:
        """Whether the server takes requests now; False also when nobody answers."""
        try:
            await self._json("GET", "/health")
        except Unavailable:
            return False
        return True

    async def _generate(self, body: Mapping[str, Any]) -> GenerateResult:
        return read_result(await self._json("POST", "/generate", body))

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        async with self._call(method, path, body) as response:
            await _raise_for_error(response)
            return json.loads(await response.read() or b"null")

    async def _stream(self, body: Mapping[str, Any]) -> AsyncGenerator[TokenEvent, None]:
        async with self._call("POST", "/generate_stream", body) as response:
            await _raise_for_error(response)
            tokens: list[Token] = []
            async with aclosing(_data_lines(response)) as lines:
                async for line in lines:
                    event = _read_event(json.loads(line), tokens, response.status)
                    yield event
                    if event.result is not None:
                        return
        raise RequestCancelled(f"the stream ended after {len(tokens)} tokens without a result")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> _Call:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)
        # quoted already: yarl would decode %2F in an adapter's id
        url = self._url + path
        return _Call(self._session, method, url, body)


class _Call:
    """One HTTP exchange; a connection that fails is Unavailable, like a server that says so."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
    ) -> None:
        self._url = url
        self._request = session.request(method, URL(url, encoded=True), json=body)

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            return await self._request.__aenter__()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"{self._url} cannot be reached: {error}") from error

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._request.__aexit__(kind, error, trace)
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise Unavailable(f"{self._url} broke off its answer: {error}") from error


def _chat_body(messages: Sequence[Message], options: Options, stream: bool) -> dict[str, Any]:
    options = {"include_stop_text": False, **options}
    return render_request(_request("", options), stream, [dict(message) for message in messages])


def _adapter_path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id, safe='')}"


async def _raise_for_error(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        body = json.loads(await response.read())
    except ValueError:  # a proxy's page
        body = None
    retry_after = response.headers.get("Retry-After", "")
    raise read_error(response.status, body, float(retry_after) if retry_after.isdigit() else None)


async def _data_lines(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event; comments and blank lines are skipped."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _read_event(body: Mapping[str, Any], tokens: list[Token], status: int) -> TokenEvent:
    """One event; ``tokens`` collects them, for the last event's result."""
    if "error" in body:
        raise read_error(status, body)
    token = read_token(body["token"])
    tokens.append(token)
    result = None
    if body["details"] is not None:
        result = read_details(body["details"], body["generated_text"], tuple(tokens))
    return TokenEvent(token=token, index=len(tokens) - 1, result=result)


class Client:
    """The same verbs, blocking. Each Client has one thread; ``close()`` or ``with`` ends it."""

    def __init__(
        self, url: str = DEFAULT_URL, *, timeout_s: float = 300.0, api_key: str | None = None
    ) -> None:
        self._client = AsyncClient(url, timeout_s=timeout_s, api_key=api_key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="jlorax-client", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GenerateResult:
        return self._run(self._client.generate(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[TokenEvent]:
        return self._iterate(self._client.stream(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> GenerateResult:
        return self._run(self._client.chat(messages, **options))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[Options]
    ) -> Iterator[TokenEvent]:
        return self._iterate(self._client.stream_chat(messages, **options))

    def load_adapter(self, adapter_id: str, folder: str, replace: bool = False) -> AdapterInfo:
        return self._run(self._client.load_adapter(adapter_id, folder, replace))

    def unload_adapter(self, adapter_id: str, force: bool = False) -> None:
        self._run(self._client.unload_adapter(adapter_id, force))

    def prefetch_adapter(self, adapter_id: str) -> AdapterInfo:
        return self._run(self._client.prefetch_adapter(adapter_id))

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> AdapterInfo:
        return self._run(self._client.pin_adapter(adapter_id, pinned))

    def adapters(self) -> list[AdapterInfo]:
        return self._run(self._client.adapters())

    def models(self) -> list[ModelCard]:
        return self._run(self._client.models())

    def health(self) -> bool:
        return self._run(self._client.health())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise JLoraxError("this Client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C here must end the request there
            future.cancel()
            raise

    def _iterate(self, events: AsyncGenerator[TokenEvent, None]) -> Iterator[TokenEvent]:
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._run(_close(events))


async def _next(events: AsyncGenerator[TokenEvent, None]) -> TokenEvent | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[TokenEvent, None]) -> None:
    await events.aclose()
