"""One adapter from wherever it is to packed pages: disk tier, else the source, checked once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from jlorax.adapters.disk_tier import temporary_file
from jlorax.adapters.pack import PackedAdapter, pack
from jlorax.adapters.packed_file import (
    PackCorrupt,
    digest_of,
    layout_fingerprint,
    read_packed,
    write_packed,
)
from jlorax.adapters.registry import AdapterRecord
from jlorax.adapters.sources import Sources
from jlorax.layout import BankLayout, HostMemory, PlainMemory, Scratch
from jlorax.types import Tier


class LoadCancelled(Exception):
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class Load:
    """``packed``: to be kept. ``built``: the same, in memory that only this thread may read, and
    only until its next load."""

    packed: PackedAdapter
    built: PackedAdapter
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
    """Used by several threads at once; it has no books."""

    layout: BankLayout
    sources: Sources = field(default_factory=lambda: Sources({}))
    memory: HostMemory = field(default_factory=PlainMemory)
    _scratch: Scratch = field(default_factory=Scratch, repr=False)

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
        built = None if kept is None else self._read_kept(kept)
        tier = Tier.DISK
        if built is None:
            built, tier = self._read_source(record, is_wanted), Tier.SOURCE
        packed = replace(built, buffer=self.memory.keep(np.asarray(built.buffer)))
        return Load(packed, built, tier, kept is not None and tier is Tier.SOURCE)

    def spool(self, record: AdapterRecord, built: PackedAdapter, folder: Path) -> Spooled:
        """Writes the packed file, under a temporary name. Raises OSError.

        Not synced: a file that a power cut tore fails its checksums, which is a miss.
        """
        digest = digest_of(built, self.layout)
        descriptor, path = temporary_file(folder)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                size_bytes = write_packed(file, built, self.layout)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Spooled(self.key(record), digest, path, size_bytes)

    def _read_kept(self, path: Path) -> PackedAdapter | None:
        """None: it is damaged, or gone."""
        try:
            with path.open("rb", buffering=0) as file:
                return read_packed(file, self.layout, self.memory.blank)
        except (OSError, PackCorrupt):
            return None

    def _read_source(self, record: AdapterRecord, is_wanted: Callable[[], bool]) -> PackedAdapter:
        adapter = self.sources.read(
            record.origin, record.version.adapter_id, self.layout, self._room
        )
        _check_wanted(is_wanted)
        return pack(adapter, self.layout, self.memory.blank)

    def _room(self, num_bytes: int) -> memoryview:
        return memoryview(self._scratch.room(num_bytes).data)


def _check_wanted(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise LoadCancelled
