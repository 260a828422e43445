"""The engine: builds the actors in one TaskGroup, and is the only door to them.

generate -> ingress -> scheduler <-> runner
               |           ^ |
               +--> cache -+-+--> (slots' writes) runner
               +--> grammars <-> scheduler
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from jlorax.actors.cache import Cache
from jlorax.actors.grammar import Grammars
from jlorax.actors.ingress import Ingress
from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    CacheMessage,
    GrammarMessage,
    IngressMessage,
    ListAdapters,
    LoadAdapter,
    LocateAdapter,
    PinAdapter,
    PrefetchAdapter,
    RunnerMessage,
    SchedulerMessage,
    Submit,
    UnloadAdapter,
    Wake,
)
from jlorax.actors.runner import Runner
from jlorax.actors.scheduler import MAX_STEPS_IN_FLIGHT, Scheduler
from jlorax.actors.stream import Opened, Scored, StreamToken, TokenStream
from jlorax.adapters.sources import LocalFiles
from jlorax.adapters.templates import read_chat_template
from jlorax.answer import Answer
from jlorax.assembly import Parts, assemble
from jlorax.config import EngineConfig
from jlorax.errors import InvalidRequest, JLoraxError, Overloaded, Unavailable
from jlorax.metrics import Metrics
from jlorax.scheduling.policy import Policy
from jlorax.tokenizer import Tokenizer
from jlorax.types import (
    AdapterInfo,
    EmbedRequest,
    EmbedResult,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Progress,
    TokenEvent,
    no_progress,
)

T = TypeVar("T")
log = logging.getLogger("jlorax.engine")


class Engine:
    """Many adapters over one base model. ``await Engine.start(config)``, then ``async with``."""

    def __init__(self, parts: Parts) -> None:
        self.model_info: ModelInfo = parts.model_info
        self.tokenizer: Tokenizer = parts.tokenizer
        self._parts = parts
        self._metrics: Metrics = parts.metrics
        self._policy: Policy = parts.policy
        self._ingress: Mailbox[IngressMessage] = Mailbox(parts.config.scheduler.max_queued)
        self._scheduler: Mailbox[SchedulerMessage] = Mailbox(parts.config.scheduler.max_queued)
        self._cache: Mailbox[CacheMessage] = Mailbox(parts.config.scheduler.max_queued)
        self._grammars: Mailbox[GrammarMessage] = Mailbox(parts.config.scheduler.max_queued)
        self._runner: Mailbox[RunnerMessage] = Mailbox(2 * MAX_STEPS_IN_FLIGHT)
        self._streams: dict[TokenStream, str] = {}  # to their tenants
        self._max_open = parts.config.scheduler.max_queued + parts.config.scheduler.max_batch
        self._is_shared = parts.config.scheduler.is_shared
        self._state = "starting"
        self._idle = asyncio.Event()
        self._idle.set()
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig, progress: Progress = no_progress) -> Engine:
        """Loads the model and readies every executable off the loop, then starts the actors."""
        return cls.of(await asyncio.to_thread(assemble, config, progress))

    @classmethod
    def of(cls, parts: Parts) -> Engine:
        """Starts the actors. No other engine uses these parts, or not any more."""
        gc.collect()
        gc.freeze()  # what lives as long as the engine is not walked: 0.4 s in mid-answer for 7B
        engine = cls(parts)
        engine._life = asyncio.create_task(engine._live(), name="jlorax-engine")
        engine._state = "ready"
        return engine

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _live(self) -> None:
        """Wholly alive or wholly dead: a fault of an actor ends them all, and every stream."""
        parts = self._parts
        ingress = Ingress(
            self._ingress,
            self._cache,
            self._scheduler,
            self._grammars,
            self.tokenizer,
            parts.limits,
        )
        scheduler = Scheduler(
            self._scheduler,
            self._cache,
            self._runner,
            self._grammars,
            self._policy,
            self._metrics,
            parts.config.scheduler.masks_within,
        )
        cache = Cache(
            self._cache,
            self._scheduler,
            self._runner,
            parts.tiers,
            self._metrics,
            parts.config.adapters.num_loaders,
        )
        runner = Runner(self._runner, self._scheduler, parts.device)
        grammars = Grammars(self._grammars, self._scheduler, parts.grammar_compiler)
        try:
            async with asyncio.TaskGroup() as actors:
                for actor in (ingress, scheduler, cache, runner, grammars):
                    actors.create_task(actor.run(), name=type(actor).__name__)
        except* Exception as faults:
            for fault in faults.exceptions:
                log.error("the engine died", exc_info=fault)
        finally:
            self._state = "dead"
            self._cache.close()  # nobody reads it any more, so nobody may wait for room in it
            self._end_streams(Unavailable("the engine has stopped"))

    def _end_streams(self, error: JLoraxError) -> None:
        for stream in list(self._streams):
            stream.fail(error)

    async def stop(self) -> None:
        """Ends the actors at once; open streams get Unavailable. Again does no harm."""
        if self._life is None:
            return
        if self._state != "dead":  # a second cancel would break off the first one's cleaning up
            self._state = "dead"
            self._life.cancel()
        await asyncio.wait([self._life])
        gc.unfreeze()

    async def drain(self) -> None:
        """No new requests; returns when the running ones are answered."""
        if self._state == "ready":
            self._state = "draining"
        await self._idle.wait()

    # ---- requests

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """The mean of the final hidden states (after the last norm) of the prompt's tokens, by the
        adapted model. Raises a JLoraxError; cancelling the caller cancels it within a step."""
        stream = self._open(_without_answer(request), wants_embedding=True)
        try:
            opened = await stream.get()
            assert isinstance(opened, Opened)
            scored = await stream.get()
            assert isinstance(scored, Scored)
            mean = scored.scores.mean_hidden
            return EmbedResult(tuple(mean.tolist()), len(opened.prompt))
        except JLoraxError as error:
            self._metrics.failed(error.code)
            raise
        finally:
            self._close(stream)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Yields a token at a time; the last event carries the whole result.

        Closing the iterator cancels the request within a step. Raises a JLoraxError.
        """
        stream = self._open(request)
        try:
            opened = await stream.get()
            assert isinstance(opened, Opened)
            answer = Answer(self.tokenizer, self._metrics, request, opened)
            while answer.reason is None:
                item = await stream.get()
                if isinstance(item, Scored):
                    await answer.take_prompt(item.scores)
                else:
                    assert isinstance(item, StreamToken)
                    yield answer.take(item)
        except JLoraxError as error:
            self._metrics.failed(error.code)
            raise
        finally:
            self._close(stream)

    def _open(self, request: GenerateRequest, *, wants_embedding: bool = False) -> TokenStream:
        self._check_alive()
        if request.stop and not request.detokenize:
            raise InvalidRequest("stop strings cannot be found without detokenizing")
        self._check_room(request.tenant)
        stream = TokenStream()
        if not self._ingress.try_put(Submit(request, stream, wants_embedding)):
            raise Overloaded(f"{len(self._ingress)} requests wait to be admitted")
        self._streams[stream] = request.tenant
        self._idle.clear()
        return stream

    def _check_room(self, tenant: str) -> None:
        """While others may come, a tenant leaves half of the places to them."""
        if len(self._streams) >= self._max_open:
            raise Overloaded(f"{len(self._streams)} requests are open, as many as are allowed")
        if not self._is_shared:
            return
        num_own = list(self._streams.values()).count(tenant)
        if num_own >= self._max_open // 2:
            raise Overloaded(
                f"{num_own} requests of tenant {tenant!r} are open, as many as one tenant may have "
                f"of the {self._max_open} places"
            )

    def _close(self, stream: TokenStream) -> None:
        self._streams.pop(stream, None)
        if not self._streams:
            self._idle.set()
        if not stream.is_ended:
            stream.is_cancelled = True
            self._scheduler.post(Wake())

    def _check_alive(self) -> None:
        if self._state != "ready":
            raise Unavailable(f"the engine is {self._state}")

    # ---- adapters

    async def load_adapter(
        self, adapter_id: str, folder: str, tenant: str = "default", replace: bool = False
    ) -> AdapterInfo:
        """Registers a folder under the adapter root and reads it into RAM.

        AdapterConflict when the name is taken, unless it is to be replaced: then running requests
        finish on the weights they started with, and new ones get the new.
        """
        return await self._asked(lambda r: LoadAdapter(tenant, adapter_id, folder, replace, r))

    async def unload_adapter(
        self, adapter_id: str, tenant: str = "default", force: bool = False
    ) -> None:
        """Frees its memory, and forgets the name if it was registered; AdapterConflict while it is
        in use."""
        return await self._asked(lambda reply: UnloadAdapter(tenant, adapter_id, force, reply))

    async def prefetch_adapter(self, adapter_id: str, tenant: str = "default") -> AdapterInfo:
        """Reads it into RAM, from wherever it is."""
        return await self._asked(lambda reply: PrefetchAdapter(tenant, adapter_id, reply))

    async def pin_adapter(
        self, adapter_id: str, tenant: str = "default", pinned: bool = True
    ) -> AdapterInfo:
        """Brings it into the bank, where it stays until it is unpinned. AdapterConflict when no
        room would be left for others."""
        return await self._asked(lambda reply: PinAdapter(tenant, adapter_id, pinned, reply))

    async def adapters(self, tenant: str = "default") -> list[AdapterInfo]:
        return await self._asked(lambda reply: ListAdapters(tenant, reply))

    async def _asked(self, message: Callable[[asyncio.Future[T]], CacheMessage]) -> T:
        """The cache's answer, or Unavailable when it dies first."""
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._life is None or self._life.done():
            raise Unavailable("the engine has stopped")
        either: list[asyncio.Future[Any]] = [reply, self._life]
        try:
            await self._cache.put(message(reply))
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise Unavailable("the engine has stopped")
            return reply.result()
        finally:
            reply.cancel()  # the caller may have gone: then nobody would read the answer

    async def chat_tokenizer(self, request: GenerateRequest) -> Tokenizer:
        """The one whose chat template the request's messages are for: the base's, or where the
        configuration allows it the adapter's own, if its folder has one."""
        adapter_id = request.adapter_id
        if adapter_id is None or not self._parts.config.adapters.own_templates:
            return self.tokenizer
        files: LocalFiles | None = await self._asked(
            lambda reply: LocateAdapter(request.tenant, adapter_id, request.adapter_source, reply)
        )
        if files is None:
            return self.tokenizer
        template = await asyncio.to_thread(read_chat_template, files.folder, adapter_id, files.root)
        return self.tokenizer if template is None else self.tokenizer.with_template(template)

    # ---- what it does

    def stats(self) -> EngineStats:
        policy, tiers = self._policy, self._parts.tiers
        return EngineStats(
            state=self._state,
            num_queued=len(self._ingress) + len(policy.waiting),
            num_running=len(policy.running),
            free_pages=policy.pool.num_free,
            total_pages=policy.pool.num_usable,
            pinned_slots=tiers.slots.num_pinned,
            used_slots=len(tiers.slots.versions),
            executables_compiled_after_ready=self._parts.device.num_compiled_after_ready,
            tiers=tiers.stats(),
        )

    def metrics(self) -> bytes:
        """Prometheus exposition text."""
        return self._metrics.render(self.stats())


def _without_answer(request: EmbedRequest) -> GenerateRequest:
    return GenerateRequest(
        prompt=request.prompt,
        adapter_id=request.adapter_id,
        adapter_source=request.adapter_source,
        tenant=request.tenant,
        add_special_tokens=request.add_special_tokens,
        truncate=request.truncate,
    )
