"""One adapter from wherever it is to packed pages: disk tier, else the source, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jlorax.adapters.disk_tier import DiskTier
from jlorax.adapters.pack import PackCorrupt, PackedAdapter, from_bytes, pack, to_bytes
from jlorax.adapters.registry import AdapterRecord
from jlorax.adapters.sources import load_local, source_key
from jlorax.layout import BankLayout, HostBuffer
from jlorax.types import Tier


def _as_it_is(buffer: np.ndarray) -> HostBuffer:
    return buffer


@dataclass(frozen=True)
class Loader:
    """Used by one thread at a time: the disk tier's books have a single writer.

    ``to_host``: moves a finished buffer to the memory that the device likes to read.
    """

    layout: BankLayout
    disk: DiskTier | None
    to_host: Callable[[np.ndarray], HostBuffer] = _as_it_is

    def load(self, record: AdapterRecord) -> tuple[PackedAdapter, Tier]:
        """The packed adapter and where it was found. Raises AdapterInvalid."""
        packed, tier = self._load(record)
        return replace(packed, buffer=self.to_host(np.asarray(packed.buffer))), tier

    def _load(self, record: AdapterRecord) -> tuple[PackedAdapter, Tier]:
        key = source_key(record, self.layout)
        kept = self._from_disk(key)
        if kept is not None:
            return kept, Tier.DISK
        digest, adapter = load_local(record, self.layout)
        packed = pack(adapter, self.layout)
        if self.disk is not None and self.disk.put(digest, to_bytes(packed, self.layout)):
            self.disk.remember(key, digest)
        return packed, Tier.SOURCE

    def has(self, record: AdapterRecord) -> bool:
        """Whether the disk tier keeps it."""
        key = source_key(record, self.layout)
        return self.disk is not None and self.disk.digest_of(key) is not None

    def _from_disk(self, key: str) -> PackedAdapter | None:
        digest = self.disk.digest_of(key) if self.disk is not None else None
        data = self.disk.get(digest) if self.disk is not None and digest is not None else None
        if data is None:
            return None
        try:
            return from_bytes(data, self.layout)
        except PackCorrupt:
            return None
