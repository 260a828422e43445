"""Shapes that host and device agree on: the LoRA bank's pages.

A *page* is 8 rank columns of one projection in its whole layer stack: ``[L, 8, width]``. Pages of
equal (L, width) share a pool, whichever projection they belong to. A projection of rank r takes
ceil(r / 8) pages for A (``A`` as PEFT stores it: ``[r, d_in]``) and as many for B (transposed:
``[r, d_out]``); a half-filled last page ends in zero rows. Page 0 of every pool stays zero: table
entries that name nothing name it. So memory and work follow an adapter's true rank and targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jlorax.types import Projection

RANK_PAGE = 8
ZERO_PAGE = 0

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def rank_pages(rank: int) -> int:
    """Pages that a matrix of this rank fills."""
    return -(-rank // RANK_PAGE)


@dataclass(frozen=True, order=True)
class PoolKey:
    """Which pool a page lives in."""

    num_layers: int
    width: int


@dataclass(frozen=True)
class BankLayout:
    """The bank of one base model: its projections, element type ("float32", "bfloat16"), limits."""

    projections: tuple[Projection, ...]
    dtype: str
    max_rank: int

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Projection name -> its row in the page tables."""
        return {p.name: i for i, p in enumerate(self.projections)}

    @cached_property
    def pools(self) -> tuple[PoolKey, ...]:
        keys = {self.pool_a(p) for p in self.projections} | {
            self.pool_b(p) for p in self.projections
        }
        return tuple(sorted(keys))

    @property
    def table_width(self) -> int:
        return rank_pages(self.max_rank)

    @property
    def max_layers(self) -> int:
        return max(p.num_layers for p in self.projections)

    def pool_a(self, projection: Projection) -> PoolKey:
        return PoolKey(projection.num_layers, projection.d_in)

    def pool_b(self, projection: Projection) -> PoolKey:
        return PoolKey(projection.num_layers, projection.d_out)

    def page_bytes(self, pool: PoolKey) -> int:
        return pool.num_layers * RANK_PAGE * pool.width * ITEM_BYTES[self.dtype]

    def pages_needed(self, ranks: Mapping[str, int]) -> dict[PoolKey, int]:
        """Pages per pool for an adapter with these true ranks (projection name -> rank)."""
        need: dict[PoolKey, int] = {}
        for name, rank in ranks.items():
            projection = self.projections[self.index[name]]
            for pool in (self.pool_a(projection), self.pool_b(projection)):
                need[pool] = need.get(pool, 0) + rank_pages(rank)
        return need
