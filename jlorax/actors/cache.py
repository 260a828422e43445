"""Cache: owns the registry, the tiers, the slot table and the pins; the only way into the bank.

    Prefetch ---> load (its own thread) ---> host tier, AdapterAtHand
    Acquire ----> resident: pin, AdapterReady
             \\--> waits in line ---> loaded, and a slot free: WriteSlot to the runner (first),
                                     AdapterReady to the scheduler (second)
Order is the acknowledgement: a step that names the slot is behind its write.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    Acquire,
    AdapterAtHand,
    AdapterFailed,
    AdapterLoading,
    AdapterReady,
    AdapterUnloadable,
    CacheMessage,
    Forget,
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
from jlorax.adapters.registry import DEFAULT_TENANT, AdapterRecord, Registry
from jlorax.adapters.slots import SlotTable
from jlorax.errors import AdapterConflict, AdapterInvalid, JLoraxError, Unavailable
from jlorax.metrics import Metrics
from jlorax.types import AdapterInfo, AdapterVersion, Tier

M = TypeVar("M")
T = TypeVar("T")


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
        # Acquired and without a slot, first come first served; None: to be loaded.
        self._line: dict[AdapterVersion, PackedAdapter | None] = {}
        self._registrations: dict[AdapterVersion, LoadAdapter] = {}  # named, to be loaded
        self._prefetches: dict[AdapterVersion, None] = {}  # to be loaded, in order
        self._loading: AdapterVersion | None = None
        self._num_requests: Counter[AdapterVersion] = Counter()  # queued or running
        self._sizes: dict[AdapterVersion, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")

    async def run(self) -> None:
        try:
            async for message in self._inbox:
                match message:
                    case Resolve():
                        _answer(message.reply, self._resolve, message)
                    case Prefetch(version):
                        self._prefetch(version)
                    case Forget(version):
                        self._forget(version)
                    case Acquire(version):
                        self._acquire(version)
                    case Release(version):
                        self._slots.release(version)
                        self._serve_line()
                    case Loaded(version, packed, tier):
                        self._loaded(version, packed, tier)
                    case LoadFailed(version, error):
                        self._load_failed(version, error)
                    case LoadAdapter():
                        await self._register(message)
                    case UnloadAdapter():
                        _answer(message.reply, self._unload, message)
                    case ListAdapters():
                        await _answer_from_thread(message.reply, self._list, message)
                self._load_next()
        finally:
            await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    # ---- loading: one at a time, however many wait for it

    def _prefetch(self, version: AdapterVersion) -> None:
        self._num_requests[version] += 1
        if self._slots.lookup(version) is not None or version in self._host:
            self._scheduler.post(AdapterAtHand(version))
        elif version != self._loading:
            self._prefetches[version] = None

    def _forget(self, version: AdapterVersion) -> None:
        self._num_requests[version] -= 1
        if not self._num_requests[version]:
            del self._num_requests[version]
            self._prefetches.pop(version, None)

    def _load_next(self) -> None:
        """Whoever holds a place in line goes before whoever may want one later."""
        if self._loading is not None:
            return
        acquired = (version for version, packed in self._line.items() if packed is None)
        version = next(chain(acquired, self._registrations, self._prefetches), None)
        if version is None:
            return
        self._prefetches.pop(version, None)
        self._loading = version
        try:
            record = self._registry.record(version)
        except JLoraxError as error:  # superseded too long ago
            self._inbox.post(LoadFailed(version, error))
        else:
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
        self._loading = None
        self._metrics.adapter_loaded(tier)
        self._sizes[version] = packed.size_bytes
        self._host.put(version, packed, packed.size_bytes)
        self._scheduler.post(AdapterAtHand(version))
        if version in self._line:
            self._line[version] = packed
            self._serve_line()
        registration = self._registrations.pop(version, None)
        if registration is not None and not registration.reply.done():
            registration.reply.set_result(self._info(self._registry.record(version)))

    def _load_failed(self, version: AdapterVersion, error: JLoraxError) -> None:
        self._loading = None
        if version in self._line:
            self._refuse(version, error)
        else:
            self._scheduler.post(AdapterUnloadable(version, error))
        registration = self._registrations.pop(version, None)
        if registration is not None:
            self._registry.unregister(registration.adapter_id, registration.tenant)
            if not registration.reply.done():
                registration.reply.set_exception(error)

    # ---- slots

    def _acquire(self, version: AdapterVersion) -> None:
        assignment = self._slots.lookup(version)
        if assignment is not None:
            self._slots.pin(version)
            self._metrics.adapter_hit()
            self._scheduler.post(AdapterReady(version, assignment.slot, assignment.reach))
            return
        self._metrics.adapter_miss()
        packed = self._host.get(version)
        self._line[version] = packed
        if packed is None:
            self._scheduler.post(AdapterLoading(version))
        else:
            self._serve_line()

    def _serve_line(self) -> None:
        """Gives slots in the line's order; whoever is still loading holds up nobody."""
        for version, packed in list(self._line.items()):
            if packed is None:
                continue
            need = packed.need(self._loader.layout)
            if not self._slots.can_ever_fit(need):
                self._refuse(version, _too_large(version, packed))
                continue
            reach = self._loader.layout.reach(packed.entries)
            assignment = self._slots.assign(version, need, reach)
            if assignment is None:
                return
            del self._line[version]
            self._slots.pin(version)
            self._runner.post(WriteSlot(slot_write(packed, assignment, self._loader.layout)))
            self._scheduler.post(AdapterReady(version, assignment.slot, reach))

    def _refuse(self, version: AdapterVersion, error: JLoraxError) -> None:
        del self._line[version]
        self._scheduler.post(AdapterFailed(version, error))

    # ---- the API

    def _resolve(self, message: Resolve) -> AdapterVersion:
        return self._registry.resolve(message.tenant, message.adapter_id, message.source)

    async def _register(self, message: LoadAdapter) -> None:
        """Names a folder; the answer comes when its weights are read, so that a bad one is refused.

        The actor waits for the name, which is quick, and not for the load, which stands in line.
        """
        try:
            version = await asyncio.to_thread(self._name, message)
        except Exception as error:
            if not message.reply.done():
                message.reply.set_exception(error)
        else:
            self._registrations[version] = message

    def _name(self, message: LoadAdapter) -> AdapterVersion:
        if self._registry.adapter_root is None:
            raise Unavailable("the server has no --adapter-root to load adapters from")
        folder = self._registry.folder_under_root(message.folder)
        return self._registry.register(message.adapter_id, folder, message.tenant)

    def _unload(self, message: UnloadAdapter) -> None:
        """Forgets the name and frees its memory.

        When forced, whoever named it already is answered all the same: who runs keeps its slot, who
        waits loads it again, and gets a clear error when the files are gone.
        """
        version = self._registry.registered_version(message.adapter_id, message.tenant)
        if version in self._registrations:
            raise AdapterConflict(f"adapter {message.adapter_id!r} is still being loaded")
        if self._num_requests[version] and not message.force:
            raise AdapterConflict(
                f"{self._num_requests[version]} requests use adapter {message.adapter_id!r}; "
                "use force to unload it"
            )
        self._registry.unregister(message.adapter_id, message.tenant)
        self._host.drop(version)
        self._sizes.pop(version, None)
        if self._slots.lookup(version) is not None and not self._slots.num_pins(version):
            self._slots.evict(version)

    def _list(self, message: ListAdapters) -> list[AdapterInfo]:
        visible = (message.tenant, DEFAULT_TENANT)
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


def _too_large(version: AdapterVersion, packed: PackedAdapter) -> JLoraxError:
    reason = f"its {packed.size_bytes} bytes do not fit the adapter bank (--adapter-bank-bytes)"
    return AdapterInvalid(version.adapter_id, "its weights", reason)


def _answer(reply: asyncio.Future[T], work: Callable[[M], T], message: M) -> None:
    """The caller gets the result or the error, whatever it is; the actor goes on."""
    if reply.done():
        return
    try:
        reply.set_result(work(message))
    except Exception as error:
        reply.set_exception(error)


async def _answer_from_thread(reply: asyncio.Future[T], work: Callable[[M], T], message: M) -> None:
    """As ``_answer``, for work that walks a disk: the loop goes on. The actor waits, so that its
    books keep one writer."""
    try:
        result = await asyncio.to_thread(work, message)
    except Exception as error:
        if not reply.done():
            reply.set_exception(error)
    else:
        if not reply.done():
            reply.set_result(result)
