"""Host RAM: opaque values by version; counts and evicts by bytes. Never looks inside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from jlorax.adapters.worth import Worth
from jlorax.errors import ConfigError
from jlorax.types import AdapterVersion

V = TypeVar("V")


def _nobody(version: AdapterVersion) -> bool:
    return False


@dataclass
class HostTier(Generic[V]):
    """At most ``max_bytes`` of values. A value larger than the whole tier is not kept.

    ``is_wanted``: somebody waits for it. Those go last, or loads for several would chase each other
    out before anyone was served.
    """

    max_bytes: int
    is_wanted: Callable[[AdapterVersion], bool] = _nobody
    used_bytes: int = field(default=0, init=False)
    evictions: int = field(default=0, init=False)
    # from the least to the most recently used
    _values: OrderedDict[AdapterVersion, tuple[V, int]] = field(
        default_factory=OrderedDict, init=False
    )
    _worth: Worth[AdapterVersion] = field(default_factory=Worth, init=False)

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise ConfigError(f"host_cache_bytes is {self.max_bytes}, must be at least 0")

    def get(self, version: AdapterVersion) -> V | None:
        """It counts as used now."""
        entry = self._values.get(version)
        if entry is None:
            return None
        self._values.move_to_end(version)
        self._worth.use(version)
        return entry[0]

    def put(
        self, version: AdapterVersion, value: V, size_bytes: int, reload_s: float = 1.0
    ) -> bool:
        """``reload_s``: what it took to load. False when it cannot be kept at all."""
        self.drop(version)
        if size_bytes > self.max_bytes:
            return False
        if self.used_bytes + size_bytes > self.max_bytes:
            self._make_room(size_bytes)
        self._values[version] = (value, size_bytes)
        self._worth.enter(version, reload_s, size_bytes)
        self.used_bytes += size_bytes
        return True

    def drop(self, version: AdapterVersion) -> bool:
        """Forgets it, which is no eviction. False when it was not here."""
        if version not in self._values:
            return False
        self._worth.leave(version)
        self._remove(version)
        return True

    def __contains__(self, version: object) -> bool:
        return version in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[AdapterVersion]:
        """From the least to the most recently used."""
        return iter(self._values)

    def _make_room(self, size_bytes: int) -> None:
        by_worth = self._worth.cheapest_first(self._values)
        for version in sorted(by_worth, key=self.is_wanted):
            if self.used_bytes + size_bytes <= self.max_bytes:
                return
            self._worth.evict(version)
            self._remove(version)
            self.evictions += 1

    def _remove(self, version: AdapterVersion) -> None:
        _, size_bytes = self._values.pop(version)
        self.used_bytes -= size_bytes
