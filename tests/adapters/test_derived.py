"""Merges as versions: what they are called, who may have them, and that their parts are loaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from jlorax.adapters.derived import DerivedVersions
from jlorax.adapters.disk_tier import DiskTier
from jlorax.adapters.loader import LoadCancelled, Loader
from jlorax.adapters.merge import merge_adapters
from jlorax.adapters.pack import pack
from jlorax.adapters.packing import PackerProcess
from jlorax.adapters.peft import read_adapter
from jlorax.adapters.registry import MERGED, AdapterRecord, Registry, is_valid_id
from jlorax.adapters.remote import Described
from jlorax.adapters.sources import Sources
from jlorax.errors import AdapterChanged, AdapterInvalid, AdapterNotFound
from jlorax.types import AdapterMerge, MergeStrategy, Tier
from tests.adapters import helpers

LAYOUT = helpers.layout(max_rank=16)
LINEAR = AdapterMerge(("a", "b"), (0.5, 2.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        helpers.write_good(tmp_path / "root" / name, rank=4, seed=seed)
    helpers.write_good(tmp_path / "root" / "wide", names=("v_proj", "down_proj"), rank=9, seed=7)
    return tmp_path / "root"


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry(root, "base", max_rank=16)


def derive(registry: Registry, merge: AdapterMerge, tenant: str = "default") -> AdapterRecord:
    return registry.derive(merge, [registry.resolve(tenant, name) for name in merge.adapter_ids])


# ---- versions


def test_equal_merges_of_equal_contents_are_one_version(registry: Registry) -> None:
    first = derive(registry, LINEAR)
    assert derive(registry, LINEAR) is first
    assert derive(registry, replace(LINEAR, weights=(0.5, 1.0))).version != first.version
    assert derive(registry, replace(LINEAR, adapter_ids=("a", "c"))).version != first.version
    assert (first.rank, first.target_modules, first.source) == (4, ("q_proj", "v_proj"), MERGED)
    assert registry.record(first.version) is registry.known(first.version) is first


def test_a_merge_has_no_name(registry: Registry) -> None:
    version = derive(registry, LINEAR).version
    assert registry.num_known == 2
    assert not is_valid_id(version.adapter_id)
    assert version not in [record.version for record in registry.records()]
    assert registry.known_version(version.adapter_id) is None
    with pytest.raises(AdapterNotFound):
        registry.unregister(version.adapter_id)
    with pytest.raises(AdapterNotFound):
        registry.registered_version(version.adapter_id)


def test_a_part_that_became_another_gives_another_merge(registry: Registry, root: Path) -> None:
    first = derive(registry, LINEAR)
    assert registry.is_current(first.version)
    shutil.rmtree(root / "b")
    helpers.write_good(root / "b", rank=4, seed=99)
    second = derive(registry, LINEAR)
    assert second.version != first.version
    assert registry.is_current(second.version) and not registry.is_current(first.version)
    assert registry.record(first.version) is first  # whoever has it keeps it


def test_a_part_that_is_unregistered_ends_its_merges(registry: Registry, root: Path) -> None:
    part = registry.register("x", root / "c")
    merge = AdapterMerge(("a", "x"), (1.0, 1.0))
    version = derive(registry, merge).version
    assert registry.derived.made_of(part) == [version]
    registry.unregister("x")
    assert not registry.is_current(version)
    registry.register("x", root / "c")  # the same files again
    assert derive(registry, merge).version == version
    assert registry.is_current(version)


def test_who_owns_a_merge(registry: Registry, root: Path) -> None:
    """Of everybody's adapters it is everybody's; with one of a tenant's it is that tenant's."""
    for tenant in ("one", "two"):
        registry.register("own", root / "c", tenant)
    shared = [derive(registry, LINEAR, tenant).version for tenant in ("default", "one", "two")]
    assert {version.tenant for version in shared} == {"default"} and len(set(shared)) == 1
    merge = replace(LINEAR, adapter_ids=("a", "own"))
    own = [derive(registry, merge, tenant).version for tenant in ("one", "two")]
    assert [version.tenant for version in own] == ["one", "two"]
    with pytest.raises(AdapterNotFound, match="'own'"):
        derive(registry, merge)


def test_configs_that_cannot_be_merged_are_refused_before_any_load(registry: Registry) -> None:
    with pytest.raises(AdapterInvalid, match=r"linear .* 4, 9; cat and svd"):
        derive(registry, AdapterMerge(("a", "wide"), (1.0, 1.0)))
    cat = AdapterMerge(("a", "wide", "b"), (1.0, 1.0, 1.0), MergeStrategy.CAT)
    with pytest.raises(AdapterInvalid, match=r"rank 17, above the limit of 16"):
        derive(registry, cat)
    assert not len(registry.derived)


def test_only_so_many_that_nobody_uses(registry: Registry) -> None:
    registry.derived = DerivedVersions(max_unused=3)
    versions = [derive(registry, replace(LINEAR, seed=seed)).version for seed in range(6)]
    used = {versions[0], versions[5]}
    derive(registry, replace(LINEAR, seed=1))  # asked for again: goes last
    assert registry.derived.forget_unused(used.__contains__) == [versions[2]]
    assert registry.derived.forget_unused(used.__contains__) == []
    assert registry.derived.forget_unused(lambda version: False) == [versions[0], versions[3]]
    assert len(registry.derived) == 3 and registry.known(versions[3]) is None
    assert not registry.is_current(versions[3])
    with pytest.raises(AdapterNotFound):
        registry.record(versions[3])


# ---- loads


@dataclass
class Far:
    """A remote whose adapters are folders of the test's."""

    folders: dict[str, Path]
    fetched: list[str] = field(default_factory=list)

    def describe(self, adapter_id: str) -> Described:
        config = (self.folders[adapter_id] / "adapter_config.json").read_bytes()
        return Described("revision 1", config, 1, "")

    def fetch(self, adapter_id: str, described: Described, folder: Path, max_bytes: int) -> None:
        self.fetched.append(adapter_id)
        shutil.copytree(self.folders[adapter_id], folder, dirs_exist_ok=True)


