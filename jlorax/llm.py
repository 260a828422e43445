"""The engine in this process, for callers without an event loop: ``LLM``.

    with jlorax.LLM("./my-base", adapters={"sql": "./sql-lora"}) as llm:
        print(llm.generate("The capital of France is", max_new_tokens=8).text)
        both = llm.generate(["a", "b"], adapter_ids=["sql", None])  # in one batch

What a request may say is checked as the server checks it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack, overload

from jlorax.assembly import running_on
from jlorax.config import EngineConfig
from jlorax.defaults import configured, default_cache_dir
from jlorax.engine import Engine
from jlorax.errors import InvalidParameter, RequestCancelled
from jlorax.loop_thread import LoopThread
from jlorax.together import together
from jlorax.types import (
    AdapterInfo,
    EmbedRequest,
    EngineStats,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    Progress,
    TokenEvent,
    no_progress,
)
from jlorax.wire.call import Call, Limits
from jlorax.wire.embeddings import parse_embeddings
from jlorax.wire.fields import INT32_MAX
from jlorax.wire.native import parse_native
from jlorax.wire.native_client import TextPiece, render_request
from jlorax.wire.openai_client import render_embed
from jlorax.wire.options import Message, Options, Prompt, chat_options, request_of

T = TypeVar("T")


class Settings(TypedDict, total=False):
    """Those of ``jlorax serve``, by the same names; sizes in bytes. Absent: as there."""

    model_id: str
    dtype: str
    load_format: str
    adapter_root: str | Path
    remote: Mapping[str, str]
    preload: Sequence[str]
    pin: Sequence[str]
    adapter_loaders: int
    adapter_bank_bytes: int
    max_slots: int
    max_rank: int
    adapter_templates: bool
    host_cache_bytes: int
    disk_cache: str | Path
    disk_cache_bytes: int
    max_seq_len: int
    max_batch: int
    max_queued: int
    kv_cache_bytes: int
    buckets: Sequence[int]
    cache_dir: str | Path


class LLM:
    """Loads a base model and serves many adapters over it, blocking. Safe to use from several
    threads. Use it as ``with LLM(...) as llm``, or ``close()`` it.

    ``model``: a folder, a GGUF file or a hub id; None: the embedded one. ``adapters``: folders by
    name. Raises what a start raises: ConfigError, ModelInvalid, AdapterInvalid.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        progress: Progress = no_progress,
        **settings: Unpack[Settings],
    ) -> None:
        config = _config(model, adapters or {}, settings)
        self._thread = LoopThread("LLM")
        try:
            self._engine = self._thread.run(Engine.start(config, progress))
        except BaseException:
            self._thread.close()
            raise
        self._room = asyncio.Semaphore(config.scheduler.max_queued)
        self._limits = _limits(self.model_info)

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.model_info

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
        """Ends running requests with Unavailable and gives the device's memory back. Again does no
        harm."""
        if not self._thread.is_closed:
            self._thread.run(self._engine.stop())
            self._thread.close()

    # ---- requests

    @overload
    def generate(
        self, prompts: Prompt, *, adapter_ids: None = None, **options: Unpack[Options]
    ) -> GenerateResult: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[Sequence[int]] | list[list[int]],
        *,
        adapter_ids: Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> list[GenerateResult]: ...
    def generate(
        self,
        prompts: Any,
        *,
        adapter_ids: Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> GenerateResult | list[GenerateResult]:
        """One prompt's answer, or a list of prompts' answers, made in one batch. A prompt is text
        or token ids. Greedy unless ``temperature`` is above 0.

        ``adapter_ids``: an adapter a prompt, None for the base model. The first failure ends the
        other requests of the call and is raised.
        """
        if _is_one(prompts):
            _refuse_ids(adapter_ids)
            return self._thread.run(self._answer(self._call(prompts, options)))
        each = _per_prompt(options, adapter_ids, len(prompts))
        calls = [self._call(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        return self._thread.run(together([self._answer(call) for call in calls]))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[TokenEvent]:
        """The answer token by token; the last event has the result. Leaving early cancels."""
        return self._thread.iterate(self._events(self._call(prompt, options)))

    @overload
    def chat(
        self, messages: Sequence[Message], *, adapter_ids: None = None, **options: Unpack[Options]
    ) -> GenerateResult: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        *,
        adapter_ids: Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> list[GenerateResult]: ...
    def chat(
        self,
        messages: Any,
        *,
        adapter_ids: Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> GenerateResult | list[GenerateResult]:
        """As generate, over messages ``{"role", "content"}`` and the model's chat template; a list
        of conversations gets a list of answers."""
        options = chat_options(options)
        if messages and isinstance(messages[0], Mapping):
            _refuse_ids(adapter_ids)
            return self._thread.run(self._answer(self._call("", options, messages)))
        each = _per_prompt(options, adapter_ids, len(messages))
        calls = [self._call("", own, one) for one, own in zip(messages, each, strict=True)]
        return self._thread.run(together([self._answer(call) for call in calls]))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[Options]
    ) -> Iterator[TokenEvent]:
        call = self._call("", chat_options(options), messages)
        return self._thread.iterate(self._events(call))

    def embed(
        self, prompts: Sequence[Prompt], adapter_id: str | None = None
    ) -> list[tuple[float, ...]]:
        """A vector for each prompt, of the model's width."""
        call = parse_embeddings(render_embed(prompts, adapter_id), self._limits)
        return self._thread.run(together([self._embedded(asked) for asked in call.requests]))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[TextPiece]:
        """The model's tokens of a text, each with its place there."""
        pieces = self._engine.tokenizer.tokenize_with_offsets(text, add_special_tokens)
        return [TextPiece(*piece) for piece in pieces]

    # ---- adapters

    def load_adapter(self, adapter_id: str, folder: str, replace: bool = False) -> AdapterInfo:
        """Registers a folder under ``adapter_root``; ``replace``: the name may be taken."""
        load = self._engine.load_adapter
        return self._thread.run(load(adapter_id, folder, replace=replace))

    def unload_adapter(self, adapter_id: str, force: bool = False) -> None:
        self._thread.run(self._engine.unload_adapter(adapter_id, force=force))

    def prefetch_adapter(self, adapter_id: str) -> AdapterInfo:
        """Reads it into RAM."""
        return self._thread.run(self._engine.prefetch_adapter(adapter_id))

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> AdapterInfo:
        """Brings it to the device, to stay there until it is unpinned."""
        return self._thread.run(self._engine.pin_adapter(adapter_id, pinned=pinned))

    def adapters(self) -> list[AdapterInfo]:
        return self._thread.run(self._engine.adapters())

    def stats(self) -> EngineStats:
        return self._thread.run(self._stats())

    # ---- on the loop's thread

    def _call(
        self, prompt: Prompt, options: Options, messages: Sequence[Message] | None = None
    ) -> Call:
        """Checked on the caller's thread, by the parser of LoRAX's route."""
        chat = None if messages is None else [dict(message) for message in messages]
        return parse_native(render_request(request_of(prompt, options), chat), self._limits)

    async def _answer(self, call: Call) -> GenerateResult:
        async with aclosing(self._events(call)) as events:
            async for event in events:
                if event.result is not None:
                    return event.result
        raise RequestCancelled("the answer was cut off")

    async def _events(self, call: Call) -> AsyncGenerator[TokenEvent, None]:
        """No more at once than may wait: the rest of a long list waits here."""
        async with self._room:
            request = await self._tokenized(call)
            async with aclosing(self._engine.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event

    async def _tokenized(self, call: Call) -> GenerateRequest:
        if call.messages is not None:
            messages = [message.to_template() for message in call.messages]
            tokenizer = await self._engine.chat_tokenizer(call.requests[0])
            ids = await asyncio.to_thread(tokenizer.encode_chat, messages)
            call = call.with_prompts([tuple(ids)])
        return call.requests[0]

    async def _embedded(self, asked: EmbedRequest) -> tuple[float, ...]:
        async with self._room:
            return (await self._engine.embed(asked)).embedding

    async def _stats(self) -> EngineStats:
        return self._engine.stats()


def _config(
    model: str | Path | None, adapters: Mapping[str, str | Path], settings: Settings
) -> EngineConfig:
    given: dict[str, Any] = dict(settings)
    if unknown := given.keys() - Settings.__annotations__.keys():
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
    for name in ("adapter_root", "disk_cache", "cache_dir"):
        if name in given:
            given[name] = Path(given[name]).expanduser()
    for name in ("preload", "pin", "buckets"):
        if name in given:
            given[name] = tuple(given[name])
    given["remote"] = tuple(given.get("remote", {}).items())
    given["adapter"] = tuple((name, Path(folder).expanduser()) for name, folder in adapters.items())
    given["model"] = None if model is None else str(model)
    cache_dir = given.get("cache_dir") or default_cache_dir(os.environ)  # the server's own
    return configured(given, cache_dir, running_on())


def _limits(model: ModelInfo) -> Limits:
    return Limits(
        model.model_id,
        model.vocab_size,
        max_prompts=INT32_MAX,  # a long list waits
        max_input_tokens=model.max_seq_len - 1,
    )


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _refuse_ids(adapter_ids: Sequence[str | None] | None) -> None:
    if adapter_ids is not None:
        raise InvalidParameter("adapter_ids", "are for a list of prompts: use `adapter_id`")


def _per_prompt(
    options: Options, adapter_ids: Sequence[str | None] | None, num_prompts: int
) -> list[Options]:
    """The options of each prompt."""
    if adapter_ids is None:
        return [options] * num_prompts
    if isinstance(adapter_ids, str) or len(adapter_ids) != num_prompts:
        raise InvalidParameter(
            "adapter_ids", f"must name an adapter, or None, for each of {num_prompts} prompts"
        )
    return [{**options, "adapter_id": adapter_id} for adapter_id in adapter_ids]
