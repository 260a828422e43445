"""Whose turn it is: virtual token counters, of tenants and inside each of its adapters.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2: serve whoever
has the least counter, charge what it was served, and lift who comes back from idleness to the least
of the active, so that nobody saves up a claim.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from jlorax.types import AdapterVersion

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2  # a token of an answer costs about twice one of a prompt

K = TypeVar("K", bound=Hashable)


class VirtualTokens(Generic[K]):
    """A counter for each key, in tokens served, divided by the key's weight (1 by default).

    A key is active while it has sequences. An idle one's counter is forgotten once the least of
    the active has reached it: lifting makes no difference to it then.
    """

    def __init__(self, weights: Mapping[K, float] | None = None) -> None:
        self._weights = weights or {}
        self._counters: dict[K, float] = {}  # of the active
        self._num_sequences: dict[K, int] = {}
        self._idle: dict[K, float] = {}
        self._idle_by_counter: list[tuple[float, int, K]] = []
        self._num_left = count()

    def __getitem__(self, key: K) -> float:
        return self._counters[key]

    def __len__(self) -> int:
        """Counters that are kept."""
        return len(self._counters) + len(self._idle)

    @property
    def is_idle(self) -> bool:
        return not self._counters

    def weight(self, key: K) -> float:
        return self._weights.get(key, 1.0)

    def enter(self, key: K) -> None:
        """One more sequence."""
        if key not in self._counters:
            least = min(self._counters.values(), default=0.0)
            self._counters[key] = max(least, self._idle.pop(key, 0.0))
            self._num_sequences[key] = 0
        self._num_sequences[key] += 1

    def leave(self, key: K) -> None:
        """One sequence less."""
        self._num_sequences[key] -= 1
        if not self._num_sequences[key]:
            del self._num_sequences[key]
            self._idle[key] = self._counters.pop(key)
            heappush(self._idle_by_counter, (self._idle[key], next(self._num_left), key))
            self._forget()

    def charge(self, key: K, tokens: float) -> None:
        self._counters[key] += tokens / self._weights.get(key, 1.0)

    def below(self, counter: float) -> set[K]:
        """Active keys that have less."""
        return {key for key, own in self._counters.items() if own < counter}

    def _forget(self) -> None:
        if self.is_idle:
            self._idle.clear()
            self._idle_by_counter.clear()
            return
        least = min(self._counters.values())
        while self._idle_by_counter and self._idle_by_counter[0][0] <= least:
            counter, _, key = heappop(self._idle_by_counter)
            if self._idle.get(key) == counter:
                del self._idle[key]

    def check(self, num_sequences: Mapping[K, int]) -> None:
        """Asserts that exactly those with sequences are active, and who is idle is owed nothing."""
        assert self._num_sequences == num_sequences, (self._num_sequences, num_sequences)
        assert self._counters.keys() == self._num_sequences.keys()
        assert not self._idle.keys() & self._counters.keys()
        assert self._counters or not self._idle


class FairShares:
    """Tenants by their weights, then the adapters of a tenant, all alike; None: the base model."""

    def __init__(self, tenant_weights: Mapping[str, float] | None = None) -> None:
        self.tenants: VirtualTokens[str] = VirtualTokens(tenant_weights)
        self._adapters: dict[str, VirtualTokens[AdapterVersion | None]] = {}

    def adapters(self, tenant: str) -> VirtualTokens[AdapterVersion | None]:
        """Of an active tenant."""
        return self._adapters[tenant]

    def enter(self, tenant: str, version: AdapterVersion | None) -> None:
        self.tenants.enter(tenant)
        self._adapters.setdefault(tenant, VirtualTokens()).enter(version)

    def leave(self, tenant: str, version: AdapterVersion | None) -> None:
        self.tenants.leave(tenant)
        adapters = self._adapters[tenant]
        adapters.leave(version)
        if adapters.is_idle:
            del self._adapters[tenant]

    def charge(self, tenant: str, version: AdapterVersion | None, tokens: float) -> None:
        self.tenants.charge(tenant, tokens)
        self._adapters[tenant].charge(version, tokens)

    def check(self, num_sequences: Mapping[tuple[str, AdapterVersion | None], int]) -> None:
        """``num_sequences`` of each (tenant, adapter), waiting or running."""
        of_tenants: dict[str, int] = {}
        of_adapters: dict[str, dict[AdapterVersion | None, int]] = {}
        for (tenant, version), number in num_sequences.items():
            of_tenants[tenant] = of_tenants.get(tenant, 0) + number
            of_adapters.setdefault(tenant, {})[version] = number
        self.tenants.check(of_tenants)
        assert self._adapters.keys() == of_adapters.keys()
        for tenant, adapters in self._adapters.items():
            adapters.check(of_adapters[tenant])
