"""All of an engine's adapter tiers together, as their owner, the cache actor, holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jlorax.adapters.disk_tier import DiskTier
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import Loader
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.registry import Registry
from jlorax.adapters.remote_names import RemoteNames
from jlorax.adapters.slots import SlotTable
from jlorax.adapters.tier_counts import TierCounts
from jlorax.types import Tier, TierStats


@dataclass
class AdapterTiers:
    registry: Registry
    remote_names: RemoteNames[Any]
    loader: Loader
    disk: DiskTier | None
    host: HostTier[PackedAdapter]
    slots: SlotTable
    pinned: tuple[str, ...] = ()  # names that are brought into the bank at the start, to stay
    counts: TierCounts = field(default_factory=TierCounts)

    def stats(self) -> tuple[TierStats, ...]:
        slots, host, disk = self.slots, self.host, self.disk
        used, total = self._bank_bytes()
        stats = [
            self._stats(Tier.DEVICE, len(slots.versions), used, total, slots.evictions),
            self._stats(Tier.HOST, len(host), host.used_bytes, host.max_bytes, host.evictions),
        ]
        if disk is not None:
            stats.append(
                self._stats(Tier.DISK, len(disk), disk.used_bytes, disk.max_bytes, disk.evictions)
            )
        return (*stats, self._stats(Tier.SOURCE, self.registry.num_known, 0, None, 0))

    def _stats(
        self, tier: Tier, num_adapters: int, used: int, most: int | None, evictions: int
    ) -> TierStats:
        counts = self.counts
        return TierStats(
            tier, num_adapters, used, most, counts.hits[tier], counts.misses[tier], evictions
        )

    def _bank_bytes(self) -> tuple[int, int]:
        """(used, in all), of the pages that adapters may have."""
        layout, free = self.loader.layout, self.slots.free_pages()
        total = {pool: count - 1 for pool, count in self.slots.pool_pages.items()}
        size = {pool: layout.page_bytes(pool) for pool in total}
        used = sum((total[pool] - free[pool]) * size[pool] for pool in total)
        return used, sum(total[pool] * size[pool] for pool in total)
