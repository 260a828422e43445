"""The client: the engine's verbs over HTTP, typed results, typed errors. No jax, no engine.

``AsyncClient`` does the work; ``Client`` runs the same coroutines on a loop thread of its own.
Answers are read from the native routes, whose details carry everything of a GenerateResult; tools
are offered by way of OpenAI's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack
from urllib.parse import quote

import aiohttp

from jlorax.client_fine_tuning import (
    AsyncFinetuneJob,
    FinetunedAdapter,
    FinetuneJob,
    finished,
    list_jobs,
    start_job,
)
from jlorax.client_http import Body, Exchange, data_lines
from jlorax.errors import RequestCancelled, Unavailable
from jlorax.jobs.types import TrainingJob
from jlorax.loop_thread import LoopThread
from jlorax.types import AdapterInfo, GenerateResult, Token, TokenEvent
from jlorax.wire.adapters import ModelCard, read_adapter, read_model
from jlorax.wire.failures import read_error
from jlorax.wire.native_client import (
    TextPiece,
    read_details,
    read_pieces,
    read_result,
    read_results,
    read_token,
    render_request,
)
from jlorax.wire.openai_client import (
    ChatAnswer,
    read_chat,
    read_embed,
    render_chat,
    render_embed,
)
from jlorax.wire.options import Message, Options, Prompt, chat_options, request_of

DEFAULT_URL = "http://127.0.0.1:8080"


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
        return read_result(await self._generate(render_request(request_of(prompt, options))))

    async def generate_best_of(
        self, prompt: Prompt, best_of: int, **options: Unpack[Options]
    ) -> list[GenerateResult]:
        """So many sampled answers to one prompt, the likeliest (by its mean log-probability) first.
        They need a ``temperature`` and take no ``seed``."""
        body = render_request(request_of(prompt, options), best_of=best_of)
        return read_results(await self._generate(body))

    def stream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncGenerator[TokenEvent, None]:
        """The answer token by token; the last event has the result. Leaving early cancels."""
        return self._stream(render_request(request_of(prompt, options)))

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> GenerateResult:
        """As generate, over messages ``{"role", "content"}`` and the model's chat template."""
        return read_result(await self._generate(_chat_body(messages, options)))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[Options]
    ) -> AsyncGenerator[TokenEvent, None]:
        return self._stream(_chat_body(messages, options))

    async def chat_with_tools(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **options: Unpack[Options],
    ) -> ChatAnswer:
        """A chat in which the model may call ``tools``, given and chosen in OpenAI's words. What it
        called is answered with ``answer.message()`` and then a message of the role "tool" a call.
        """
        body = render_chat(messages, request_of("", chat_options(options)))
        body |= {"tools": [dict(tool) for tool in tools], "tool_choice": tool_choice}
        body |= {} if parallel_tool_calls else {"parallel_tool_calls": False}
        return read_chat(await self._json("POST", "/v1/chat/completions", body))

    async def embed(
        self, prompts: Sequence[Prompt], adapter_id: str | None = None
    ) -> list[tuple[float, ...]]:
        """A vector for each prompt, of the model's width."""
        body = render_embed(prompts, adapter_id)
        return read_embed(await self._json("POST", "/v1/embeddings", body))

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[TextPiece]:
        """The model's tokens of a text, each with its place there."""
        body = {"inputs": text, "add_special_tokens": add_special_tokens}
        return read_pieces(await self._json("POST", "/tokenize", body))

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

    async def finetune(
        self, dataset: Any, *, name: str | None = None, validation: Any = None, **training: Any
    ) -> FinetunedAdapter:
        """Trains a LoRA on the server and returns it when it is there, to be used at once.

        dataset, validation: a file, a list of dicts or a DataFrame, as ``jlorax.finetune`` has it.
        name: its versions are NAME/1, NAME/2. training: any key of a configuration (``rank``,
        ``epochs``, ``learning_rate``, ...). Raises TrainingFailed with the reason, or
        RequestCancelled; cancelling this cancels the training.
        """
        job = await self.start_finetune(dataset, name=name, validation=validation, **training)
        return await finished(job)

    async def start_finetune(
        self, dataset: Any, *, name: str | None = None, validation: Any = None, **training: Any
    ) -> AsyncFinetuneJob:
        """As ``finetune``, but returns the job once it is queued."""
        given = {"name": name, "validation": validation, "training": training}
        return await start_job(self._json, self._exchange, dataset, **given)

    async def finetune_jobs(self) -> list[TrainingJob]:
        """All since the server's start, the newest first."""
        return await list_jobs(self._json)

    async def health(self) -> bool:
        """Whether the server takes requests now; False also when nobody answers."""
        try:
            await self._json("GET", "/health")
        except Unavailable:
            return False
        return True

    async def _generate(self, body: Mapping[str, Any]) -> Any:
        return await self._json("POST", "/generate", body)

    async def _json(self, method: str, path: str, body: Body | None = None) -> Any:
        async with self._exchange(method, path, body) as response:
            return json.loads(await response.read() or b"null")

    async def _stream(self, body: Mapping[str, Any]) -> AsyncGenerator[TokenEvent, None]:
        async with self._exchange("POST", "/generate_stream", body) as response:
            tokens: list[Token] = []
            async with aclosing(data_lines(response)) as lines:
                async for line in lines:
                    event = _read_event(json.loads(line), tokens, response.status)
                    yield event
                    if event.result is not None:
                        return
        raise RequestCancelled(f"the stream ended after {len(tokens)} tokens without a result")

    def _exchange(self, method: str, path: str, body: Body | None) -> Exchange:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)
        return Exchange(self._session, method, self._url + path, body)


