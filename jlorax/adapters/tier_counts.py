"""Where requests found their adapters: hits and misses by tier."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jlorax.types import Tier


@dataclass
class TierCounts:
    """A request asks the tiers from the fastest on: the first that has its adapter counts a hit,
    each before it a miss."""

    hits: Counter[Tier] = field(default_factory=Counter)
    misses: Counter[Tier] = field(default_factory=Counter)

    def found(self, tier: Tier) -> None:
        for faster in Tier:
            if faster is tier:
                break
            self.misses[faster] += 1
        self.hits[tier] += 1
