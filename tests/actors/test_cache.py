"""The cache actor on real files, between a scheduler and a runner that are only mailboxes."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
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
from jlorax.adapters.registry import AdapterRecord, Registry
from jlorax.adapters.slots import SlotTable
from jlorax.errors import AdapterConflict, AdapterInvalid, AdapterNotFound
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

    def load(self, record: AdapterRecord) -> tuple[PackedAdapter, Tier]:
        self.loads[record.version.adapter_id] += 1
        self.order.append(record.version.adapter_id)
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if record.version.adapter_id in self.faulty:
            raise ZeroDivisionError("a bug of ours")
        return super().load(record)


@dataclass
class Bench:
    """The actor, its neighbours' inboxes, and a log in which both write, in order."""

    inbox: Mailbox[CacheMessage]
    loader: GatedLoader
    slots: SlotTable
    log: list[object]
    news: asyncio.Event

    def prefetch(self, version: AdapterVersion) -> None:
        self.inbox.post(Prefetch(version))

    async def resolve(self, name: str) -> AdapterVersion:
        reply: asyncio.Future[AdapterVersion] = asyncio.get_running_loop().create_future()
        await self.inbox.put(Resolve("default", name, None, reply))
        return await reply

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        reply: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        await self.inbox.put(LoadAdapter("default", name, folder, reply))
        return await reply

    async def unload(self, name: str, force: bool = False) -> None:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.inbox.put(UnloadAdapter("default", name, force, reply))
        await reply

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
) -> None:
    async def run() -> None:
        log: list[object] = []
        news = asyncio.Event()
        inbox: Mailbox[CacheMessage] = Mailbox(64)
        scheduler: Mailbox[SchedulerMessage] = Logged(log, news)
        runner: Mailbox[RunnerMessage] = Logged(log, news)
        loader = GatedLoader(LAYOUT, None)
        loader.gate.set()
        slots = SlotTable(max_slots, dict.fromkeys(LAYOUT.pools, 100))
        host: HostTier[PackedAdapter] = HostTier(host_bytes)
        cache = Cache(
            inbox, scheduler, runner, Registry(root, "base"), loader, host, slots, Metrics()
        )
        task = asyncio.create_task(cache.run())
        try:
            async with asyncio.timeout(20):
                await test(Bench(inbox, loader, slots, log, news))
            assert not task.done(), task
        finally:
            loader.gate.set()
            task.cancel()
            await asyncio.wait([task])
        slots.check()
        assert not [t for t in threading.enumerate() if t.name.startswith("adapter-load")]

    asyncio.run(run())


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
        assert bench.slots.num_pins(version) == 1

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
        assert bench.slots.num_pinned == 2

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
            (root / "a" / "adapter_model.safetensors").write_bytes(b"no such thing")
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
        await bench.inbox.put(LoadAdapter("default", "x", "a", gone[1]))
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
        reply: asyncio.Future[list[AdapterInfo]] = asyncio.get_running_loop().create_future()
        await bench.inbox.put(ListAdapters("default", reply))
        tiers = {info.adapter_id: info.tier for info in await reply}
        assert (tiers["a"], tiers["b"], tiers["c"]) == (Tier.DEVICE, Tier.HOST, Tier.SOURCE)

    on_bench(root, test)