def _chat_body(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    request = request_of("", chat_options(options))
    return render_request(request, [dict(message) for message in messages])


def _adapter_path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id, safe='')}"


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
        self._thread = LoopThread("Client")

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
        if not self._thread.is_closed:
            self._thread.run(self._client.close())
            self._thread.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GenerateResult:
        return self._thread.run(self._client.generate(prompt, **options))

    def generate_best_of(
        self, prompt: Prompt, best_of: int, **options: Unpack[Options]
    ) -> list[GenerateResult]:
        return self._thread.run(self._client.generate_best_of(prompt, best_of, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[TokenEvent]:
        return self._thread.iterate(self._client.stream(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> GenerateResult:
        return self._thread.run(self._client.chat(messages, **options))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[Options]
    ) -> Iterator[TokenEvent]:
        return self._thread.iterate(self._client.stream_chat(messages, **options))

    def chat_with_tools(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **options: Unpack[Options],
    ) -> ChatAnswer:
        chat = self._client.chat_with_tools
        return self._thread.run(chat(messages, tools, tool_choice, parallel_tool_calls, **options))

    def embed(
        self, prompts: Sequence[Prompt], adapter_id: str | None = None
    ) -> list[tuple[float, ...]]:
        return self._thread.run(self._client.embed(prompts, adapter_id))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[TextPiece]:
        return self._thread.run(self._client.tokenize(text, add_special_tokens))

    def load_adapter(self, adapter_id: str, folder: str, replace: bool = False) -> AdapterInfo:
        return self._thread.run(self._client.load_adapter(adapter_id, folder, replace))

    def unload_adapter(self, adapter_id: str, force: bool = False) -> None:
        self._thread.run(self._client.unload_adapter(adapter_id, force))

    def prefetch_adapter(self, adapter_id: str) -> AdapterInfo:
        return self._thread.run(self._client.prefetch_adapter(adapter_id))

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> AdapterInfo:
        return self._thread.run(self._client.pin_adapter(adapter_id, pinned))

    def adapters(self) -> list[AdapterInfo]:
        return self._thread.run(self._client.adapters())

    def models(self) -> list[ModelCard]:
        return self._thread.run(self._client.models())

    def finetune(
        self, dataset: Any, *, name: str | None = None, validation: Any = None, **training: Any
    ) -> FinetunedAdapter:
        finetune = self._client.finetune
        return self._thread.run(finetune(dataset, name=name, validation=validation, **training))

    def start_finetune(
        self, dataset: Any, *, name: str | None = None, validation: Any = None, **training: Any
    ) -> FinetuneJob:
        start = self._client.start_finetune
        job = self._thread.run(start(dataset, name=name, validation=validation, **training))
        return FinetuneJob(job, self._thread)

    def finetune_jobs(self) -> list[TrainingJob]:
        return self._thread.run(self._client.finetune_jobs())

    def health(self) -> bool:
        return self._thread.run(self._client.health())
