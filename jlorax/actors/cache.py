"""Cache: owns the registry, the tiers' books, the slot table and the pins; the only way into the
bank.

    Prefetch ---> load (threads) ------> host tier, AdapterAtHand
    Acquire ----> resident: pin, AdapterReady
             \\--> waits in line ---> loaded, and a slot free: WriteSlot to the runner (first),
                                     AdapterReady to the scheduler (second)
Order is the acknowledgement: a step that names the slot is behind its write.

Threads read, check, pack and write files; every book is kept here. What they find comes back as a
message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
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
    Derive,
    Described,
    Forget,
    ListAdapters,
    LoadAdapter,
    Loaded,
    LoadFailed,
    LocateAdapter,
    PinAdapter,
    Prefetch,
    PrefetchAdapter,
    Release,
    Resolve,
    RunnerMessage,
    Scanned,
    SchedulerMessage,
    SpoolDone,
    UnloadAdapter,
    WriteSlot,
)
from jlorax.adapters.disk_tier import remove
from jlorax.adapters.load_queue import LoadQueue, Ticket, Urgency
from jlorax.adapters.loader import LoadCancelled
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.placement import slot_write
from jlorax.adapters.registry import DEFAULT_TENANT, LOCAL, AdapterRecord, Seen
from jlorax.adapters.remote_names import Found, Question
from jlorax.adapters.sources import LocalFiles
from jlorax.adapters.tiers import AdapterTiers
from jlorax.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    Forbidden,
    JLoraxError,
    Unavailable,
)
from jlorax.metrics import Metrics
from jlorax.types import AdapterInfo, AdapterVersion, Tier

log = logging.getLogger("jlorax.cache")
_Named = Resolve | LocateAdapter | PrefetchAdapter | PinAdapter
M = TypeVar("M")
T = TypeVar("T")

_UPLOAD_BYTES_PER_S = 25e9  # of page-locked memory, about what a PCIe 4 or 5 link gives
_PREFETCH_SHARE = 0.5  # of the host tier, for what waiting requests had loaded
_UNSPOOLED_SHARE = 0.125  # of the host tier: what may wait to be written to disk, or be gone
_NUM_LOOKUPS = 4  # threads that ask remotes, walk folders, remove files


@dataclass
class _InLine:
    """Waits for a slot. ``packed`` None: to be loaded first."""

    packed: PackedAdapter | None = None
    is_acquired: bool = False  # the scheduler waits
    askers: list[asyncio.Future[AdapterInfo]] = field(default_factory=list)  # who had it pinned


class Cache:
    def __init__(
        self,
        inbox: Mailbox[CacheMessage],
        scheduler: Mailbox[SchedulerMessage],
        runner: Mailbox[RunnerMessage],
        tiers: AdapterTiers,
        metrics: Metrics,
        num_loaders: int = 2,
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._runner = runner
        self._registry = tiers.registry
        self._remote_names = tiers.remote_names
        self._loader = tiers.loader
        self._disk = tiers.disk
        self._host = tiers.host
        self._slots = tiers.slots
        self._counts = tiers.counts
        self._pin_at_start = tiers.pinned
        self._metrics = metrics
        self._queue = LoadQueue(num_loaders)
        self._line: dict[AdapterVersion, _InLine] = {}  # first come first served
        self._registrations: dict[AdapterVersion, tuple[LoadAdapter, Callable[[], None]]] = {}
        self._asked: dict[AdapterVersion, list[asyncio.Future[AdapterInfo]]] = {}  # to be in RAM
        self._num_requests: Counter[AdapterVersion] = Counter()  # queued or running
        self._missed_s: dict[AdapterVersion, float] = {}  # since when somebody waits for it
        self._came_from: dict[AdapterVersion, Tier] = {}
        self._load_s: dict[AdapterVersion, float] = {}
        self._sizes: dict[AdapterVersion, int] = {}
        self._unspooled: OrderedDict[AdapterVersion, PackedAdapter] = OrderedDict()
        self._is_spooling = False
        self._kept: dict[tuple[str, str], AdapterVersion] = {}  # (tenant, id) -> pinned version
        self._threads = ThreadPoolExecutor(num_loaders, thread_name_prefix="adapter-load")
        self._lookups = ThreadPoolExecutor(_NUM_LOOKUPS, thread_name_prefix="adapter-lookup")
        self._host.is_wanted = self._waits_in_ram
        self._slots.is_wanted = self._num_requests.__contains__

    async def run(self) -> None:
        try:
            self._pin_first()
            async for message in self._inbox:
                await self._take(message)
                self._start_loads()
                self._start_spool()
        finally:
            for pool in (self._threads, self._lookups):
                await asyncio.to_thread(pool.shutdown, cancel_futures=True)
            await asyncio.to_thread(self._loader.close)

    async def _take(self, message: CacheMessage) -> None:
        match message:
            case Resolve() | LocateAdapter():
                self._answer_named(message)
            case Derive():
                _answer(message.reply, self._derive, message)
            case Prefetch(version):
                self._prefetch(version)
            case Forget(version):
                self._forget(version)
            case Acquire(version):
                self._acquire(version)
            case Release(version):
                self._slots.release(version)
                self._free_superseded(version)
                self._serve_line()
            case Loaded():
                self._loaded(message)
            case LoadFailed(version, error):
                self._load_failed(version, error)
            case SpoolDone():
                self._spooled(message)
            case Described(question, answer):
                self._described(question, answer)
            case LoadAdapter():
                await self._register(message)
            case UnloadAdapter():
                _answer(message.reply, self._unload, message)
            case PrefetchAdapter() | PinAdapter():
                self._answer_named(message)
            case ListAdapters():
                self._scan(message)
            case Scanned(request, seen):
                _answer(request.reply, lambda request: self._list(request, seen), request)

    # ---- names

    def _answer_named(self, message: _Named) -> None:
        """At once if the name is known on this machine, else when a remote has answered."""
        if message.reply.done():
            return
        try:
            record = self._find(message)
        except Exception as error:
            message.reply.set_exception(error)
        else:
            if record is not None:
                self._named(message, record)

    def _find(self, message: _Named) -> AdapterRecord | None:
        """None: a remote is asked, and the message is answered then."""
        source = message.source if isinstance(message, Resolve | LocateAdapter) else None
        tenant, adapter_id = message.tenant, message.adapter_id
        question = None if source == LOCAL else self._remote_names.question(adapter_id, source)
        if source in (None, LOCAL):
            record = self._registry.find(tenant, adapter_id, source)
            if record is not None:
                return record
        if question is None:
            raise AdapterNotFound(adapter_id)
        known = self._remote_names.known(question)
        if known is None and self._remote_names.wait(question, message):
            self._lookups.submit(self._describe, question)
        return known

    def _describe(self, question: Question) -> None:
        """On a lookup's thread."""
        answer: Found | JLoraxError
        try:
            answer = Found(*self._loader.sources.describe(question.adapter_id, question.remotes))
        except JLoraxError as error:
            answer = error
        except Exception as error:
            answer = Unavailable(f"adapter {question.adapter_id!r} cannot be looked up: {error!r}")
        self._inbox.post_from_thread(Described(question, answer))

    def _described(self, question: Question, answer: Found | JLoraxError) -> None:
        waiting, told = self._remote_names.answered(question, answer)
        for message in waiting:
            if message.reply.done():
                continue
            if isinstance(told, JLoraxError):
                message.reply.set_exception(told)
            else:
                self._named(message, told)

    def _named(self, message: _Named, record: AdapterRecord) -> None:
        self._follow_pin(record)
        match message:
            case Resolve():
                message.reply.set_result(self._registry.used(record))
            case LocateAdapter():
                origin = record.origin
                message.reply.set_result(origin if isinstance(origin, LocalFiles) else None)
            case PrefetchAdapter():
                self._bring_to_ram(record, message.reply)
            case PinAdapter() if (refusal := _why_not_theirs(message.tenant, record)) is not None:
                message.reply.set_exception(refusal)
            case PinAdapter(pinned=True):
                self._pin(record.version, message.reply)
            case PinAdapter():
                self._unpin(record, message.reply)

    def _derive(self, message: Derive) -> AdapterVersion:
        record = self._registry.derive(message.merge, message.parts)
        for version in self._registry.derived.forget_unused(self._num_requests.__contains__):
            self._free(version)
        return self._registry.used(record)

    # ---- loading

    def _prefetch(self, version: AdapterVersion) -> None:
        self._num_requests[version] += 1
        tier = self._tier(version)
        self._counts.found(tier)
        if tier in (Tier.DEVICE, Tier.HOST):
            self._scheduler.post(AdapterAtHand(version))
            return
        self._missed_s.setdefault(version, time.monotonic())
        self._queue.add(version, Urgency.PREFETCH)

    def _forget(self, version: AdapterVersion) -> None:
        self._num_requests[version] -= 1
        if self._num_requests[version]:
            return
        del self._num_requests[version]
        if version not in self._line and version not in self._asked:
            self._queue.drop(version)
            self._missed_s.pop(version, None)
        self._free_superseded(version)

    def _waits_in_ram(self, version: AdapterVersion) -> bool:
        """Whether a request waits for it in RAM."""
        return version in self._num_requests and not self._slots.holds(version)

    def _start_loads(self) -> None:
        while ticket := self._queue.next(self._may_prefetch()):
            self._start_load(ticket)

    def _may_prefetch(self) -> bool:
        """Not while what waits in RAM already fills much of it: later loads would push it out."""
        enough = _PREFETCH_SHARE * self._host.max_bytes
        if self._host.used_bytes <= enough:
            return True
        wanted = (self._sizes.get(v, 0) for v in self._host if self._waits_in_ram(v))
        return sum(wanted) <= enough

    def _start_load(self, ticket: Ticket) -> None:
        version = ticket.version
        try:
            record = self._registry.record(version)
        except JLoraxError as error:  # superseded too long ago
            self._inbox.post(LoadFailed(version, error))
            return
        kept = None if self._disk is None else self._disk.find(self._loader.key(record))
        self._threads.submit(self._load, ticket, record, kept)

    def _load(self, ticket: Ticket, record: AdapterRecord, kept: Path | None) -> None:
        """On a loader's thread."""
        version, start_s = record.version, time.monotonic()
        message: CacheMessage
        try:
            load = self._loader.load(record, kept, lambda: ticket.is_wanted)
        except LoadCancelled:
            message = LoadFailed(version, None)
        except JLoraxError as error:
            message = LoadFailed(version, error)
        except Exception as error:  # a request's adapter must never end the engine
            reason = f"cannot be read: {error!r}"
            message = LoadFailed(version, AdapterInvalid(version.adapter_id, "its files", reason))
        else:
            seconds = time.monotonic() - start_s
            message = Loaded(version, load.packed, load.tier, seconds, load.kept_is_damaged)
        self._inbox.post_from_thread(message)

    # ---- the disk tier is filled behind the requests' backs

    def _start_spool(self) -> None:
        """One at a time, and when no load runs: a load is waited for, this is not. But what is
        not yet on disk stays in memory, so that there must not be much of it."""
        if self._is_spooling or not self._unspooled:
            return
        num_bytes = sum(packed.size_bytes for packed in self._unspooled.values())
        if self._queue.num_running and num_bytes <= _UNSPOOLED_SHARE * self._host.max_bytes:
            return
        version, packed = self._unspooled.popitem(last=False)
        record = self._registry.known(version)
        if record is not None:
            self._is_spooling = True
            self._lookups.submit(self._spool, record, packed)

    def _bound_unspooled(self) -> None:
        """What left the host tier before it was written is memory that nobody counts. Where loads
        outrun the disk the oldest is not written at all, and comes from its source again."""
        gone = [version for version in self._unspooled if version not in self._host]
        num_bytes = sum(self._unspooled[version].size_bytes for version in gone)
        for version in gone:
            if num_bytes <= _UNSPOOLED_SHARE * self._host.max_bytes:
                return
            num_bytes -= self._unspooled.pop(version).size_bytes

    def _spool(self, record: AdapterRecord, packed: PackedAdapter) -> None:
        """On a lookup's thread."""
        assert self._disk is not None
        spooled = None
        try:
            spooled = self._loader.spool(record, packed, self._disk.folder)
        except OSError as error:
            log.warning("a packed adapter is not kept on disk: %s", error)
        finally:
            self._inbox.post_from_thread(SpoolDone(spooled))

    def _spooled(self, message: SpoolDone) -> None:
        assert self._disk is not None
        self._is_spooling = False
        spooled = message.spooled
        if spooled is None:
            self._disk.failed_writes += 1
            return
        gone = self._disk.take(spooled.source, spooled.digest, spooled.path, spooled.size_bytes)
        if gone:
            self._lookups.submit(remove, gone)

    def _loaded(self, message: Loaded) -> None:
        version, packed = message.version, message.packed
        self._queue.done(version)
        self._metrics.adapter_loaded(message.tier)
        record = self._registry.known(version)
        if message.kept_is_damaged and self._disk is not None and record is not None:
            self._lookups.submit(remove, self._disk.drop(self._loader.key(record)))
        if message.tier is Tier.SOURCE and self._disk is not None:
            self._unspooled[version] = packed
        self._came_from[version] = message.tier
        self._load_s[version] = message.seconds
        self._sizes[version] = packed.size_bytes
        self._host.put(version, packed, packed.size_bytes, message.seconds)
        self._bound_unspooled()
        self._scheduler.post(AdapterAtHand(version))
        if version in self._line:
            self._line[version].packed = packed
            self._serve_line()
        self._tell_asked(version, None)
        self._free_superseded(version)

    def _load_failed(self, version: AdapterVersion, error: JLoraxError | None) -> None:
        self._queue.done(version)
        if error is None:
            self._want_again(version)
            return
        self._missed_s.pop(version, None)
        if version in self._line:
            self._refuse(version, error)
        else:
            self._scheduler.post(AdapterUnloadable(version, error))
        self._tell_asked(version, error)

    def _want_again(self, version: AdapterVersion) -> None:
        """Its load was given up; by now somebody may want it after all."""
        if version in self._line:
            self._queue.add(version, Urgency.ACQUIRED)
        elif version in self._asked:
            self._queue.add(version, Urgency.ASKED)
        elif version in self._num_requests:
            self._queue.add(version, Urgency.PREFETCH)

    # ---- slots

    def _acquire(self, version: AdapterVersion) -> None:
        assignment = self._slots.lookup(version)
        if assignment is not None:
            self._slots.pin(version)
            self._scheduler.post(AdapterReady(version, assignment.slot, assignment.reach))
            return
        self._stand_in_line(version).is_acquired = True
        if self._line[version].packed is None:
            self._scheduler.post(AdapterLoading(version))
        else:
            self._serve_line()

    def _stand_in_line(self, version: AdapterVersion) -> _InLine:
        place = self._line.setdefault(version, _InLine())
        if place.packed is None:
            place.packed = self._host.get(version)
            if version not in self._missed_s:
                self._missed_s[version] = time.monotonic()
                self._came_from[version] = Tier.HOST  # or what a load says
        if place.packed is None:
            self._queue.add(version, Urgency.ACQUIRED)
        return place

    def _serve_line(self) -> None:
        """Gives slots in the line's order; whoever is still loading holds up nobody."""
        for version, place in list(self._line.items()):
            if place.packed is None:
                continue
            if (error := self._why_never(version, place)) is not None:
                self._refuse(version, error)
            elif not self._place(version, place.packed):
                return

    def _why_never(self, version: AdapterVersion, place: _InLine) -> JLoraxError | None:
        assert place.packed is not None
        layout = self._loader.layout
        need = place.packed.need(layout)
        if not self._slots.can_ever_fit(need):
            return _too_large(version, place.packed)
        if not place.is_acquired and not self._slots.can_keep(version, need, layout.most_pages):
            return _no_room_to_pin(version)
        return None

    def _place(self, version: AdapterVersion, packed: PackedAdapter) -> bool:
        """Writes it into the bank. False: too much is pinned."""
        layout = self._loader.layout
        upload_s = packed.size_bytes / _UPLOAD_BYTES_PER_S
        reload_s = 0.0 if version in self._host else self._load_s.get(version, 0.0)
        reach = layout.reach(packed.entries)
        assignment = self._slots.assign(
            version,
            packed.need(layout),
            reach,
            reload_s=upload_s + reload_s,
            size_bytes=packed.size_bytes,
        )
        if assignment is None:
            return False
        place = self._line.pop(version)
        self._runner.post(WriteSlot(slot_write(packed, assignment, layout)))
        self._metrics.adapter_uploaded(packed.size_bytes)
        self._note_usable(version)
        if place.is_acquired:
            self._slots.pin(version)
            self._scheduler.post(AdapterReady(version, assignment.slot, reach))
        if place.askers:
            self._keep(version, place.askers)
        return True

    def _note_usable(self, version: AdapterVersion) -> None:
        missed_s = self._missed_s.pop(version, None)
        tier = self._came_from.pop(version, Tier.HOST)
        if missed_s is not None:
            self._metrics.adapter_usable(tier, time.monotonic() - missed_s)

    def _refuse(self, version: AdapterVersion, error: JLoraxError) -> None:
        place = self._line.pop(version)
        if place.is_acquired:
            self._scheduler.post(AdapterFailed(version, error))
        for reply in place.askers:
            self._kept.pop((version.tenant, version.adapter_id), None)
            if not reply.done():
                reply.set_exception(error)

    # ---- pinned by an operator

    def _pin_first(self) -> None:
        """Those that the configuration names; one that cannot be had is only missed."""
        loop = asyncio.get_running_loop()
        for adapter_id in self._pin_at_start:
            reply: asyncio.Future[AdapterInfo] = loop.create_future()
            reply.add_done_callback(_note_unpinned)
            self._answer_named(PinAdapter(DEFAULT_TENANT, adapter_id, True, reply))
        self._start_loads()

    def _pin(self, version: AdapterVersion, reply: asyncio.Future[AdapterInfo]) -> None:
        self._kept[version.tenant, version.adapter_id] = version
        if not self._slots.holds(version):
            self._stand_in_line(version).askers.append(reply)
            self._serve_line()
            return
        assignment = self._slots.lookup(version)
        assert assignment is not None
        need = {pool: len(pages) for pool, pages in assignment.pages.items()}
        if self._slots.can_keep(version, need, self._loader.layout.most_pages):
            self._keep(version, [reply])
        else:
            del self._kept[version.tenant, version.adapter_id]
            reply.set_exception(_no_room_to_pin(version))

    def _keep(self, version: AdapterVersion, askers: list[asyncio.Future[AdapterInfo]]) -> None:
        if self._kept.get((version.tenant, version.adapter_id)) == version:
            self._slots.keep(version, True)
        info = self._info(self._registry.record(version))
        for reply in askers:
            if not reply.done():
                reply.set_result(info)

    def _unpin(self, record: AdapterRecord, reply: asyncio.Future[AdapterInfo]) -> None:
        self._let_go(record.version)
        reply.set_result(self._info(record))

    def _let_go(self, version: AdapterVersion) -> None:
        """Its name is pinned no longer, whichever version was."""
        kept = self._kept.pop((version.tenant, version.adapter_id), None)
        if kept is not None and self._slots.holds(kept):
            self._slots.keep(kept, False)

    def _follow_pin(self, record: AdapterRecord) -> None:
        """A pinned name means other weights by now: they take over."""
        name = (record.version.tenant, record.version.adapter_id)
        kept = self._kept.get(name)
        if kept is None or kept == record.version:
            return
        self._let_go(record.version)
        reply: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(_note_unpinned)
        self._pin(record.version, reply)

    # ---- the API

    async def _register(self, message: LoadAdapter) -> None:
        """Names a folder; the answer comes when its weights are read, so that a bad one is refused.

        The actor waits for the name, which is quick, and not for the load, which stands in line.
        """
        try:
            version, undo = await asyncio.to_thread(self._name, message)
        except Exception as error:
            if not message.reply.done():
                message.reply.set_exception(error)
            return
        self._follow_pin(self._registry.record(version))
        self._registrations[version] = (message, undo)
        self._bring_to_ram(self._registry.record(version), message.reply)

    def _name(self, message: LoadAdapter) -> tuple[AdapterVersion, Callable[[], None]]:
        """(the version, what takes the name back)."""
        registry, adapter_id, tenant = self._registry, message.adapter_id, message.tenant
        if registry.adapter_root is None:
            raise Unavailable("the server has no --adapter-root to load adapters from")
        folder = registry.folder_under_root(message.folder)
        if not message.replace:
            version = registry.register(adapter_id, folder, tenant)
            return version, lambda: registry.forget(version)
        version, old = registry.replace(adapter_id, folder, tenant)
        return version, lambda: registry.restore(version, old)

    def _bring_to_ram(self, record: AdapterRecord, reply: asyncio.Future[AdapterInfo]) -> None:
        version = record.version
        if version in self._host or self._slots.holds(version):
            self._registrations.pop(version, None)
            if not reply.done():
                reply.set_result(self._info(record))
            return
        self._asked.setdefault(version, []).append(reply)
        self._queue.add(version, Urgency.ASKED)

    def _tell_asked(self, version: AdapterVersion, error: JLoraxError | None) -> None:
        registration = self._registrations.pop(version, None)
        if registration is not None and error is not None:
            registration[1]()
        for reply in self._asked.pop(version, []):
            if reply.done():
                continue
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(self._info(self._registry.record(version)))

    def _unload(self, message: UnloadAdapter) -> None:
        """Frees the adapter's memory and its merges'; a registered name is forgotten too.

        When forced, whoever named it already is answered all the same: who runs keeps its slot, who
        waits loads it again, and gets a clear error when the files are gone.
        """
        version, is_registered = self._to_unload(message)
        record = self._registry.known(version)
        if record is not None and (refusal := _why_not_theirs(message.tenant, record)) is not None:
            raise refusal
        if version in self._registrations:
            raise AdapterConflict(f"adapter {message.adapter_id!r} is still being loaded")
        affected = [version, *self._registry.derived.made_of(version)]
        num_requests = sum(self._num_requests[each] for each in affected)
        if num_requests and not message.force:
            raise AdapterConflict(
                f"{num_requests} requests use adapter {message.adapter_id!r}; "
                "use force to unload it"
            )
        if is_registered:
            self._registry.unregister(message.adapter_id, message.tenant)
        self._let_go(version)
        for each in affected:
            self._free(each)

    def _to_unload(self, message: UnloadAdapter) -> tuple[AdapterVersion, bool]:
        """(version, whether the name was registered here)."""
        try:
            return self._registry.registered_version(message.adapter_id, message.tenant), True
        except AdapterNotFound:
            version = self._registry.known_version(message.adapter_id)
            if version is None:
                raise
            return version, False

    def _free_superseded(self, version: AdapterVersion) -> None:
        """Nobody will ask for it again."""
        if not self._num_requests[version] and not self._registry.is_current(version):
            self._free(version)

    def _free(self, version: AdapterVersion) -> None:
        self._host.drop(version)
        for book in (self._sizes, self._load_s, self._came_from):
            book.pop(version, None)
        if not self._num_requests[version]:
            self._num_requests.pop(version, None)
        if self._slots.holds(version) and not self._slots.num_pins(version):
            self._slots.evict(version)

    def _scan(self, message: ListAdapters) -> None:
        """Walking ten thousand folders takes a second: on a thread."""
        look = self._registry.survey()

        def scan() -> None:
            try:
                self._inbox.post_from_thread(Scanned(message, look()))
            except Exception as error:
                loop.call_soon_threadsafe(_fail, message.reply, error)

        loop = asyncio.get_running_loop()
        if not message.reply.done():
            self._lookups.submit(scan)

    def _list(self, message: ListAdapters, seen: list[Seen]) -> list[AdapterInfo]:
        visible = (message.tenant, DEFAULT_TENANT)
        records = self._registry.merge(seen)
        return [self._info(record) for record in records if record.version.tenant in visible]

    def _info(self, record: AdapterRecord) -> AdapterInfo:
        version = record.version
        return AdapterInfo(
            adapter_id=version.adapter_id,
            tenant=version.tenant,
            generation=version.generation,
            source=record.source,
            tier=self._tier(version),
            rank=record.rank,
            target_modules=record.target_modules,
            size_bytes=self._size_bytes(record),
            num_requests=record.num_requests,
            last_used_s=record.last_used_s,
            pinned=self._kept.get((version.tenant, version.adapter_id)) == version,
        )

    def _size_bytes(self, record: AdapterRecord) -> int | None:
        size_bytes = self._sizes.get(record.version)
        if size_bytes is None and self._disk is not None:
            return self._disk.size_bytes(self._loader.key(record))
        return size_bytes

    def _tier(self, version: AdapterVersion) -> Tier:
        """The fastest that has it."""
        if self._slots.holds(version):
            return Tier.DEVICE
        if version in self._host:
            return Tier.HOST
        record = self._registry.known(version)
        if record is None or self._disk is None:
            return Tier.SOURCE
        kept = self._disk.size_bytes(self._loader.key(record))
        return Tier.SOURCE if kept is None else Tier.DISK


