"""Host and disk: bytes are counted, the oldest go, a crash or a damaged file costs a miss."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jlorax.adapters.disk_tier import DiskTier, remove, temporary_file
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import LoadCancelled, Loader
from jlorax.adapters.packed_file import digest_of
from jlorax.adapters.packing import AnyPacker, Packer, PackerProcess
from jlorax.adapters.registry import AdapterRecord, Registry
from jlorax.adapters.tier_counts import TierCounts
from jlorax.errors import AdapterChanged, AdapterInvalid, ConfigError, Unavailable
from jlorax.layout import BankLayout, HostBuffer, Scratch
from jlorax.types import AdapterVersion, Tier
from tests.adapters import helpers


def v(name: str) -> AdapterVersion:
    return AdapterVersion("default", name, 1)


def test_host_evicts_the_oldest_by_bytes() -> None:
    tier: HostTier[str] = HostTier(10)
    assert tier.put(v("a"), "A", 4) and tier.put(v("b"), "B", 4)
    assert tier.get(v("a")) == "A"
    assert tier.put(v("c"), "C", 6)
    assert list(tier) == [v("a"), v("c")] and tier.used_bytes == 10
    assert tier.get(v("b")) is None and tier.evictions == 1


def test_host_keeps_nothing_larger_than_itself() -> None:
    tier: HostTier[str] = HostTier(10)
    tier.put(v("a"), "A", 4)
    assert not tier.put(v("b"), "B", 11)
    assert v("a") in tier and v("b") not in tier and tier.evictions == 0
    with pytest.raises(ConfigError, match="-1"):
        HostTier(-1)


def test_host_replaces_and_drops() -> None:
    tier: HostTier[str] = HostTier(10)
    tier.put(v("a"), "A", 8)
    tier.put(v("a"), "AA", 9)
    assert tier.get(v("a")) == "AA" and tier.used_bytes == 9 and tier.evictions == 0
    assert tier.drop(v("a")) and not tier.drop(v("a"))
    assert len(tier) == 0 and tier.used_bytes == 0


def test_host_spares_what_somebody_waits_for() -> None:
    tier: HostTier[str] = HostTier(10, is_wanted=lambda version: version == v("a"))
    tier.put(v("a"), "A", 5)
    tier.put(v("b"), "B", 5)
    tier.get(v("b"))
    tier.put(v("c"), "C", 5)
    assert list(tier) == [v("a"), v("c")]
    tier.put(v("d"), "D", 10)  # unless there is no other way
    assert list(tier) == [v("d")]


def test_host_keeps_what_is_dear_to_load() -> None:
    tier: HostTier[str] = HostTier(10)
    tier.put(v("dear"), "A", 5, reload_s=1.0)
    tier.put(v("cheap"), "B", 5, reload_s=0.1)
    tier.put(v("c"), "C", 5, reload_s=0.1)
    assert list(tier) == [v("dear"), v("c")]


def test_a_request_counts_a_hit_in_one_tier_and_misses_in_the_faster_ones() -> None:
    counts = TierCounts()
    for tier in (Tier.DEVICE, Tier.HOST, Tier.SOURCE):
        counts.found(tier)
    assert counts.hits == {Tier.DEVICE: 1, Tier.HOST: 1, Tier.SOURCE: 1}
    assert counts.misses == {Tier.DEVICE: 2, Tier.HOST: 1, Tier.DISK: 1}


def digest(seed: int) -> str:
    return hashlib.sha256(bytes([seed])).hexdigest()


def put(tier: DiskTier, seed: int, size: int = 100, source: str | None = None) -> list[Path]:
    """As the loader and the cache actor do: a temporary file, then the books."""
    descriptor, path = temporary_file(tier.folder)
    os.write(descriptor, bytes([seed]) * size)
    os.close(descriptor)
    gone = tier.take(source or f"source {seed}", digest(seed), path, size)
    remove(gone)
    return gone


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_disk_survives_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "new" / "cache", 1000)
    for seed in (1, 2, 2):
        put(tier, seed)
    put(tier, 1, source="another name")
    assert tier.used_bytes == 200
    again = DiskTier(tmp_path / "new" / "cache", 1000)
    assert again.used_bytes == 200 and len(again) == 2
    path = again.find("source 1")
    assert path is not None and path.read_bytes() == bytes([1]) * 100
    assert again.find("another name") == path and again.find("source 3") is None
    assert again.size_bytes("source 2") == 100 and again.size_bytes("source 3") is None


def test_disk_evicts_by_last_use_also_after_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 300)
    for seed in range(3):
        put(tier, seed)
        os.utime(tmp_path / f"{digest(seed)}.lora", ns=(seed, seed))
    assert tier.find("source 0") is not None
    tier = DiskTier(tmp_path, 300)
    gone = put(tier, 3)
    assert gone == [tmp_path / f"{digest(1)}.lora"]
    assert [digest(seed) in tier for seed in range(4)] == [True, False, True, True]
    assert tier.used_bytes == 300 and tier.evictions == 1 and tier.find("source 1") is None
    assert len(DiskTier(tmp_path, 100)) == 1  # a smaller quota at the next start
    assert len(files(tmp_path)) == 2


def test_disk_keeps_nothing_larger_than_itself(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 300)
    put(tier, 1)
    assert len(put(tier, 2, size=301)) == 1
    assert len(tier) == 1 and tier.failed_writes == 0 and len(files(tmp_path)) == 2


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1000)
    put(tier, 1)
    assert tier.drop("source 2") == []
    assert tier.drop("source 1") == [tmp_path / f"{digest(1)}.lora"]
    assert (tier.damaged, tier.used_bytes, tier.find("source 1")) == (1, 0, None)
    put(tier, 1)
    assert tier.find("source 1") is not None


def test_a_crash_leaves_nothing_half(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1000)
    put(tier, 1)
    descriptor, path = temporary_file(tmp_path)  # killed while it wrote
    os.close(descriptor)
    (tmp_path / ".jlorax-fetched.tmp").mkdir()
    (tmp_path / ".jlorax-fetched.tmp" / "adapter_config.json").write_text("{}")
    (tmp_path / "theirs.tmp").write_text("not ours")
    (tmp_path / f"{digest(5)}.lora").symlink_to("/etc/passwd")
    with (tmp_path / "index.jsonl").open("ab") as index:
        index.write(b'{"source": "source 2", "dig')
    tier = DiskTier(tmp_path, 1000)
    assert files(tmp_path) == {f"{digest(1)}.lora", "index.jsonl", "theirs.tmp"}
    assert tier.find("source 1") is not None and tier.find("source 2") is None and path != tmp_path


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": 1}', '{"source": 1, "digest": []}'])
def test_a_broken_index_is_an_empty_one(text: str, tmp_path: Path) -> None:
    put(DiskTier(tmp_path, 1000), 1)
    (tmp_path / "index.jsonl").write_text(text)
    tier = DiskTier(tmp_path, 1000)
    assert tier.find("source 1") is None and len(tier) == 1
    put(tier, 1)
    assert DiskTier(tmp_path, 1000).find("source 1") is not None


def test_the_index_does_not_grow_for_ever(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 200)
    for seed in range(50):
        put(tier, seed)
    DiskTier(tmp_path, 200)
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 2


def test_the_index_forgets_sources_whose_files_went(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 250)
    for i in range(1500):
        put(tier, i % 250, source=f"merge {i}")
    index = tmp_path / "index.jsonl"
    assert len(tier) == 2 and len(index.read_bytes().splitlines()) < 1100
    again = DiskTier(tmp_path, 250)
    assert again.find("merge 1499") is not None and again.find("merge 0") is None


def test_names_of_equal_content_do_not_make_the_index_be_written_again(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 250)
    index = tmp_path / "index.jsonl"
    put(tier, 1, source="name 0")
    number = index.stat().st_ino
    for i in range(1, 1500):
        put(tier, 1, source=f"name {i}")
    assert index.stat().st_ino == number and len(index.read_bytes().splitlines()) == 1500
    put(tier, 2, size=200)
    assert all(tier.find(f"name {i}") is None for i in range(1500)) and len(tier) == 1


def test_a_disk_that_will_not_is_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        put(tier, 1)
    assert tier.failed_writes == 1 and tier.used_bytes == 0 and files(tmp_path) == set()
    put(tier, 1)
    assert tier.find("source 1") is not None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        DiskTier(tmp_path / "file" / "cache", 10)
    with pytest.raises(ConfigError, match="-1"):
        DiskTier(tmp_path, -1)
    with pytest.raises(ConfigError, match="/proc"):
        DiskTier(Path("/proc"), 10)


def test_a_digest_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no sha256"):
        DiskTier(tmp_path, 10).take("source", "../../x", tmp_path / "x", 1)


# ---- the loader


def a_record(folder: Path, max_rank: int = 256) -> AdapterRecord:
    registry = Registry(None, "base", max_rank)
    return registry.record(registry.register("a", helpers.write_good(folder)))


@pytest.fixture(params=[Packer, PackerProcess])
def new_packer(request: pytest.FixtureRequest) -> Callable[[BankLayout], AnyPacker]:
    kind: Callable[[BankLayout], AnyPacker] = request.param
    return kind


@contextmanager
def opened(loader: Loader) -> Iterator[Loader]:
    yield loader
    loader.close()


def test_a_packed_file_is_read_again_or_its_source(
    new_packer: Callable[[BankLayout], AnyPacker], tmp_path: Path
) -> None:
    layout, record = helpers.layout("bfloat16"), a_record(tmp_path / "a")
    with opened(Loader(layout, new_packer=new_packer)) as loader:
        first = loader.load(record)
        assert (first.tier, first.kept_is_damaged) == (Tier.SOURCE, False)
        spooled = loader.spool(record, first.packed, tmp_path)
        assert spooled.source == loader.key(record)
        assert spooled.path.stat().st_size == spooled.size_bytes
        assert spooled.digest == digest_of(first.packed, layout)
        data = spooled.path.read_bytes()
        broken = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b""}
        for damage in ("none", *broken, "gone"):
            if damage in broken:
                spooled.path.write_bytes(broken[damage])
            elif damage == "gone":
                spooled.path.unlink()
            again = loader.load(record, spooled.path)
            assert again.tier is (Tier.DISK if damage == "none" else Tier.SOURCE)
            assert again.kept_is_damaged is (damage != "none")
            for field in ("buffer", "scaling"):
                ours, theirs = getattr(again.packed, field), getattr(first.packed, field)
                assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
            assert again.packed.entries == first.packed.entries


def test_a_spool_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, record = Loader(helpers.layout()), a_record(tmp_path / "a")
    (tmp_path / "spool").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jlorax.adapters.loader.write_packed", full)
    load = loader.load(record)
    with pytest.raises(OSError, match="No space"):
        loader.spool(record, load.packed, tmp_path / "spool")
    assert files(tmp_path / "spool") == set()


class CopyingMemory:
    """As a GPU's: buffers are built in memory that is used again, and kept elsewhere."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.kept: list[np.ndarray] = []

    def reserve(self, num_bytes: int) -> None:
        return

    def blank(self, num_bytes: int) -> np.ndarray:
        room = self.scratch.room(num_bytes)
        room[:] = 0
        return room

    def keep(self, buffer: np.ndarray) -> HostBuffer:
        return self.copy(buffer)

    def copy(self, buffer: np.ndarray) -> HostBuffer:
        self.kept.append(buffer.copy())
        return self.kept[-1]


