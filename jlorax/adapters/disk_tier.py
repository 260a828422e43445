"""Packed adapters on disk, named by digest, so that a restart neither parses nor transposes.

    <dir>/<digest>.lora    written under a temporary name, then renamed: whole or not there
    <dir>/index.jsonl      a line a load: which source's content has which digest
A file's mtime is the time of its last use. Files that are not ours are left alone.

These are the books: the cache actor's. Files are read and written by the loader, on its threads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from jlorax.errors import ConfigError

SUFFIX = ".lora"
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".jlorax-", ".tmp"
_SPARE_LINES = 1024  # that say nothing any more, before the index is written anew
INDEX_FILE = "index.jsonl"
MAX_INDEX_BYTES = 256 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DiskTier:
    """At most ``max_bytes`` of files, the least recently used go first.

    A full or failing disk is a counter, never an error of a request.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"disk_cache_bytes is {max_bytes}, must be at least 0")
        self.folder = folder
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.evictions = self.damaged = self.failed_writes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # digest -> bytes, oldest use first
        self._index: dict[str, str] = {}  # source -> digest of a file that is here
        self._sources: dict[str, set[str]] = {}  # digest -> whom the index sent to it
        self._num_lines = 0  # of the index's file
        self._prepare()
        self._clean()
        self._read_index()
        remove(self._make_room(0))

    def find(self, source: str) -> Path | None:
        """The file of this source's content, which counts as used now. None: not here."""
        digest = self._index.get(source)
        if digest is None:
            return None
        self._sizes.move_to_end(digest)
        path = self._path(digest)
        try:
            os.utime(path)
        except OSError:
            return path  # its reader will see; only the order after a restart suffers
        return path

    def size_bytes(self, source: str) -> int | None:
        """Of the file that ``find`` finds; this is no use."""
        digest = self._index.get(source)
        return None if digest is None else self._sizes[digest]

    def take(self, source: str, digest: str, path: Path, size_bytes: int) -> list[Path]:
        """Takes in a file that was written under a temporary name here.

        Returns files to be removed, by whoever does not mind waiting for a disk.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError(f"{digest!r} is no sha256")
        if size_bytes > self.max_bytes:
            return [path]
        try:
            gone = self._keep(digest, path, size_bytes)
            self._remember(source, digest)
        except OSError:
            self.failed_writes += 1
            return [path]
        return gone

    def drop(self, source: str) -> list[Path]:
        """Forgets a source's file, which turned out to be damaged; returns it."""
        digest = self._index.get(source)
        if digest is None:
            return []
        self.damaged += 1
        return [self._forget(digest)]

    def __contains__(self, digest: object) -> bool:
        return digest in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def _keep(self, digest: str, path: Path, size_bytes: int) -> list[Path]:
        if digest in self._sizes:  # another name's, with equal content
            self._sizes.move_to_end(digest)
            return [path]
        os.replace(path, self._path(digest))
        gone = self._make_room(size_bytes)
        self._sizes[digest] = size_bytes
        self.used_bytes += size_bytes
        return gone

    def _remember(self, source: str, digest: str) -> None:
        if self._index.get(source) == digest:
            return
        self._index[source] = digest
        self._sources.setdefault(digest, set()).add(source)
        path = self.folder / INDEX_FILE
        if self._num_lines > 2 * len(self._index) + _SPARE_LINES:
            self._rewrite_index(path)
            return
        with path.open("ab", buffering=0) as file:
            file.write(_line(source, digest))
        self._num_lines += 1

    def _forget(self, digest: str) -> Path:
        """The file, and every source that it was the file of."""
        self.used_bytes -= self._sizes.pop(digest)
        for source in self._sources.pop(digest, ()):
            if self._index.get(source) == digest:
                del self._index[source]
        return self._path(digest)

    def _make_room(self, size_bytes: int) -> list[Path]:
        gone = []
        while self._sizes and self.used_bytes + size_bytes > self.max_bytes:
            gone.append(self._forget(next(iter(self._sizes))))
            self.evictions += 1
        return gone

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = temporary_file(self.folder)
            os.close(descriptor)
            path.unlink()
        except OSError as error:
            raise ConfigError(f"disk_cache {self.folder} cannot be written: {error}") from error

    def _clean(self) -> None:
        """Drops what a crash left half-written, and takes stock of the rest."""
        found: list[tuple[int, str, int]] = []
        for path in self.folder.iterdir():
            name = path.name
            if name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX):
                remove([path])
            elif path.suffix == SUFFIX and _DIGEST.fullmatch(path.stem):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, path.stem, status.st_size))
                else:
                    remove([path])
        for _, digest, size_bytes in sorted(found):
            self._sizes[digest] = size_bytes
            self.used_bytes += size_bytes

    def _read_index(self) -> None:
        """An index that cannot be read costs one parse of each adapter, nothing else."""
        path = self.folder / INDEX_FILE
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_INDEX_BYTES else b""
        except OSError:
            return
        pairs = _pairs(data)
        self._index = {source: digest for source, digest in pairs if digest in self._sizes}
        for source, digest in self._index.items():
            self._sources.setdefault(digest, set()).add(source)
        self._num_lines = len(self._index)
        if b"".join(_line(*pair) for pair in self._index.items()) != data:
            self._rewrite_index(path)

    def _rewrite_index(self, path: Path) -> None:
        """Without the lines that later ones replaced, and those whose files are gone."""
        descriptor, temporary = temporary_file(self.folder)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(_line(*pair) for pair in self._index.items())
        os.replace(temporary, path)
        self._num_lines = len(self._index)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}{SUFFIX}"


def temporary_file(folder: Path) -> tuple[int, Path]:
    """(descriptor, path) of a new file that the next start clears away, should it stay."""
    descriptor, name = tempfile.mkstemp(TEMPORARY_SUFFIX, TEMPORARY_PREFIX, folder)
    return descriptor, Path(name)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            continue  # no right to: not ours


def _line(source: str, digest: str) -> bytes:
    return json.dumps({"source": source, "digest": digest}).encode() + b"\n"


def _pairs(data: bytes) -> Iterator[tuple[str, str]]:
    """(source, digest) of every whole line."""
    for line in data.splitlines():
        try:
            entry = json.loads(line)
            source, digest = entry["source"], entry["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(source, str) and isinstance(digest, str):
            yield source, digest
