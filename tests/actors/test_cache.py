"""The cache actor on real files, between a scheduler and a runner that are only mailboxes."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jlorax.actors.cache import Cache
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
    PinAdapter,
    Prefetch,
    PrefetchAdapter,
    Release,
    Resolve,
    RunnerMessage,
    SchedulerMessage,
    UnloadAdapter,
    WriteSlot,
)
from jlorax.adapters.disk_tier import DiskTier
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import Load, Loader, Spooled
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.registry import AdapterRecord, Registry
from jlorax.adapters.remote import Described, RemoteSource
from jlorax.adapters.remote_names import MAX_QUESTIONS, RemoteNames
from jlorax.adapters.slots import SlotTable
from jlorax.adapters.sources import Sources
from jlorax.adapters.tiers import AdapterTiers
from jlorax.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    Forbidden,
    InvalidParameter,
    Overloaded,
    SourceUnavailable,
)
from jlorax.metrics import Metrics
from jlorax.types import AdapterInfo, AdapterVersion, Tier
from tests.adapters import helpers

NAMES = tuple("abcdef")
LAYOUT = helpers.layout(max_rank=8)


@dataclass(frozen=True)
class GatedLoader(Loader):
    """Counts loads, and lets them pass when its gate is open."""

    gate: threading.Event = field(default_factory=threading.Event)
    loads: Counter[str] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    disk_gate: threading.Event | None = None

    def spool(self, record: AdapterRecord, packed: PackedAdapter, folder: Path) -> Spooled:
        assert self.disk_gate is None or self.disk_gate.wait(10)
        return super().spool(record, packed, folder)

    def load(
        self,
        record: AdapterRecord,
        kept: Path | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Load:
        self.loads[record.version.adapter_id] += 1
        self.order.append(record.version.adapter_id)
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if record.version.adapter_id in self.faulty:
            raise ZeroDivisionError("a bug of ours")
        try:
            return super().load(record, kept, is_wanted)
        finally:
            self.ended.append(record.version.adapter_id)


@dataclass
class Bench:
    """The actor, its neighbours' inboxes, and a log in which both write, in order."""

    inbox: Mailbox[CacheMessage]
    loader: GatedLoader
    tiers: AdapterTiers
    log: list[object]
    news: asyncio.Event
    clock_s: float = 0.0

    def prefetch(self, version: AdapterVersion) -> None:
        self.inbox.post(Prefetch(version))

    async def resolve(self, name: str, source: str | None = None) -> AdapterVersion:
        reply: asyncio.Future[AdapterVersion] = asyncio.get_running_loop().create_future()
        await self.inbox.put(Resolve("default", name, source, reply))
        return await reply

    async def load_adapter(self, name: str, folder: str, replace: bool = False) -> AdapterInfo:
        reply: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        await self.inbox.put(LoadAdapter("default", name, folder, replace, reply))
        return await reply

    async def unload(self, name: str, force: bool = False, tenant: str = "default") -> None:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.inbox.put(UnloadAdapter(tenant, name, force, reply))
        await reply

    async def pin(self, name: str, pinned: bool = True, tenant: str = "default") -> AdapterInfo:
        reply: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        await self.inbox.put(PinAdapter(tenant, name, pinned, reply))
        return await reply

    async def prefetch_adapter(self, name: str) -> AdapterInfo:
        reply: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        await self.inbox.put(PrefetchAdapter("default", name, reply))
        return await reply

    async def list(self) -> dict[str, AdapterInfo]:
        reply: asyncio.Future[list[AdapterInfo]] = asyncio.get_running_loop().create_future()
        await self.inbox.put(ListAdapters("default", reply))
        return {info.adapter_id: info for info in await reply}

    async def until_loading(self, count: int) -> None:
        await _until(lambda: len(self.loader.order) >= count)

    async def until_on_disk(self, version: AdapterVersion) -> None:
        disk, key = self.tiers.disk, self.loader.key(self.tiers.registry.record(version))
        assert disk is not None
        await _until(lambda: disk.size_bytes(key) is not None)

    async def until_written(self, version: AdapterVersion) -> None:
        await _until(lambda: self.tiers.slots.holds(version))

    async def until(self, message: object) -> None:
        await self._first(lambda m: m == message)

    async def until_ready(self, version: AdapterVersion) -> AdapterReady:
        ready: AdapterReady = await self._first(
            lambda m: isinstance(m, AdapterReady) and m.version == version
        )
        return ready

    async def until_type(self, kind: type) -> Any:
        return await self._first(lambda m: isinstance(m, kind))

    async def _first(self, fits: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(5):
            while not (found := [m for m in self.log if fits(m)]):
                self.news.clear()
                await self.news.wait()
        return found[0]


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - what a thread does has no event
            await asyncio.sleep(0.001)


class Logged(Mailbox[Any]):
    """A mailbox whose posts are written down at once, with those of others."""

    def __init__(self, log: list[object], news: asyncio.Event) -> None:
        super().__init__(8)
        self._log = log
        self._news = news

    def post(self, message: object) -> None:
        self._log.append(message)
        self._news.set()


def on_bench(
    root: Path,
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    *,
    max_slots: int = 2,
    host_bytes: int = 1 << 20,
    num_loaders: int = 1,
    disk_dir: Path | None = None,
    remotes: Mapping[str, RemoteSource] | None = None,
    pinned: tuple[str, ...] = (),
) -> None:
    async def run() -> None:
        log: list[object] = []
        news = asyncio.Event()
        inbox: Mailbox[CacheMessage] = Mailbox(64)
        scheduler: Mailbox[SchedulerMessage] = Logged(log, news)
        runner: Mailbox[RunnerMessage] = Logged(log, news)
        loader = GatedLoader(LAYOUT, Sources(remotes or {}))
        loader.gate.set()
        registry = Registry(root, "base")
        tiers = AdapterTiers(
            registry,
            RemoteNames(registry, tuple(remotes or {})),
            loader,
            None if disk_dir is None else DiskTier(disk_dir, 1 << 20),
            HostTier(host_bytes),
            SlotTable(max_slots, dict.fromkeys(LAYOUT.pools, 100)),
            pinned,
        )
        cache = Cache(inbox, scheduler, runner, tiers, Metrics(), num_loaders)
        task = asyncio.create_task(cache.run())
        bench = Bench(inbox, loader, tiers, log, news)
        tiers.remote_names.clock = lambda: bench.clock_s
        try:
            async with asyncio.timeout(20):
                await test(bench)
            assert not task.done(), task
        finally:
            loader.gate.set()
            task.cancel()
            await asyncio.wait([task])
        tiers.slots.check()
        assert not [t for t in threading.enumerate() if t.name.startswith("adapter-load")]

    asyncio.run(run())


def packed_bytes(folder: Path) -> int:
    registry = Registry(None, "base")
    record = registry.record(registry.register("a", folder))
    return Loader(LAYOUT).load(record).packed.size_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        helpers.write_good(tmp_path / "root" / name, rank=4, seed=i)
    return tmp_path / "root"


def test_the_write_is_sent_before_the_slot_is_ready(root: Path) -> None:
    async def test(bench: Bench) -> None:
        version = await bench.resolve("a")
        bench.inbox.post(Acquire(version))
        ready = await bench.until_ready(version)
        writes = [m for m in bench.log if isinstance(m, WriteSlot)]
        assert [w.write.slot for w in writes] == [ready.slot]
        assert bench.log.index(writes[0]) < bench.log.index(ready)
        assert bench.tiers.slots.num_pins(version) == 1

    on_bench(root, test)


def test_one_load_however_many_ask_and_never_on_the_loop(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        version = await bench.resolve("a")
        for _ in range(5):
            bench.prefetch(version)
        bench.inbox.post(Acquire(version))
        await bench.resolve("b")  # the actor goes on
        bench.loader.gate.set()
        await bench.until_ready(version)
        assert bench.loader.loads == {"a": 1}
        assert all(name.startswith("adapter-load") for name in bench.loader.threads)

    on_bench(root, test)


def test_a_resident_adapter_never_waits_for_one_that_loads(root: Path) -> None:
    async def test(bench: Bench) -> None:
        here, loading, registered = [await bench.resolve(n) for n in "abc"]
        bench.inbox.post(Acquire(here))
        await bench.until_ready(here)
        bench.inbox.post(Release(here))
        bench.log.clear()
        bench.loader.gate.clear()
        bench.prefetch(loading)
        bench.inbox.post(Acquire(loading))
        upload = asyncio.create_task(bench.load_adapter("new", registered.adapter_id))
        await bench.until(AdapterLoading(loading))
        bench.prefetch(here)
        bench.inbox.post(Acquire(here))
        assert (await bench.until_ready(here)).slot == 0
        assert await bench.resolve("a") == here
        assert not upload.done()
        bench.loader.gate.set()
        assert (await upload).tier is Tier.HOST
        await bench.until_ready(loading)

    on_bench(root, test)


def test_prefetched_weights_are_at_hand_and_acquired_without_another_load(root: Path) -> None:
    async def test(bench: Bench) -> None:
        version = await bench.resolve("a")
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        bench.log.clear()
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        bench.inbox.post(Acquire(version))
        await bench.until_ready(version)
        assert bench.loader.loads == {"a": 1}

    on_bench(root, test)


def test_pinned_slots_are_waited_for_in_line_and_given_at_release(root: Path) -> None:
    async def test(bench: Bench) -> None:
        versions = [await bench.resolve(n) for n in "abcd"]
        for version in versions[:2]:
            bench.inbox.post(Acquire(version))
            await bench.until_ready(version)
        for version in versions[2:]:
            bench.inbox.post(Acquire(version))
            await bench.until(AdapterAtHand(version))
        assert not [
            m for m in bench.log if isinstance(m, AdapterReady) and m.version in versions[2:]
        ]
        bench.inbox.post(Release(versions[1]))
        assert (await bench.until_ready(versions[2])).slot == 1
        bench.inbox.post(Release(versions[0]))
        assert (await bench.until_ready(versions[3])).slot == 0
        assert bench.tiers.slots.num_pinned == 2

    on_bench(root, test)


def test_a_host_tier_that_keeps_nothing_still_serves(root: Path) -> None:
    async def test(bench: Bench) -> None:
        for name in "abcd":
            version = await bench.resolve(name)
            bench.prefetch(version)
            await bench.until(AdapterAtHand(version))
            bench.inbox.post(Acquire(version))
            await bench.until_ready(version)
            bench.inbox.post(Release(version))

    on_bench(root, test, host_bytes=0)


def test_whoever_was_acquired_is_loaded_before_prefetches(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        versions = [await bench.resolve(n) for n in "abcde"]
        for version in versions[:4]:
            bench.prefetch(version)
        bench.inbox.post(Acquire(versions[4]))
        bench.inbox.post(Forget(versions[2]))  # its request was cancelled: not loaded at all
        await bench.until(AdapterLoading(versions[4]))
        bench.loader.gate.set()
        await bench.until(AdapterAtHand(versions[3]))
        assert bench.loader.order == ["a", "e", "b", "d"]

    on_bench(root, test)


@pytest.mark.parametrize("fault", ["file", "bug"])
def test_a_broken_adapter_fails_its_requests_and_the_actor_goes_on(root: Path, fault: str) -> None:
    async def test(bench: Bench) -> None:
        version = await bench.resolve("a")
        if fault == "file":
            path = root / "a" / "adapter_model.safetensors"
            path.write_bytes(b"no such thing")
            version = await bench.resolve("a")
        else:
            bench.loader.faulty.add("a")
        bench.prefetch(version)
        early = await bench.until_type(AdapterUnloadable)
        assert (early.version, type(early.error)) == (version, AdapterInvalid)
        bench.inbox.post(Acquire(version))
        late = await bench.until_type(AdapterFailed)
        assert (late.version, type(late.error)) == (version, AdapterInvalid)
        other = await bench.resolve("b")
        bench.inbox.post(Acquire(other))
        await bench.until_ready(other)

    on_bench(root, test)


def test_a_fault_while_registering_is_the_callers_alone(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.faulty.add("new")
        with pytest.raises(AdapterInvalid):
            await bench.load_adapter("new", "a")
        with pytest.raises(AdapterNotFound):
            await bench.load_adapter("new", "nowhere")
        bench.loader.faulty.clear()
        info = await bench.load_adapter("new", "a")  # the failed name is free again
        assert (info.adapter_id, info.tier) == ("new", Tier.HOST)
        with pytest.raises(AdapterConflict):
            await bench.load_adapter("new", "b")

    on_bench(root, test)


def test_unloading_is_refused_while_a_request_names_it_unless_forced(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        version = await bench.resolve("x")
        bench.prefetch(version)  # queued, with no slot yet
        with pytest.raises(AdapterConflict, match="1 requests"):
            await bench.unload("x")
        await bench.unload("x", force=True)
        with pytest.raises(AdapterNotFound):
            await bench.resolve("x")
        bench.inbox.post(Acquire(version))  # the queued request is served all the same
        await bench.until_ready(version)
        bench.inbox.post(Forget(version))
        bench.inbox.post(Release(version))
        with pytest.raises(AdapterNotFound):
            await bench.unload("x")

    on_bench(root, test)


def test_an_adapter_whose_folder_is_gone_can_be_unloaded(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        shutil.rmtree(root / "a")
        await bench.unload("x")
        with pytest.raises(AdapterNotFound):
            await bench.resolve("x")

    on_bench(root, test)


def test_files_changed_between_resolve_and_load_are_reported(root: Path) -> None:
    async def test(bench: Bench) -> None:
        old = await bench.resolve("a")
        shutil.rmtree(root / "a")
        helpers.write_good(root / "a", rank=2, seed=99)
        bench.prefetch(old)
        failed = await bench.until_type(AdapterUnloadable)
        assert "changed while it was loaded" in str(failed.error)
        new = await bench.resolve("a")
        assert new.generation == old.generation + 1
        bench.inbox.post(Acquire(new))
        await bench.until_ready(new)

    on_bench(root, test)


def test_a_caller_that_went_away_is_no_fault(root: Path) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        gone: list[asyncio.Future[Any]] = [loop.create_future() for _ in range(4)]
        for reply in gone:
            reply.cancel()
        await bench.inbox.put(Resolve("default", "a", None, gone[0]))
        await bench.inbox.put(LoadAdapter("default", "x", "a", False, gone[1]))
        await bench.inbox.put(ListAdapters("default", gone[2]))
        await bench.inbox.put(UnloadAdapter("default", "y", False, gone[3]))
        assert await bench.resolve("b")

    on_bench(root, test)


def test_the_list_names_tiers(root: Path) -> None:
    async def test(bench: Bench) -> None:
        a, b, _ = [await bench.resolve(n) for n in "abc"]
        bench.inbox.post(Acquire(a))
        await bench.until_ready(a)
        bench.prefetch(b)
        await bench.until(AdapterAtHand(b))
        tiers = {name: info.tier for name, info in (await bench.list()).items()}
        assert (tiers["a"], tiers["b"], tiers["c"]) == (Tier.DEVICE, Tier.HOST, Tier.SOURCE)

    on_bench(root, test)


# ---- several loads, and the disk tier


def test_as_many_loads_at_once_as_there_are_loaders(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        versions = [await bench.resolve(n) for n in "abc"]
        for version in versions:
            bench.prefetch(version)
        await bench.until_loading(2)
        assert len(bench.loader.threads) == 2
        bench.loader.gate.set()
        for version in versions:
            await bench.until(AdapterAtHand(version))

    on_bench(root, test, num_loaders=2)


def test_a_load_that_nobody_waits_for_is_given_up_and_taken_up_again(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        version, other = await bench.resolve("a"), await bench.resolve("b")
        bench.prefetch(version)
        await bench.until_loading(1)
        bench.inbox.post(Forget(version))
        bench.prefetch(other)
        await bench.resolve("c")  # until the actor has read all that
        bench.loader.gate.set()
        await bench.until(AdapterAtHand(other))
        assert version not in bench.tiers.host
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        assert bench.loader.loads == {"a": 2, "b": 1}

    on_bench(root, test)


def test_a_load_wanted_again_the_moment_it_was_given_up_is_begun_anew(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        version = await bench.resolve("a")
        bench.prefetch(version)
        await bench.until_loading(1)
        bench.inbox.post(Forget(version))
        await bench.resolve("c")
        bench.loader.gate.set()
        while not bench.loader.ended:  # the loop stands: its message is on the way
            time.sleep(0.001)  # noqa: ASYNC251
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        assert bench.loader.loads == {"a": 2}

    on_bench(root, test)


def test_a_load_given_up_and_wanted_again_in_time_goes_on(root: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.loader.gate.clear()
        version = await bench.resolve("a")
        bench.prefetch(version)
        await bench.until_loading(1)
        bench.inbox.post(Forget(version))
        bench.inbox.post(Acquire(version))
        await bench.resolve("c")
        bench.loader.gate.set()
        await bench.until_ready(version)
        assert bench.loader.loads == {"a": 1}

    on_bench(root, test)


def test_what_left_ram_before_it_was_written_is_not_kept_for_a_slow_disk(
    root: Path, tmp_path: Path
) -> None:
    async def test(bench: Bench) -> None:
        disk_gate = threading.Event()
        object.__setattr__(bench.loader, "disk_gate", disk_gate)
        versions = [await bench.resolve(name) for name in "abc"]
        for version in versions:
            bench.prefetch(version)
            await bench.until(AdapterAtHand(version))
            bench.inbox.post(Forget(version))
            await bench.resolve("d")
        disk_gate.set()
        for version in (versions[0], versions[2]):  # being written when it left, and still there
            await bench.until_on_disk(version)
        disk = bench.tiers.disk
        record = bench.tiers.registry.record(versions[1])
        assert disk is not None and disk.size_bytes(bench.loader.key(record)) is None

    one = int(1.5 * packed_bytes(root / "a"))
    on_bench(root, test, host_bytes=one, disk_dir=tmp_path / "disk")


def test_a_restart_reads_the_disk_tier_and_a_damaged_file_its_source(
    root: Path, tmp_path: Path
) -> None:
    disk_dir = tmp_path / "cache"

    async def first(bench: Bench) -> None:
        version = await bench.resolve("a")
        bench.prefetch(version)
        await bench.until_on_disk(version)
        assert bench.tiers.counts.hits == {Tier.SOURCE: 1}

    async def second(bench: Bench) -> None:
        version = await bench.resolve("a")
        info = (await bench.list())["a"]
        assert (info.tier, info.size_bytes is not None) == (Tier.DISK, True)
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        assert bench.tiers.counts.hits == {Tier.DISK: 1}

    async def third(bench: Bench) -> None:
        version = await bench.resolve("a")
        bench.prefetch(version)
        await bench.until(AdapterAtHand(version))
        await bench.until_on_disk(version)
        assert bench.tiers.disk is not None and bench.tiers.disk.damaged == 1

    on_bench(root, first, disk_dir=disk_dir)
    on_bench(root, second, disk_dir=disk_dir)
    (file,) = disk_dir.glob("*.lora")
    file.write_bytes(file.read_bytes()[:-1])
    on_bench(root, third, disk_dir=disk_dir)


def test_prefetching_stops_while_ram_is_full_of_what_waits(root: Path) -> None:
    """Four adapters are wanted and RAM holds two: nobody is pushed out before it was served."""

    async def test(bench: Bench) -> None:
        versions = [await bench.resolve(n) for n in "abcd"]
        for version in versions:
            bench.prefetch(version)
        await bench.until(AdapterAtHand(versions[1]))
        await bench.resolve("e")
        assert bench.loader.loads == {"a": 1, "b": 1}
        for version in versions:  # as slots come free
            bench.inbox.post(Acquire(version))
            await bench.until_ready(version)
            bench.inbox.post(Release(version))
            bench.inbox.post(Forget(version))
        assert all(count == 1 for count in bench.loader.loads.values())

    size = packed_bytes(root / "a")
    on_bench(root, test, host_bytes=2 * size, max_slots=1)


# ---- new generations


def test_a_replaced_name_gives_new_requests_new_weights_and_frees_the_old(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        old = await bench.resolve("x")
        bench.prefetch(old)
        bench.inbox.post(Acquire(old))
        await bench.until_ready(old)
        with pytest.raises(AdapterConflict):
            await bench.load_adapter("x", "b")
        info = await bench.load_adapter("x", "b", replace=True)
        new = await bench.resolve("x")
        assert info.generation == new.generation == old.generation + 1
        assert bench.tiers.slots.holds(old)  # a request still runs on it
        bench.inbox.post(Forget(old))
        bench.inbox.post(Release(old))
        await bench.resolve("x")
        assert not bench.tiers.slots.holds(old) and old not in bench.tiers.host

    on_bench(root, test)


def test_a_superseded_version_that_only_waited_leaves_the_ram(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        old = await bench.resolve("x")
        bench.prefetch(old)
        await bench.load_adapter("x", "b", replace=True)
        assert old in bench.tiers.host
        bench.inbox.post(Forget(old))
        await bench.resolve("x")
        assert old not in bench.tiers.host

    on_bench(root, test)


def test_a_bad_replacement_leaves_the_old_one(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        (root / "b" / "adapter_model.safetensors").write_bytes(b"no such thing")
        with pytest.raises(AdapterInvalid):
            await bench.load_adapter("x", "b", replace=True)
        version = await bench.resolve("x")
        bench.inbox.post(Acquire(version))
        await bench.until_ready(version)

    on_bench(root, test)


def test_unloading_a_folders_adapter_frees_its_memory(root: Path) -> None:
    async def test(bench: Bench) -> None:
        version = await bench.resolve("a")
        bench.inbox.post(Acquire(version))
        await bench.until_ready(version)
        bench.inbox.post(Release(version))
        await bench.unload("a")
        assert not bench.tiers.slots.holds(version) and version not in bench.tiers.host
        with pytest.raises(AdapterNotFound):
            await bench.unload("never heard of")

    on_bench(root, test)


# ---- pins of an operator


def test_a_pinned_adapter_stays_until_it_is_unpinned(root: Path) -> None:
    async def test(bench: Bench) -> None:
        info = await bench.pin("a")
        assert (info.tier, info.pinned) == (Tier.DEVICE, True)
        version = await bench.resolve("a")
        for name in "bcd":
            other = await bench.resolve(name)
            bench.inbox.post(Acquire(other))
            await bench.until_ready(other)
            bench.inbox.post(Release(other))
        assert bench.tiers.slots.holds(version)
        assert (await bench.list())["a"].pinned
        with pytest.raises(AdapterConflict, match="no room left"):
            await bench.pin("b")
        assert not (await bench.pin("a", False)).pinned
        await bench.pin("b")
        with pytest.raises(AdapterNotFound):
            await bench.pin("nowhere")

    on_bench(root, test)


def test_what_is_shared_is_not_one_tenants_to_pin_or_unload(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.resolve("a")
        for pinned in (True, False):
            with pytest.raises(Forbidden, match="shared"):
                await bench.pin("a", pinned, tenant="t1")
        with pytest.raises(Forbidden):
            await bench.unload("a", tenant="t1")

    on_bench(root, test)


def test_a_pin_follows_its_name_to_new_weights(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "a")
        await bench.pin("x")
        old = await bench.resolve("x")
        await bench.load_adapter("x", "b", replace=True)
        new = await bench.resolve("x")
        bench.inbox.post(Acquire(new))
        await bench.until_ready(new)
        assert bench.tiers.slots.is_kept(new) and not bench.tiers.slots.is_kept(old)

    on_bench(root, test)


def test_a_pin_follows_a_folder_whose_files_became_others(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.pin("a")
        old = await bench.resolve("a")
        shutil.rmtree(root / "a")
        helpers.write_good(root / "a", rank=2, seed=99)
        new = await bench.resolve("a")
        await bench.until_written(new)
        assert bench.tiers.slots.is_kept(new) and not bench.tiers.slots.is_kept(old)

    on_bench(root, test)


def test_the_configurations_pins_are_brought_in_first(root: Path) -> None:
    async def test(bench: Bench) -> None:
        version = await bench.resolve("b")
        await bench.until_written(version)
        assert bench.tiers.slots.is_kept(version)

    on_bench(root, test, pinned=("nowhere", "b"))


def test_prefetch_brings_to_ram(root: Path) -> None:
    async def test(bench: Bench) -> None:
        info = await bench.prefetch_adapter("a")
        assert info.tier is Tier.HOST and info.size_bytes is not None
        assert (await bench.prefetch_adapter("a")).tier is Tier.HOST
        assert bench.loader.loads == {"a": 1}
        bench.loader.faulty.add("b")
        with pytest.raises(AdapterInvalid):
            await bench.prefetch_adapter("b")

    on_bench(root, test)


# ---- remotes


@dataclass
class FakeRemote:
    """A remote whose adapters are folders of the test's."""

    folders: dict[str, Path]
    generation: int = 1
    is_down: bool = False
    questions: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def describe(self, adapter_id: str) -> Described:
        self.questions.append(adapter_id)
        assert self.gate.wait(10)
        if self.is_down:
            raise SourceUnavailable("far", "is down")
        if adapter_id not in self.folders:
            raise AdapterNotFound(adapter_id)
        config = (self.folders[adapter_id] / "adapter_config.json").read_bytes()
        return Described(f"revision {self.generation}", config, 1, "")

    def fetch(self, adapter_id: str, described: Described, folder: Path, max_bytes: int) -> None:
        if self.is_down:
            raise SourceUnavailable("far", "is down")
        shutil.copytree(self.folders[adapter_id], folder, dirs_exist_ok=True)


def test_a_remote_is_asked_once_however_many_want_it(root: Path, tmp_path: Path) -> None:
    far = FakeRemote({"org/x": helpers.write_good(tmp_path / "x", rank=3)})

    async def test(bench: Bench) -> None:
        far.gate.clear()
        asking = [asyncio.create_task(bench.resolve("org/x")) for _ in range(5)]
        assert (await bench.resolve("a")).adapter_id == "a"  # nobody else waits
        far.gate.set()
        versions = set(await asyncio.gather(*asking))
        assert len(versions) == 1 and far.questions == ["org/x"]
        (version,) = versions
        bench.inbox.post(Acquire(version))
        await bench.until_ready(version)
        info = (await bench.list())["org/x"]
        assert (info.source, info.rank, info.tier) == ("far", 3, Tier.DEVICE)
        assert await bench.resolve("org/x", "far") == version
        with pytest.raises(InvalidParameter, match="local, far"):
            await bench.resolve("org/x", "near")

    on_bench(root, test, remotes={"far": far})


def test_unknown_names_are_remembered_for_a_while(root: Path) -> None:
    far = FakeRemote({})

    async def test(bench: Bench) -> None:
        for _ in range(3):
            with pytest.raises(AdapterNotFound):
                await bench.resolve("org/none")
        assert far.questions == ["org/none"]
        bench.clock_s += 11
        with pytest.raises(AdapterNotFound):
            await bench.resolve("org/none")
        assert len(far.questions) == 2

    on_bench(root, test, remotes={"far": far})


def test_too_many_names_at_once_are_refused_and_known_ones_are_not(root: Path) -> None:
    far = FakeRemote({})

    async def test(bench: Bench) -> None:
        far.gate.clear()
        asking = [asyncio.create_task(bench.resolve(f"org/{i}")) for i in range(MAX_QUESTIONS)]
        await bench.resolve("a")
        with pytest.raises(Overloaded):
            await bench.resolve("org/more")
        far.gate.set()
        told = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(error, AdapterNotFound) for error in told)
        with pytest.raises(AdapterNotFound):
            await bench.resolve("org/more")

    on_bench(root, test, remotes={"far": far})


def test_a_remotes_new_revision_is_a_new_version_and_its_absence_no_fault(
    root: Path, tmp_path: Path
) -> None:
    far = FakeRemote({"org/x": helpers.write_good(tmp_path / "x")})

    async def test(bench: Bench) -> None:
        first = await bench.resolve("org/x")
        far.is_down = True
        bench.clock_s += 61
        assert await bench.resolve("org/x") == first  # what it said last still holds
        with pytest.raises(SourceUnavailable):
            await bench.resolve("org/y")
        bench.prefetch(first)
        failed = await bench.until_type(AdapterUnloadable)
        assert type(failed.error) is SourceUnavailable
        far.is_down, far.generation = False, 2
        bench.clock_s += 61
        second = await bench.resolve("org/x")
        assert second.generation == first.generation + 1
        bench.inbox.post(Acquire(second))
        await bench.until_ready(second)

    on_bench(root, test, remotes={"far": far})
