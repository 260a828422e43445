"""Merges through the cache actor: resolved, loaded once, kept, bounded and freed."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jlorax.actors.messages import (
    Acquire,
    AdapterAtHand,
    AdapterUnloadable,
    Derive,
    Forget,
    Release,
    WriteSlot,
)
from jlorax.adapters.derived import DerivedVersions
from jlorax.errors import AdapterConflict, AdapterInvalid
from jlorax.types import AdapterMerge, AdapterVersion, MergeStrategy, Tier
from tests.actors.test_cache import NAMES, Bench, on_bench
from tests.adapters import helpers

AB = AdapterMerge(("a", "b"), (0.5, 2.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        helpers.write_good(tmp_path / "root" / name, rank=4, seed=seed)
    return tmp_path / "root"


async def derive(bench: Bench, merge: AdapterMerge) -> AdapterVersion:
    parts = [await bench.resolve(name) for name in merge.adapter_ids]
    reply: asyncio.Future[AdapterVersion] = asyncio.get_running_loop().create_future()
    await bench.inbox.put(Derive(merge, tuple(parts), reply))
    return await reply


async def use(bench: Bench, version: AdapterVersion) -> None:
    """A request comes, is answered and goes."""
    bench.prefetch(version)
    bench.inbox.post(Acquire(version))
    await bench.until_ready(version)
    bench.inbox.post(Release(version))
    bench.inbox.post(Forget(version))
    bench.log.clear()


def test_a_merge_is_loaded_once_and_goes_through_every_tier(root: Path, tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        version = await derive(bench, AB)
        for _ in range(3):
            await use(bench, version)
        assert await derive(bench, AB) == version
        assert bench.loader.loads == {version.adapter_id: 1}
        await bench.until_on_disk(version)
        bench.tiers.host.drop(version)
        bench.tiers.slots.evict(version)
        await use(bench, version)
        hits = bench.tiers.counts.hits
        assert (hits[Tier.SOURCE], hits[Tier.DEVICE], hits[Tier.DISK]) == (1, 2, 1)
        assert bench.loader.loads == {version.adapter_id: 2}

    on_bench(root, test, disk_dir=tmp_path / "disk")


def test_a_merge_is_written_beside_its_parts(root: Path) -> None:
    async def test(bench: Bench) -> None:
        versions = [await derive(bench, AB), *[await bench.resolve(name) for name in "ab"]]
        for version in versions:
            bench.inbox.post(Acquire(version))
        slots = {(await bench.until_ready(version)).slot for version in versions}
        assert len(slots) == 3
        assert len([m for m in bench.log if isinstance(m, WriteSlot)]) == 3

    on_bench(root, test, max_slots=3)


def test_merges_are_not_listed(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await use(bench, await derive(bench, AB))
        infos = await bench.list()
        assert set(infos) == set(NAMES)
        assert (infos["a"].num_requests, infos["c"].num_requests) == (1, 0)

    on_bench(root, test)


def test_what_the_configs_forbid_is_refused_and_nothing_is_loaded(root: Path) -> None:
    helpers.write_good(root / "wide", rank=8)

    async def test(bench: Bench) -> None:
        with pytest.raises(AdapterInvalid, match="4, 8"):
            await derive(bench, AdapterMerge(("a", "wide"), (1.0, 1.0)))
        assert not bench.loader.loads

    on_bench(root, test)


def test_a_part_that_cannot_be_read_fails_the_merge_by_its_own_name(root: Path) -> None:
    (root / "b" / "adapter_model.safetensors").write_bytes(b"no such thing")

    async def test(bench: Bench) -> None:
        version = await derive(bench, AB)
        bench.prefetch(version)
        failed: AdapterUnloadable = await bench.until_type(AdapterUnloadable)
        assert failed.version == version and isinstance(failed.error, AdapterInvalid)
        assert failed.error.adapter == "b"

    on_bench(root, test)


def test_a_replaced_part_gives_a_new_merge_and_the_old_one_goes_with_its_last_request(
    root: Path,
) -> None:
    async def test(bench: Bench) -> None:
        old = await derive(bench, AB)
        bench.prefetch(old)
        bench.inbox.post(Acquire(old))
        await bench.until_ready(old)
        shutil.rmtree(root / "b")
        helpers.write_good(root / "b", rank=4, seed=99)
        new = await derive(bench, AB)
        await use(bench, new)
        assert new != old and bench.tiers.slots.holds(old)
        bench.inbox.post(Release(old))
        bench.inbox.post(Forget(old))
        await bench.resolve("a")
        assert not bench.tiers.slots.holds(old) and old not in bench.tiers.host
        assert bench.tiers.slots.holds(new) and new in bench.tiers.host

    on_bench(root, test)


def test_unloading_a_part_frees_its_merges_but_not_under_a_request(root: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.load_adapter("x", "c")
        merge = replace(AB, adapter_ids=("a", "x"))
        version, other = await derive(bench, merge), await derive(bench, AB)
        await use(bench, other)
        await use(bench, version)
        bench.prefetch(version)
        with pytest.raises(AdapterConflict, match="1 requests use adapter 'x'"):
            await bench.unload("x")
        bench.inbox.post(Forget(version))
        await bench.unload("x")
        for tier in (bench.tiers.host, bench.tiers.slots.versions):
            assert version not in tier and other in tier

    on_bench(root, test)


def test_those_that_nobody_uses_are_bounded_with_their_memory(root: Path) -> None:
    async def test(bench: Bench) -> None:
        registry = bench.tiers.registry
        registry.derived = DerivedVersions(max_unused=1)
        first = await derive(bench, AB)
        bench.prefetch(first)
        await bench.until(AdapterAtHand(first))
        merges = [replace(AB, weights=(1.0, float(i))) for i in range(3)]
        for merge in merges:
            await use(bench, await derive(bench, merge))
        last = await derive(bench, AdapterMerge(("a",), (0.5,), MergeStrategy.CAT))
        assert len(registry.derived) == 2
        assert registry.known(first) and registry.known(last)
        assert list(bench.tiers.host) == [first] and not bench.tiers.slots.versions

    on_bench(root, test)