def expected(root: Path, merge: AdapterMerge) -> np.ndarray:
    parts = [read_adapter(root / n, n, LAYOUT.projections, 16) for n in merge.adapter_ids]
    return np.asarray(pack(merge_adapters(parts, merge, 16), LAYOUT).buffer)


MERGES = {
    "linear": LINEAR,
    "ties": replace(LINEAR, strategy=MergeStrategy.TIES, density=0.5),
    "dare": replace(LINEAR, strategy=MergeStrategy.DARE_TIES, density=0.5, seed=5),
    "cat": AdapterMerge(("a", "wide"), (0.5, 2.0), MergeStrategy.CAT),
    "svd": AdapterMerge(("wide", "a"), (0.5, 2.0), MergeStrategy.SVD, rank=3),
    "scaled": AdapterMerge(("wide",), (0.5,), MergeStrategy.SVD, rank=3),
}


@pytest.mark.parametrize("name", MERGES)
def test_the_parts_are_read_merged_and_packed(name: str, registry: Registry, root: Path) -> None:
    loader, record = Loader(LAYOUT), derive(registry, MERGES[name])
    load = loader.load(record)
    assert load.tier is Tier.SOURCE
    np.testing.assert_array_equal(np.asarray(load.packed.buffer), expected(root, MERGES[name]))
    assert max(load.packed.ranks.values()) <= record.rank
    scaling = np.float32(0.5 * 8 / 9 if name == "scaled" else 1)
    assert set(load.packed.scaling.ravel().tolist()) == {0, float(scaling)}


