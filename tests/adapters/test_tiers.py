"""Host and disk: bytes are counted, the oldest go, a crash or a damaged file costs a miss."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from jlorax.adapters.disk_tier import DiskTier
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import Loader
from jlorax.adapters.pack import from_bytes, pack, to_bytes
from jlorax.adapters.peft import read_adapter
from jlorax.adapters.registry import Registry
from jlorax.errors import ConfigError
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
    assert tier.get(v("b")) is None
    assert (tier.hits, tier.misses, tier.evictions) == (1, 1, 1)


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


def content(seed: int, size: int = 100) -> tuple[str, bytes]:
    data = bytes([seed]) * size
    return hashlib.sha256(data).hexdigest(), data


def disk(folder: Path, max_bytes: int = 1000) -> DiskTier:
    """Intact is what consists of one byte's repetition."""
    return DiskTier(folder, max_bytes, verify=lambda data: len(set(data)) == 1)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_disk_survives_a_restart(tmp_path: Path) -> None:
    one, two = content(1), content(2)
    tier = disk(tmp_path / "new" / "cache")
    assert tier.put(*one) and tier.put(*two) and tier.put(*two)
    assert tier.used_bytes == 200
    assert tier.remember("source", one[0]) and tier.remember("source", one[0])
    again = disk(tmp_path / "new" / "cache")
    assert again.used_bytes == 200 and len(again) == 2
    assert again.digest_of("source") == one[0] and again.get(one[0]) == one[1]
    assert again.digest_of("other") is None and again.get(content(3)[0]) is None
    assert (again.hits, again.misses) == (1, 1)


def test_disk_evicts_by_last_use_also_after_a_restart(tmp_path: Path) -> None:
    tier = disk(tmp_path, 300)
    digests = [content(i)[0] for i in range(4)]
    for i in range(3):
        tier.put(*content(i))
        os.utime(tmp_path / f"{digests[i]}.lora", ns=(i, i))
    assert tier.get(digests[0]) is not None
    tier = disk(tmp_path, 300)
    tier.put(*content(3))
    assert [d in tier for d in digests] == [True, False, True, True]
    assert tier.used_bytes == 300 and tier.evictions == 1
    assert len(disk(tmp_path, 100)) == 1  # a smaller quota at the next start


def test_disk_keeps_nothing_larger_than_itself(tmp_path: Path) -> None:
    tier = disk(tmp_path, 300)
    tier.put(*content(1))
    assert not tier.put(*content(2, 301))
    assert len(tier) == 1 and tier.failed_writes == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_file_is_dropped_and_a_miss(damage: str, tmp_path: Path) -> None:
    digest, data = content(1)
    tier = disk(tmp_path)
    tier.put(digest, data)
    tier.remember("source", digest)
    path = tmp_path / f"{digest}.lora"
    damaged = {"flip": b"x" + data[1:], "cut": data[:-1], "empty": b""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    assert tier.get(digest) is None
    assert (tier.corrupt, tier.misses, tier.used_bytes) == (1, 1, 0)
    assert digest not in tier and tier.digest_of("source") is None and not path.exists()
    assert tier.put(digest, data) and tier.get(digest) == data


def test_a_crash_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk(tmp_path)
    tier.put(*content(1))
    tier.remember("one", content(1)[0])

    class Killed(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(Killed):
            tier.put(*content(2))
        with pytest.raises(Killed):
            tier.remember("two", content(1)[0])
    assert len(files(tmp_path)) == 4  # two of them temporary
    (tmp_path / "theirs.tmp").write_text("not ours")
    (tmp_path / f"{content(5)[0]}.lora").symlink_to("/etc/passwd")
    tier = disk(tmp_path)
    assert files(tmp_path) == {f"{content(1)[0]}.lora", "index.json", "theirs.tmp"}
    assert tier.digest_of("one") == content(1)[0] and tier.digest_of("two") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sources": [1]}', '{"sources": {"a": []}}'])
def test_a_broken_index_is_an_empty_one(text: str, tmp_path: Path) -> None:
    disk(tmp_path).put(*content(1))
    (tmp_path / "index.json").write_text(text)
    tier = disk(tmp_path)
    assert tier.digest_of("a") is None and len(tier) == 1
    assert tier.remember("a", content(1)[0])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert not tier.put(*content(1)) and not tier.remember("a", content(1)[0])
    assert tier.failed_writes == 2 and tier.used_bytes == 0 and files(tmp_path) == set()
    assert tier.put(*content(1))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        disk(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match="-1"):
        disk(tmp_path, -1)
    with pytest.raises(ConfigError, match="/proc"):
        disk(Path("/proc"))


def test_a_digest_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no sha256"):
        disk(tmp_path).put("../../x", b"")


def test_a_packed_adapter_through_the_disk(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16")
    folder = helpers.write_good(tmp_path / "a")
    packed = pack(read_adapter(folder, "a", layout.projections, 8), layout)
    digest = "0" * 64
    DiskTier(tmp_path / "cache", 10**6).put(digest, to_bytes(packed, layout))
    tier = DiskTier(tmp_path / "cache", 10**6)
    data = tier.get(digest)
    assert data is not None
    again = np.asarray(from_bytes(data, layout).buffer)
    assert again.tobytes() == np.asarray(packed.buffer).tobytes()
    path = tmp_path / "cache" / f"{digest}.lora"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert tier.get(digest) is None and tier.corrupt == 1


def test_what_is_loaded_waits_where_the_device_reads_it(tmp_path: Path) -> None:
    """Whether it comes from its folder or from the disk tier."""
    layout = helpers.layout()
    registry = Registry(None, "base", layout.max_rank)
    version = registry.register("a", helpers.write_good(tmp_path / "a"))
    moved: list[np.ndarray] = []

    def to_host(buffer: np.ndarray) -> np.ndarray:
        moved.append(buffer.copy())
        return moved[-1]

    loader = Loader(layout, DiskTier(tmp_path / "cache", 10**6), to_host)
    for tier in (Tier.SOURCE, Tier.DISK):
        packed, found = loader.load(registry.record(version))
        assert found is tier and packed.buffer is moved[-1] and moved[-1].any()
    assert len(moved) == 2
