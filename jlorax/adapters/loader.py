"""One adapter from wherever it is to packed pages: disk tier, else the source, checked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, LifoQueue

import numpy as np

from jlorax.adapters.disk_tier import temporary_file
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.packed_file import (
    PackCorrupt,
    digest_of,
    layout_fingerprint,
    read_packed,
    write_packed,
)
from jlorax.adapters.packing import AnyPacker, Packer
from jlorax.adapters.registry import AdapterRecord
from jlorax.adapters.sources import Sources
from jlorax.layout import BankLayout, HostMemory, PlainMemory
from jlorax.types import Tier


class LoadCancelled(Exception):
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class Load:
    """``kept_is_damaged``: its file in the disk tier was, so that it came from its source."""

    packed: PackedAdapter
    tier: Tier
    kept_is_damaged: bool = False


@dataclass(frozen=True)
class Spooled:
    """A packed file under a temporary name, for the disk tier to take in."""

    source: str
    digest: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Loader:
    """Used by several threads at once; it has no books, and keeps packers that are idle."""

    layout: BankLayout
    sources: Sources = field(default_factory=lambda: Sources({}))
    memory: HostMemory = field(default_factory=PlainMemory)
    new_packer: Callable[[BankLayout], AnyPacker] = Packer
    _idle: LifoQueue[AnyPacker] = field(default_factory=LifoQueue, repr=False)

    def key(self, record: AdapterRecord) -> str:
        """Names the record's content, packed for this layout, in the disk tier's index."""
        return f"{record.origin.key}@{layout_fingerprint(self.layout)}"

    def load(
        self,
        record: AdapterRecord,
        kept: Path | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Load:
        """``kept``: its file in the disk tier, if that has it. Raises AdapterInvalid and what else
        the source raises; LoadCancelled once ``is_wanted`` says so."""
        _check_wanted(is_wanted)
        packed = None if kept is None else self._read_kept(kept)
        if packed is not None:
            return Load(packed, Tier.DISK)
        adapter_id = record.version.adapter_id
        with (
            self.sources.files(record.origin, adapter_id, self.layout) as files,
            self._packer() as packer,
        ):
            _check_wanted(is_wanted)
            built = packer.pack(files, adapter_id)
            _check_wanted(is_wanted)
            packed = replace(built, buffer=self.memory.copy(np.asarray(built.buffer)))
        return Load(packed, Tier.SOURCE, kept is not None)

    def spool(self, record: AdapterRecord, packed: PackedAdapter, folder: Path) -> Spooled:
        """Writes the packed file, under a temporary name. Raises OSError.

        Not synced: a file that a power cut tore fails its checksums, which is a miss.
        """
        packed = replace(packed, buffer=np.asarray(packed.buffer))
        digest = digest_of(packed, self.layout)
        descriptor, path = temporary_file(folder)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                size_bytes = write_packed(file, packed, self.layout)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Spooled(self.key(record), digest, path, size_bytes)

    def prepare(self) -> None:
        """A packer more, so that a load need not wait for one to begin."""
        self._idle.put(self.new_packer(self.layout))

    def close(self) -> None:
        """Ends the packers that no load uses."""
        while True:
            try:
                self._idle.get_nowait().close()
            except Empty:
                return

    def _read_kept(self, path: Path) -> PackedAdapter | None:
        """None: it is damaged, or gone."""
        try:
            with path.open("rb", buffering=0) as file:
                packed = read_packed(file, self.layout, self.memory.blank)
        except (OSError, PackCorrupt):
            return None
        return replace(packed, buffer=self.memory.keep(np.asarray(packed.buffer)))

    @contextmanager
    def _packer(self) -> Iterator[AnyPacker]:
        try:
            packer = self._idle.get_nowait()
        except Empty:
            packer = self.new_packer(self.layout)
        try:
            yield packer
        finally:
            if packer.is_alive:
                self._idle.put(packer)
            else:
                packer.close()


def _check_wanted(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise LoadCancelled
