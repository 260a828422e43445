"""Data that tenants sent, as files on disk that survive a restart. Plain.

    FOLDER/TENANT/file-ID/data.jsonl, about.json

A file appears whole or not at all, and nothing that a client says becomes a part of a path but for
the ending of a name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from jlorax.errors import InvalidParameter, NotFound, StorageFull
from jlorax.jobs.types import UploadedFile
from jlorax.training.records import SUFFIXES

ABANDONED_S = 24 * 3600.0  # after which a file that never became whole is swept
MAX_NAME_CHARS = 255
_NO_SUFFIX = ".jsonl"  # what a name without an ending is
_ID = re.compile(r"file-[0-9a-f]{32}")
_ABOUT = "about.json"
_ARRIVING = ".arriving-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class IncomingFile:
    """A file that is arriving, under a temporary name. Its methods block."""

    def __init__(self, filename: str, folder: Path, scratch: Path) -> None:
        self._filename = filename
        self._folder = folder
        self._scratch = scratch
        self._hash = hashlib.sha256(filename.encode() + b"\0")
        self._data = (scratch / f"data{suffix_of(filename)}").open("wb")
        self.num_bytes = 0

    def write(self, chunk: bytes) -> None:
        self._data.write(chunk)
        self._hash.update(chunk)
        self.num_bytes += len(chunk)

    def keep(self) -> UploadedFile:
        """Syncs it and gives it its name; the one that is there already, if it is the same."""
        if not self.num_bytes:
            raise InvalidParameter("file", "is empty: it has 0 bytes")
        file_id = f"file-{self._hash.hexdigest()[:32]}"
        about = UploadedFile(file_id, self._filename, self.num_bytes, int(time.time()))
        (self._scratch / _ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")
        self._data.flush()
        os.fsync(self._data.fileno())
        target = self._folder / file_id
        try:
            self._scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return _read(target)
        return about

    def close(self) -> None:
        with suppress(OSError):  # what a full disk did not take is told of by write and keep
            self._data.close()


class FileStore:
    """The owner of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def folder_of(self, tenant: str) -> Path:
        """All data of the tenant lies below it, and nobody else's. A tenant's name is checked where
        keys are read."""
        return self._folder / tenant

    @contextmanager
    def receiving(self, tenant: str, filename: str) -> Iterator[IncomingFile]:
        """What was not kept when the block ends is removed. StorageFull when there is no room,
        InvalidParameter when the name's ending is none that is read."""
        suffix_of(filename)
        folder = self.folder_of(tenant)
        with _telling_of_room():
            folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_ARRIVING, dir=folder))
            try:
                incoming = IncomingFile(filename, folder, scratch)
                try:
                    yield incoming
                finally:
                    incoming.close()
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def find(self, tenant: str, file_id: str) -> UploadedFile:
        return _read(self._existing(tenant, file_id))

    def path(self, tenant: str, file_id: str) -> Path:
        """Of its data."""
        folder = self._existing(tenant, file_id)
        return folder / f"data{suffix_of(_read(folder).filename)}"

    def files(self, tenant: str) -> list[UploadedFile]:
        """The newest first."""
        folders = self.folder_of(tenant).glob("file-*")
        found = [_read(folder) for folder in folders if _ID.fullmatch(folder.name)]
        return sorted(found, key=lambda file: (file.created_s, file.file_id), reverse=True)

    def delete(self, tenant: str, file_id: str) -> None:
        """Gone at once, though its removal may take a moment."""
        folder = self._existing(tenant, file_id)
        scratch = Path(tempfile.mkdtemp(prefix=_ARRIVING, dir=folder.parent))
        folder.rename(scratch / folder.name)
        shutil.rmtree(scratch, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what servers that were killed left half-written."""
        for scratch in self._folder.glob(f"*/{_ARRIVING}*"):
            with suppress(OSError):
                if time.time() - scratch.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(scratch, ignore_errors=True)

    def _existing(self, tenant: str, file_id: str) -> Path:
        folder = self.folder_of(tenant) / file_id
        if not _ID.fullmatch(file_id) or not folder.is_dir():
            raise NotFound("file", file_id)
        return folder


def suffix_of(filename: str) -> str:
    """The ending by which data is read; InvalidParameter for one that is not."""
    suffix = Path(filename).suffix.lower() or _NO_SUFFIX
    if suffix not in SUFFIXES:
        raise InvalidParameter(
            "file", f"has the name {filename[-64:]!r}; names end in {', '.join(SUFFIXES)}"
        )
    if len(filename) > MAX_NAME_CHARS or not filename.isprintable():
        raise InvalidParameter(
            "file", f"has a name of {len(filename)} characters; allowed are {MAX_NAME_CHARS}, "
            "all printable"
        )  # fmt: skip
    return suffix


def _read(folder: Path) -> UploadedFile:
    return UploadedFile(**json.loads((folder / _ABOUT).read_text(encoding="utf-8")))


@contextmanager
def _telling_of_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull("there is no room left on the server's disk for this file") from error
