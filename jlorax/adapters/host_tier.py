"""Host RAM: opaque values by version, the least recently used go first. Never looks inside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from jlorax.errors import ConfigError
from jlorax.types import AdapterVersion

V = TypeVar("V")


@dataclass
class HostTier(Generic[V]):
    """At most ``max_bytes`` of values. A value larger than the whole tier is not kept."""

    max_bytes: int
    used_bytes: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)
    evictions: int = field(default=0, init=False)
    _values: OrderedDict[AdapterVersion, tuple[V, int]] = field(
        default_factory=OrderedDict, init=False
    )

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise ConfigError(f"host_cache_bytes is {self.max_bytes}, must be at least 0")

    def get(self, version: AdapterVersion) -> V | None:
        if version not in self._values:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(version)
        return self._values[version][0]

    def put(self, version: AdapterVersion, value: V, size_bytes: int) -> bool:
        """False when it cannot be kept at all."""
        self.drop(version)
        if size_bytes > self.max_bytes:
            return False
        while self.used_bytes + size_bytes > self.max_bytes:
            _, (_, freed_bytes) = self._values.popitem(last=False)
            self.used_bytes -= freed_bytes
            self.evictions += 1
        self._values[version] = (value, size_bytes)
        self.used_bytes += size_bytes
        return True

    def drop(self, version: AdapterVersion) -> bool:
        """Forgets it, which is no eviction. False when it was not here."""
        entry = self._values.pop(version, None)
        if entry is None:
            return False
        self.used_bytes -= entry[1]
        return True

    def __contains__(self, version: object) -> bool:
        return version in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[AdapterVersion]:
        """From the least to the most recently used."""
        return iter(self._values)
