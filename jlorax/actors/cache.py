"""Cache: owns the registry, the tiers, the slot table and the pins; the only way into the bank.

    Prefetch ---> load (its own thread) ---> host tier
    Acquire ----> resident: pin, AdapterReady
             \\--> waits in line ---> loaded, and a slot free: WriteSlot to the runner (first),
                                     AdapterReady to the scheduler (second)
Order is the acknowledgement: a step that names the slot is behind its write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    Acquire,
    AdapterFailed,
    AdapterReady,
    AdapterWaits,
    CacheMessage,
    ListAdapters,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Prefetch,
    Release,
    Resolve,
    RunnerMessage,
    SchedulerMessage,
    UnloadAdapter,
    WriteSlot,
)
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import Loader
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.placement import slot_write
from jlorax.adapters.registry import AdapterRecord, Registry
from jlorax.adapters.slots import SlotTable
from jlorax.errors import AdapterConflict, AdapterInvalid, JLoraxError, Unavailable
from jlorax.metrics import Metrics
from jlorax.types import AdapterInfo, AdapterVersion, Tier

T = TypeVar("T")


@dataclass
class Line:
    """Versions that wait for a slot, first come first served; ``weights`` once loaded."""

    weights: dict[AdapterVersion, PackedAdapter | None] = field(default_factory=dict)
    told: set[AdapterVersion] = field(default_factory=set)


class Cache:
    def __init__(
        self,
        inbox: Mailbox[CacheMessage],
        scheduler: Mailbox[SchedulerMessage],
        runner: Mailbox[RunnerMessage],
        registry: Registry,
        loader: Loader,
        host: HostTier[PackedAdapter],
        slots: SlotTable,
        metrics: Metrics,
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._runner = runner
        self._registry = registry
        self._loader = loader
        self._host = host
        self._slots = slots
        self._metrics = metrics
        self._line = Line()
        self._loading: set[AdapterVersion] = set()
        self._sizes: dict[AdapterVersion, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")

    @property
    def slots(self) -> SlotTable:
        return self._slots

    async def run(self) -> None:
        try:
            async for message in self._inbox:
                match message:
                    case Resolve(tenant, adapter_id, source, reply):
                        _answer(reply, lambda m=message: self._resolve(m))
                    case Prefetch(version):
                        self._prefetch(version)
                    case Acquire(version):
                        self._acquire(version)
                    case Release(version):
                        self._slots.release(version)
                        self._serve_line()
                    case Loaded(version, packed, tier):
                        self._loaded(version, packed, tier)
                    case LoadFailed(version, error):
                        self._load_failed(version, error)
                    case LoadAdapter(reply=reply):
                        await self._answer_from_thread(reply, lambda m=message: self._register(m))
                    case UnloadAdapter(reply=reply):
                        _answer(reply, lambda m=message: self._unload(m))
                    case ListAdapters(reply=reply):
                        await self._answer_from_thread(reply, lambda m=message: self._list(m))
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- loading

    def _prefetch(self, version: AdapterVersion) -> None:
        here = self._slots.lookup(version) is not None or version in self._host
        if not here:
            self._start_load(version)

    def _start_load(self, version: AdapterVersion) -> None:
        """One load, however many wait for it."""
        if version not in self._loading:
            self._loading.add(version)
            record = self._registry.record(version)
            self._thread.submit(self._load, record)

    def _load(self, record: AdapterRecord) -> None:
        """On the loader's thread."""
        message: CacheMessage
        try:
            packed, tier = self._loader.load(record)
            message = Loaded(record.version, packed, tier)
        except JLoraxError as error:
            message = LoadFailed(record.version, error)
        except Exception as error:  # a request's adapter must never end the engine
            reason = f"cannot be read: {error!r}"
            message = LoadFailed(
                record.version, AdapterInvalid(record.version.adapter_id, "its files", reason)
            )
        self._inbox.post_from_thread(message)

    def _loaded(self, version: AdapterVersion, packed: PackedAdapter, tier: Tier) -> None:
        self._loading.discard(version)
        self._metrics.adapter_loaded(tier)
        self._sizes[version] = packed.size_bytes
        self._host.put(version, packed, packed.size_bytes)
        if version in self._line.weights:
            self._line.weights[version] = packed
            self._serve_line()

    def _load_failed(self, version: AdapterVersion, error: JLoraxError) -> None:
        self._loading.discard(version)
        if version in self._line.weights:
            self._leave_line(version)
            self._scheduler.post(AdapterFailed(version, error))

    # ---- slots

    def _acquire(self, version: AdapterVersion) -> None:
        assignment = self._slots.lookup(version)
        if assignment is not None:
            self._slots.pin(version)
            self._metrics.adapter_hit()
            self._scheduler.post(AdapterReady(version, assignment.slot))
            return
        self._metrics.adapter_miss()
        packed = self._host.get(version)
        self._line.weights[version] = packed
        if packed is None:
            self._start_load(version)
        else:
            self._serve_line()

    def _serve_line(self) -> None:
        """Gives slots in the line's order; whoever is still loading holds up nobody."""
        for version, packed in list(self._line.weights.items()):
            if packed is None:
                continue
            need = packed.need(self._loader.layout)
            if not self._slots.can_ever_fit(need):
                self._leave_line(version)
                self._scheduler.post(AdapterFailed(version, self._too_large(version, packed)))
                continue
            assignment = self._slots.assign(version, need)
            if assignment is None:
                self._tell_waiting(version)
                return
            self._leave_line(version)
            self._slots.pin(version)
            self._runner.post(WriteSlot(slot_write(packed, assignment, self._loader.layout)))
            self._scheduler.post(AdapterReady(version, assignment.slot))

    def _tell_waiting(self, version: AdapterVersion) -> None:
        if version not in self._line.told:
            self._line.told.add(version)
            self._scheduler.post(AdapterWaits(version))

    def _leave_line(self, version: AdapterVersion) -> None:
        del self._line.weights[version]
        self._line.told.discard(version)

    def _too_large(self, version: AdapterVersion, packed: PackedAdapter) -> JLoraxError:
        reason = f"its {packed.size_bytes} bytes do not fit the adapter bank (--adapter-bank-bytes)"
        return AdapterInvalid(version.adapter_id, "its weights", reason)

    # ---- the API

    def _resolve(self, message: Resolve) -> AdapterVersion:
        return self._registry.resolve(message.tenant, message.adapter_id, message.source)

    def _register(self, message: LoadAdapter) -> AdapterInfo:
        """Names a folder under the root; its weights are read now, so that a bad one is refused."""
        root = self._registry.adapter_root
        if root is None:
            raise Unavailable("the server has no --adapter-root to load adapters from")
        folder = self._registry.folder_under_root(message.folder)
        version = self._registry.register(message.adapter_id, folder, message.tenant)
        try:
            packed, _ = self._loader.load(self._registry.record(version))
        except JLoraxError:
            self._registry.unregister(message.adapter_id, message.tenant)
            raise
        self._sizes[version] = packed.size_bytes
        self._host.put(version, packed, packed.size_bytes)
        return self._info(self._registry.record(version))

    def _unload(self, message: UnloadAdapter) -> None:
        """Forgets the name and frees its memory; running requests finish when forced."""
        version = self._registry.resolve(message.tenant, message.adapter_id)
        if self._slots.num_pins(version) and not message.force:
            raise AdapterConflict(
                f"adapter {message.adapter_id!r} is in use; use force to unload it"
            )
        self._registry.unregister(message.adapter_id, message.tenant)
        self._host.drop(version)
        if self._slots.lookup(version) is not None and not self._slots.num_pins(version):
            self._slots.evict(version)

    def _list(self, message: ListAdapters) -> list[AdapterInfo]:
        visible = (message.tenant, "default")
        return [self._info(r) for r in self._registry.list() if r.version.tenant in visible]

    def _info(self, record: AdapterRecord) -> AdapterInfo:
        version = record.version
        return AdapterInfo(
            adapter_id=version.adapter_id,
            tenant=version.tenant,
            generation=version.generation,
            source=record.source,
            tier=self._tier(record),
            rank=record.rank,
            target_modules=record.target_modules,
            size_bytes=self._sizes.get(version),
            num_requests=record.num_requests,
            last_used_s=record.last_used_s,
        )

    def _tier(self, record: AdapterRecord) -> Tier:
        if record.version in self._slots.versions:
            return Tier.DEVICE
        if record.version in self._host:
            return Tier.HOST
        return Tier.DISK if self._loader.has(record) else Tier.SOURCE

    async def _answer_from_thread(self, reply: asyncio.Future[T], work: Callable[[], T]) -> None:
        """Runs ``work`` on the loader's thread while the actor waits, so that the books keep one
        writer and the loop does not stand still for a disk."""
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(self._thread, work)
        except JLoraxError as error:
            if not reply.done():
                reply.set_exception(error)
        else:
            if not reply.done():
                reply.set_result(result)


def _answer(reply: asyncio.Future[T], work: Callable[[], T]) -> None:
    if reply.done():
        return
    try:
        reply.set_result(work())
    except JLoraxError as error:
        reply.set_exception(error)
