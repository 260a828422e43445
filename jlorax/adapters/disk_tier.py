"""Packed adapters on disk, named by digest, so that a restart neither parses nor transposes.

    <dir>/<digest>.lora     written under a temporary name, synced, renamed: whole or not there
    <dir>/index.json        source identity -> digest, also replaced whole
A file's mtime is the time of its last use. Files that are not ours are left alone.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from jlorax.adapters.pack import is_intact
from jlorax.errors import ConfigError

SUFFIX = ".lora"
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".jlorax-", ".tmp"
INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 64 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DiskTier:
    """At most ``max_bytes`` of files, the least recently used go first.

    A full or failing disk is a counter, never an error of a request: ``put`` says False.
    """

    def __init__(
        self, folder: Path, max_bytes: int, verify: Callable[[bytes], bool] = is_intact
    ) -> None:
        if max_bytes < 0:
            raise ConfigError(f"disk_cache_bytes is {max_bytes}, must be at least 0")
        self.folder = folder
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.hits = self.misses = self.evictions = self.corrupt = self.failed_writes = 0
        self._verify = verify
        self._sizes: OrderedDict[str, int] = OrderedDict()  # digest -> bytes, oldest use first
        self._index: dict[str, str] = {}
        self._prepare()
        self._clean()
        self._read_index()
        self._make_room(0)

    def put(self, digest: str, data: bytes) -> bool:
        """Keeps the bytes. False: larger than the tier, or the disk would not take them."""
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError(f"{digest!r} is no sha256")
        if len(data) > self.max_bytes:
            return False
        if digest in self._sizes:
            self._touch(digest)
            return True
        self._make_room(len(data))
        if not self._write(self._path(digest), data):
            return False
        self._sizes[digest] = len(data)
        self.used_bytes += len(data)
        return True

    def get(self, digest: str) -> bytes | None:
        """The bytes, their checksums verified; a damaged file is dropped and is a miss.

        Read, not mapped: a file cut short under a mapping would kill the process.
        """
        data = self._read(digest) if digest in self._sizes else None
        if data is None:
            self.misses += 1
            return None
        self.hits += 1
        self._touch(digest)
        return data

    def drop(self, digest: str) -> None:
        size_bytes = self._sizes.pop(digest, None)
        if size_bytes is not None:
            self.used_bytes -= size_bytes
            _remove(self._path(digest))

    def remember(self, source: str, digest: str) -> bool:
        """Notes that this source's content has this digest, for the next start too."""
        if self._index.get(source) == digest:
            return True
        # An entry whose file is gone is of no use; it goes with the next write.
        kept = {key: value for key, value in self._index.items() if value in self._sizes}
        self._index = {**kept, source: digest}
        data = json.dumps({"version": 1, "sources": self._index}).encode()
        return self._write(self.folder / INDEX_FILE, data)

    def digest_of(self, source: str) -> str | None:
        """The digest of a source whose file is here."""
        digest = self._index.get(source)
        return digest if digest in self._sizes else None

    def __contains__(self, digest: object) -> bool:
        return digest in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = self._temporary()
            os.close(descriptor)
            os.unlink(path)
        except OSError as error:
            raise ConfigError(f"disk_cache {self.folder} cannot be written: {error}") from error

    def _clean(self) -> None:
        """Drops what a crash left half-written, and takes stock of the rest."""
        found: list[tuple[int, str, int]] = []
        for path in self.folder.iterdir():
            name = path.name
            if name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX):
                _remove(path)
            elif path.suffix == SUFFIX and _DIGEST.fullmatch(path.stem):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, path.stem, status.st_size))
                else:
                    _remove(path)
        for _, digest, size_bytes in sorted(found):
            self._sizes[digest] = size_bytes
            self.used_bytes += size_bytes

    def _read_index(self) -> None:
        """An index that cannot be read costs one parse of each adapter, nothing else."""
        path = self.folder / INDEX_FILE
        try:
            if path.stat().st_size > MAX_INDEX_BYTES:
                return
            sources = json.loads(path.read_bytes())["sources"]
            self._index = {k: v for k, v in sources.items() if v in self._sizes}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._index = {}

    def _read(self, digest: str) -> bytes | None:
        try:
            data = self._path(digest).read_bytes()
        except OSError:
            data = b""
        if len(data) == self._sizes[digest] and self._verify(data):
            return data
        self.corrupt += 1
        self.drop(digest)
        return None

    def _write(self, path: Path, data: bytes) -> bool:
        temporary: str | None = None
        try:
            descriptor, temporary = self._temporary()
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except OSError:
            self.failed_writes += 1
            if temporary is not None:
                _remove(Path(temporary))
            return False
        return True

    def _make_room(self, size_bytes: int) -> None:
        while self._sizes and self.used_bytes + size_bytes > self.max_bytes:
            self.drop(next(iter(self._sizes)))
            self.evictions += 1

    def _touch(self, digest: str) -> None:
        self._sizes.move_to_end(digest)
        try:
            os.utime(self._path(digest))
        except OSError:
            return  # only the order after a restart suffers

    def _temporary(self) -> tuple[int, str]:
        return tempfile.mkstemp(TEMPORARY_SUFFIX, TEMPORARY_PREFIX, self.folder)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}{SUFFIX}"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a directory, or no right to: not ours


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its directory is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
