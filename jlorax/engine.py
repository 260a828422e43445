"""The engine: builds the actors in one TaskGroup, and is the only door to them.

generate -> ingress -> scheduler <-> runner
               |           ^ |
               +--> cache -+-+--> (slots' writes) runner
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jlorax.actors.cache import Cache
from jlorax.actors.ingress import Ingress
from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    CacheMessage,
    IngressMessage,
    ListAdapters,
    LoadAdapter,
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
from jlorax.actors.stream import Opened, StreamToken, TokenStream
from jlorax.assembly import Parts, assemble
from jlorax.config import EngineConfig
from jlorax.errors import InvalidRequest, JLoraxError, Overloaded, Unavailable
from jlorax.metrics import Metrics
from jlorax.scheduling.policy import Policy
from jlorax.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from jlorax.types import (
    AdapterInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    Progress,
    Token,
    TokenAlternative,
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
        parts = await asyncio.to_thread(assemble, config, progress)
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
        ingress = Ingress(self._ingress, self._cache, self._scheduler, self.tokenizer, parts.limits)
        scheduler = Scheduler(
            self._scheduler, self._cache, self._runner, self._policy, self._metrics
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
        try:
            async with asyncio.TaskGroup() as actors:
                for actor in (ingress, scheduler, cache, runner):
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

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Yields a token at a time; the last event carries the whole result.

        Closing the iterator cancels the request within a step. Raises a JLoraxError.
        """
        stream = self._open(request)
        try:
            opened = await stream.get()
            assert isinstance(opened, Opened)
            answer = _Answer(self.tokenizer, self._metrics, request, opened)
            while answer.reason is None:
                item = await stream.get()
                assert isinstance(item, StreamToken)
                yield answer.take(item)
        except JLoraxError as error:
            self._metrics.failed(error.code)
            raise
        finally:
            self._close(stream)

    def _open(self, request: GenerateRequest) -> TokenStream:
        self._check_alive()
        if request.stop and not request.detokenize:
            raise InvalidRequest("stop strings cannot be found without detokenizing")
        self._check_room(request.tenant)
        stream = TokenStream()
        if not self._ingress.try_put(Submit(request, stream)):
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


class _Answer:
    """One request's answer as it grows: ids to text, stop strings, times. A ``reason`` ends it."""

    def __init__(
        self, tokenizer: Tokenizer, metrics: Metrics, request: GenerateRequest, opened: Opened
    ) -> None:
        self.reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._opened = opened
        self._is_sampled = request.sampling.temperature > 0
        self._text = _answer_text(tokenizer, request, opened.prompt)
        self._tokens: list[Token] = []
        self._first_token_s = 0.0

    def take(self, item: StreamToken) -> TokenEvent:
        """The next event; with the last token it carries the result."""
        if not self._tokens:
            self._first_token_s = self._elapsed_s()
            self._metrics.first_token(self._first_token_s)
        self.reason = item.finish_reason
        text = ""
        if self._text is not None:
            text = self._text.push(item.token, is_last=self.reason is not None)
            if self._text.is_stopped:
                self.reason = FinishReason.STOP_SEQUENCE
        token = self._token(item, text)
        self._tokens.append(token)
        result = None if self.reason is None else self._result(self.reason)
        return TokenEvent(token, len(self._tokens) - 1, result)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._opened.queue_start_s

    def _token(self, item: StreamToken, text: str) -> Token:
        return Token(
            id=item.token,
            text=text,
            logprob=item.logprob,
            special=self._tokenizer.is_special(item.token),
            alternatives=self._alternatives(item) if item.alternatives else (),
        )

    def _alternatives(self, item: StreamToken) -> tuple[TokenAlternative, ...]:
        text = self._tokenizer.token_text
        return tuple(TokenAlternative(i, text(i), logprob) for i, logprob in item.alternatives)

    def _result(self, reason: FinishReason) -> GenerateResult:
        prompt, total_s = self._opened.prompt, self._elapsed_s()
        self._metrics.finished(reason, len(prompt), len(self._tokens), total_s)
        return GenerateResult(
            text="".join(token.text for token in self._tokens),
            finish_reason=reason,
            tokens=tuple(self._tokens),
            prompt_token_ids=prompt,
            seed=self._opened.seed if self._is_sampled else None,
            time_to_first_token_s=self._first_token_s,
            total_s=total_s,
        )


def _answer_text(
    tokenizer: Tokenizer, request: GenerateRequest, prompt: tuple[int, ...]
) -> _AnswerText | None:
    """None for a request that wants token ids alone."""
    if not request.detokenize:
        return None
    matcher = StopMatcher(request.stop, request.include_stop_text)
    return _AnswerText(IncrementalDetokenizer(tokenizer, prompt), matcher)


@dataclass
class _AnswerText:
    """The answer's text as it becomes final, cut at the first stop string."""

    detokenizer: IncrementalDetokenizer
    matcher: StopMatcher

    @property
    def is_stopped(self) -> bool:
        return self.matcher.matched is not None

    def push(self, token: int, *, is_last: bool) -> str:
        text = self.matcher.push(self.detokenizer.push(token))
        if is_last and not self.is_stopped:
            text += self.matcher.push(self.detokenizer.finish())
            text += self.matcher.finish()
        return text