def test_what_is_loaded_waits_where_the_device_reads_it(
    new_packer: Callable[[BankLayout], AnyPacker], tmp_path: Path
) -> None:
    """From its folder or from the disk tier; and memory that is used again is clean."""
    layout, memory = helpers.layout(), CopyingMemory()
    registry = Registry(None, "base", layout.max_rank)
    names = ("q_proj", "v_proj")
    folder = helpers.write_good(tmp_path / "large", names=names, rank=31, seed=7)
    large = registry.record(registry.register("large", folder))
    record = a_record(tmp_path / "a")
    expected = np.asarray(Loader(layout).load(record).packed.buffer)
    with opened(Loader(layout, memory=memory, new_packer=new_packer)) as loader:
        loader.load(large)
        first = loader.load(record)
        spooled = loader.spool(record, first.packed, tmp_path)
        second = loader.load(record, spooled.path)
        loader.load(large)
    for load in (first, second):
        assert any(load.packed.buffer is kept for kept in memory.kept)
        assert np.array_equal(np.asarray(load.packed.buffer), expected)


def test_a_load_that_nobody_wants_stops(tmp_path: Path) -> None:
    record = a_record(tmp_path / "a")
    for answers in ([False], [True, False], [True, True, False]):
        asked = iter(answers)
        with pytest.raises(LoadCancelled):
            Loader(helpers.layout()).load(record, is_wanted=lambda asked=asked: next(asked))
        assert next(asked, None) is None


