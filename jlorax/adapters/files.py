"""Reads an adapter's two files once, from the inode that was checked: nothing can hang or swap it.

A folder comes from a user's disk, so a "file" may be a fifo, a device or a link to somewhere else.
We open without blocking, look at what was opened (not at the name), and read that descriptor.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

from jlorax.errors import AdapterChanged, AdapterInvalid

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FILES = (CONFIG_FILE, WEIGHTS_FILE)
UNSAFE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

MAX_CONFIG_BYTES = 4 * 2**20


def _fresh(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one content of a file from the next without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """Both files of an adapter."""

    config: FileIdentity
    weights: FileIdentity

    @property
    def key(self) -> str:
        """A stable text for the disk tier's index."""
        parts = (self.config, self.weights)
        return "/".join(f"{f.device}:{f.inode}:{f.size_bytes}:{f.mtime_ns}" for f in parts)


def identify(folder: Path, adapter_id: str, root: Path | None = None) -> SourceIdentity:
    """The identity of the folder's two files now. Missing or odd files: AdapterInvalid."""
    config = _identify_file(folder, CONFIG_FILE, adapter_id, root)
    return SourceIdentity(config, _identify_file(folder, WEIGHTS_FILE, adapter_id, root))


def is_unchanged(folder: Path, identity: SourceIdentity) -> bool:
    """Whether the folder's names lead to the very files that ``identify`` found: a link may lead
    elsewhere by now, but not to these and be another content."""
    try:
        found = [FileIdentity.of(os.stat(f"{folder}/{name}")) for name in _FILES]
    except OSError:
        return False
    return found == [identity.config, identity.weights]


def read_file(
    folder: Path,
    name: str,
    adapter_id: str,
    max_bytes: int,
    root: Path | None = None,
    memory: Callable[[int], memoryview] = _fresh,
) -> tuple[memoryview, FileIdentity]:
    """The whole of one regular file that lies inside ``root`` (default: inside the folder).

    ``memory``: gives room for so many bytes; the answer is a part of it.
    """
    path = _resolve(folder, name, adapter_id, root)
    descriptor = _open(path, name, adapter_id)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        before = os.fstat(descriptor)
        if before.st_size > max_bytes:
            raise AdapterInvalid(
                adapter_id,
                name,
                f"it has {before.st_size} bytes, more than the {max_bytes} that an adapter of the "
                "allowed rank on this model can need",
            )
        room = memory(before.st_size + 1)
        num_bytes = _fill(file, room)
        if num_bytes != before.st_size or os.fstat(descriptor).st_mtime_ns != before.st_mtime_ns:
            raise AdapterChanged(adapter_id, name)
    return room[:num_bytes], FileIdentity.of(before)


def _fill(file: RawIOBase, room: memoryview) -> int:
    """Reads until the room is full or the file ends."""
    num_bytes = 0
    while num_bytes < len(room) and (more := file.readinto(room[num_bytes:])):
        num_bytes += more
    return num_bytes


def is_within(path: Path, root: Path) -> bool:
    return path == root or root in path.parents


def _identify_file(folder: Path, name: str, adapter_id: str, root: Path | None) -> FileIdentity:
    path = _resolve(folder, name, adapter_id, root)
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise AdapterInvalid(adapter_id, name, _not_regular(status.st_mode))
    return FileIdentity.of(status)


def _resolve(folder: Path, name: str, adapter_id: str, root: Path | None) -> Path:
    if not folder.is_dir():
        raise AdapterInvalid(adapter_id, name, "the adapter's folder is missing")
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # missing, or a circle of links
        raise AdapterInvalid(adapter_id, name, _why_missing(folder, name)) from error
    if not any(is_within(path, allowed) for allowed in _allowed_roots(folder, root)):
        raise AdapterInvalid(adapter_id, name, "is a link that leads outside the adapter's folder")
    return path


def _allowed_roots(folder: Path, root: Path | None) -> list[Path]:
    """Where a link may lead. The hub's cache links snapshots/<revision>/x to blobs/<hash>."""
    if root is not None:
        return [root.resolve()]
    real = folder.resolve()
    blobs = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
    return [real, *blobs]


def _why_missing(folder: Path, name: str) -> str:
    if name == WEIGHTS_FILE:
        for unsafe in UNSAFE_FILES:
            if (folder / unsafe).exists():
                return (
                    f"is missing; {unsafe} is an unsafe format (pickle), only safetensors is read"
                )
    return "is missing"


def _open(path: Path, name: str, adapter_id: str) -> int:
    # O_NONBLOCK: opening a fifo without a writer would wait forever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise AdapterInvalid(adapter_id, name, f"cannot be read: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise AdapterInvalid(adapter_id, name, _not_regular(mode))
    return descriptor


def _not_regular(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a fifo",
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return f"is {kinds.get(stat.S_IFMT(mode), 'something else')}, not a regular file"