def _too_large(version: AdapterVersion, packed: PackedAdapter) -> JLoraxError:
    reason = f"its {packed.size_bytes} bytes do not fit the adapter bank (--adapter-bank-bytes)"
    return AdapterInvalid(version.adapter_id, "its weights", reason)


def _why_not_theirs(tenant: str, record: AdapterRecord) -> JLoraxError | None:
    """What all tenants use is not for one of them to pin or to unload."""
    if record.version.tenant == tenant:
        return None
    return Forbidden(
        f"adapter {record.version.adapter_id!r} is shared by all tenants: only the tenant "
        f"{DEFAULT_TENANT!r} may pin or unload it"
    )


def _no_room_to_pin(version: AdapterVersion) -> JLoraxError:
    return AdapterConflict(
        f"adapter {version.adapter_id!r} cannot be pinned: with those pinned already, the bank "
        "would have no room left for another adapter of the largest rank"
    )


def _note_unpinned(reply: asyncio.Future[AdapterInfo]) -> None:
    if not reply.cancelled() and (error := reply.exception()) is not None:
        log.error("an adapter that was to be pinned is not: %s", error)


def _answer(reply: asyncio.Future[T], work: Callable[[M], T], message: M) -> None:
    """The caller gets the result or the error, whatever it is; the actor goes on."""
    if reply.done():
        return
    try:
        reply.set_result(work(message))
    except Exception as error:
        reply.set_exception(error)


def _fail(reply: asyncio.Future[T], error: Exception) -> None:
    if not reply.done():
        reply.set_exception(error)