def test_a_process_merges_too_and_tells_whose_fault_it_is(registry: Registry, root: Path) -> None:
    loader = Loader(LAYOUT, new_packer=PackerProcess)
    try:
        for name in ("dare", "svd"):
            load = loader.load(derive(registry, MERGES[name]))
            found = np.asarray(load.packed.buffer)
            np.testing.assert_array_equal(found, expected(root, MERGES[name]))
        unequal = helpers.write_good(root / "unequal", names=("q_proj", "k_proj"), rank=4)
        text = (unequal / "adapter_config.json").read_text()
        (unequal / "adapter_config.json").write_text(
            text.replace('"r": 4', '"r": 2, "rank_pattern": {"k_proj": 4}')
        )
        tensors = helpers.tensors_for(
            helpers.modules_of(LAYOUT.projections, ("q_proj",), 2)
            | helpers.modules_of(LAYOUT.projections, ("k_proj",), 4),
            LAYOUT.projections,
        )
        (unequal / "adapter_model.safetensors").write_bytes(helpers.safetensors_bytes(tensors))
        record = derive(registry, AdapterMerge(("a", "unequal"), (1.0, 1.0)))
        with pytest.raises(AdapterInvalid, match=r"layer 0 of q_proj they have 4, 2") as caught:
            loader.load(record)
        assert caught.value.adapter == "a + unequal"
        weights = root / "b" / "adapter_model.safetensors"
        weights.write_bytes(b"no such thing")
        with pytest.raises(AdapterInvalid) as caught:
            loader.load(derive(registry, LINEAR))
        assert caught.value.adapter == "b"
    finally:
        loader.close()


def test_a_part_whose_files_change_meanwhile(registry: Registry, root: Path) -> None:
    record = derive(registry, LINEAR)
    weights = root / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(AdapterChanged, match="'b'"):
        Loader(LAYOUT).load(record)


def test_parts_for_another_base_model(registry: Registry, root: Path) -> None:
    other = helpers.llama_projections(d=24)
    shutil.rmtree(root / "b")
    helpers.write_good(root / "b", projections=other)
    with pytest.raises(AdapterInvalid, match="another base model") as caught:
        Loader(LAYOUT).load(derive(registry, LINEAR))
    assert caught.value.adapter == "b"


def test_remote_parts_are_fetched_and_go_again(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    far = Far({"org/x": root / "b", "org/y": root / "wide"})
    (tmp_path / "workspace").mkdir()
    loader = Loader(LAYOUT, Sources({"far": far}, tmp_path / "workspace"))
    merge = AdapterMerge(("org/y", "a", "org/x"), (0.5, 1.0, 2.0), MergeStrategy.SVD)
    versions = [
        registry.learn("far", name, far.describe(name)).version
        if name in far.folders
        else registry.resolve("default", name)
        for name in merge.adapter_ids
    ]
    record = registry.derive(merge, versions)
    load = loader.load(record)
    same = replace(merge, adapter_ids=("wide", "a", "b"))
    np.testing.assert_array_equal(np.asarray(load.packed.buffer), expected(root, same))
    assert far.fetched == ["org/y", "org/x"]
    assert not list((tmp_path / "workspace").iterdir())
    with pytest.raises(LoadCancelled):
        loader.load(record, is_wanted=lambda: False)
    assert len(far.fetched) == 2


def test_the_disk_tier_keeps_a_merge_by_what_it_is_made_of(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    """Also after a restart, which counts generations anew."""
    loader, record = Loader(LAYOUT), derive(registry, LINEAR)
    load = loader.load(record)
    (tmp_path / "disk").mkdir()
    disk = DiskTier(tmp_path / "disk", 1 << 20)
    spooled = loader.spool(record, load.packed, disk.folder)
    disk.take(spooled.source, spooled.digest, spooled.path, spooled.size_bytes)
    later = Registry(root, "base", max_rank=16)
    again = loader.load(derive(later, LINEAR), disk.find(loader.key(derive(later, LINEAR))))
    assert again.tier is Tier.DISK
    np.testing.assert_array_equal(np.asarray(again.packed.buffer), np.asarray(load.packed.buffer))
    assert disk.find(loader.key(derive(later, replace(LINEAR, weights=(0.5, 1.0))))) is None


def test_what_was_forgotten_is_the_same_when_it_is_asked_for_again(registry: Registry) -> None:
    registry.derived = DerivedVersions(max_unused=0)
    first = derive(registry, LINEAR).version
    assert registry.derived.forget_unused(lambda version: False) == [first]
    assert derive(registry, LINEAR).version == first
