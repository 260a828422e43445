"""Folders that appear whole or not at all, and are made by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jlorax.errors import ConfigError
from jlorax.types import Progress, no_progress


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary sibling of ``out_dir``, synced and renamed to it when the block ends well.

    Where two writers race the first one's folder stays, and the second's is thrown away after a
    check that both hold the same files.
    """
    with _writing(out_dir.parent):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.tmp-", dir=out_dir.parent))
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp gives 0700
            _sync_tree(temporary)
            _rename(temporary, out_dir)
            _sync(out_dir.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_one(out_dir: Path, progress: Progress = no_progress) -> Iterator[None]:
    """Holds the lock of ``out_dir`` between processes; what crashed writers left is swept."""
    with _writing(out_dir.parent):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(out_dir.parent / f".{out_dir.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _wait_for(lock, out_dir, progress)
            for leftover in out_dir.parent.glob(f".{out_dir.name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            os.close(lock)  # this releases it; the file stays, for removing it would race


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """No permission, a full disk, a file in the way: the operator's to mend."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be written: {error}") from error


def _wait_for(lock: int, out_dir: Path, progress: Progress) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"waiting for another process that prepares {out_dir.name}", 0.0)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _rename(temporary: Path, out_dir: Path) -> None:
    try:
        temporary.rename(out_dir)
    except OSError as error:
        if not out_dir.is_dir():
            raise
        if _sizes(temporary) != _sizes(out_dir):
            raise ConfigError(f"{out_dir} exists already and holds something else") from error


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def _sync_tree(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
