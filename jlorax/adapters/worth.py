"""Who is worth keeping: GreedyDual-Size-Frequency.

    value = clock + uses x seconds to have it again / bytes        at every use
The clock is the value of the last one that was evicted: who is not used falls behind it, however
often it was used once. (Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass
class _Entry:
    value: float
    uses: int
    cost: float  # seconds a byte


class Worth(Generic[K]):
    def __init__(self) -> None:
        self._entries: dict[K, _Entry] = {}
        self._clock = 0.0

    def enter(self, key: K, reload_s: float, size_bytes: int) -> None:
        """A new one; this is its first use."""
        self._entries[key] = _Entry(self._clock, 0, reload_s / max(1, size_bytes))
        self.use(key)

    def use(self, key: K) -> None:
        entry = self._entries[key]
        entry.uses += 1
        entry.value = self._clock + entry.uses * entry.cost

    def leave(self, key: K) -> None:
        """It was dropped on purpose: that says nothing of the others."""
        del self._entries[key]

    def evict(self, key: K) -> None:
        """It made room for another."""
        self._clock = max(self._clock, self._entries.pop(key).value)

    def cheapest_first(self, keys: Iterable[K]) -> list[K]:
        """Equal ones stay in their order."""
        return sorted(keys, key=lambda key: self._entries[key].value)
