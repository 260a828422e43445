"""One file from a remote to the disk: resumed when it breaks off, verified, or not there at all."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from jlorax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from jlorax.adapters.remote.http import Deadline, Http, TryAgain, content_length
from jlorax.adapters.remote.settings import FetchLimits
from jlorax.adapters.remote.source import Described
from jlorax.errors import SourceUnavailable

# Opens the file's bytes from an offset on; the answer may begin at 0 all the same.
OpenAt = Callable[[int], AbstractContextManager[Any]]
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@contextmanager
def both_or_none(folder: Path, remote: str, config: bytes) -> Iterator[Path]:
    """Writes the config and gives the weights' path; removes both files after an error."""
    paths = (folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    try:
        with _disk(remote, len(config)):
            paths[0].write_bytes(config)
        yield paths[1]
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def download(
    http: Http,
    described: Described,
    path: Path,
    open_at: OpenAt,
    limits: FetchLimits,
    deadline: Deadline,
) -> None:
    """The described weights into a new file. Raises SourceUnavailable, and what open_at raises."""
    with _disk(http.remote, described.weights_bytes):
        file = path.open("xb", buffering=0)
    with file:
        transfer = _Transfer(http.remote, described, file, limits)
        http.retry(deadline, lambda: transfer.attempt(open_at))
    transfer.verify()


class _Transfer:
    """What has arrived of one file, over all tries."""

    def __init__(self, remote: str, described: Described, file: Any, limits: FetchLimits) -> None:
        self._remote = remote
        self._described = described
        self._size = described.weights_bytes
        self._file = file
        self._limits = limits
        self._restart()

    def attempt(self, open_at: OpenAt) -> None:
        """Takes what is missing. Raises TryAgain when not all of it comes."""
        with open_at(self._received) as response:
            self._begin(response)
            pace = _Pace(self._limits)
            for chunk in response.iter_raw():
                self._take(chunk)
                pace.count(len(chunk))
        if self._received < self._size:
            raise TryAgain(f"broke off after {self._received} of {self._size} bytes")

    def verify(self) -> None:
        said = self._described.weights_digest
        if self._hash is not None and said != f"{self._hash_name}:{self._hash.hexdigest()}":
            reason = f"sent weights of another {self._hash_name} digest than it said"
            raise SourceUnavailable(self._remote, reason)

    def _begin(self, response: Any) -> None:
        """Goes on where the answer begins, or anew."""
        if response.status_code == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or [int(n) for n in found.groups()] != [self._received, self._size]:
                raise self._lie(f"but answered another range than {self._received}-")
            return
        self._restart()
        length = content_length(response)
        if length not in (None, self._size):
            raise self._lie(f"but then {length}")

    def _restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._received = 0
        self._hash_name, self._hash = _hash_for(self._described)

    def _take(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self._size:
            raise self._lie("but sent more")
        if self._hash is not None:
            self._hash.update(chunk)
        view = memoryview(chunk)
        with _disk(self._remote, self._size):
            while view:
                view = view[self._file.write(view) :]

    def _lie(self, what: str) -> SourceUnavailable:
        return SourceUnavailable(self._remote, f"said the weights have {self._size} bytes, {what}")


class _Pace:
    """Raises TryAgain when too little came over the last window."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._begin()

    def count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        elapsed_s = time.monotonic() - self._start
        if elapsed_s < self._limits.slow_window_s:
            return
        if self._num_bytes < self._limits.slowest_bytes_per_s * elapsed_s:
            raise TryAgain(f"sent {self._num_bytes} bytes in {elapsed_s:.1f} s, which is too slow")
        self._begin()

    def _begin(self) -> None:
        self._start = time.monotonic()
        self._num_bytes = 0


def _hash_for(described: Described) -> tuple[str, Any]:
    """(name, running hash) of the kind that the source knows, or None for the hash."""
    name = (described.weights_digest or "").partition(":")[0]
    return name, hashlib.new(name, usedforsecurity=False) if name else None


@contextmanager
def _disk(remote: str, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"sends {num_bytes} bytes that cannot be written: {error.strerror}"
        raise SourceUnavailable(remote, reason) from error