def test_a_process_tells_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    layout = helpers.layout(max_rank=8)
    good, bad = a_record(tmp_path / "a"), a_record(tmp_path / "b")
    folder = tmp_path / "b"
    weights = folder / "adapter_model.safetensors"
    with opened(Loader(layout, new_packer=PackerProcess)) as loader:
        packer = PackerProcess(layout)
        loader._idle.put(packer)
        weights.write_bytes(weights.read_bytes())
        with pytest.raises(AdapterChanged):
            loader.load(bad)
        weights.write_bytes(b"no such thing")
        registry = Registry(None, "base", layout.max_rank)
        broken = registry.record(registry.register("broken", folder))
        with pytest.raises(AdapterInvalid, match="broken") as caught:
            loader.load(broken)
        assert caught.value.file == "adapter_model.safetensors"
        load = loader.load(good)
        with pytest.raises(OSError, match="No such file"):
            loader.spool(good, load.packed, tmp_path / "nowhere")
        assert packer.is_alive
        packer._process.kill()
        with pytest.raises(Unavailable, match="-9"):
            loader.load(good)
        loader.load(good)  # another process


def test_threads_do_not_share_scratch() -> None:
    scratch, rooms = Scratch(), []

    def take(into: Callable[[np.ndarray], None]) -> None:
        into(scratch.room(100))

    for _ in range(2):
        thread = threading.Thread(target=take, args=(rooms.append,))
        thread.start()
        thread.join()
    take(rooms.append)
    take(rooms.append)
    starts = [room.ctypes.data for room in rooms]
    assert starts[2] == starts[3] and len(set(starts[:3])) == 3
    assert len(scratch.room(1 << 29)) == 1 << 29 and len(scratch.room(100)) == 100
