"""From a packed adapter and its place in the bank to what the device must write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.slots import Assignment
from jlorax.layout import (
    BankLayout,
    PoolKey,
    SlotWrite,
    WriteLayout,
    pages_field,
)


def slot_write(packed: PackedAdapter, assignment: Assignment, layout: BankLayout) -> SlotWrite:
    """Names each projection's pages in the tables; entries past its rank name the zero page."""
    vector, views = WriteLayout(layout, len(packed.buffer)).blank(assignment.slot)
    views["scaling"][:] = packed.scaling
    for name, entry in packed.entries.items():
        i, projection = layout.index[name], layout.projections[layout.index[name]]
        starts = (entry.a_start, entry.b_start)
        for side, pool in enumerate((layout.pool_a(projection), layout.pool_b(projection))):
            own = assignment.pages[pool][starts[side] : starts[side] + entry.num_pages]
            views["table"][i, side, : entry.num_pages] = own
        views["num_pages"][i] = entry.num_pages
    first = 0
    for i, pool in enumerate(layout.pools):
        pages = assignment.pages.get(pool, ())
        views["first"][i], views["count"][i] = first, len(pages)
        views[pages_field(pool)][: len(pages)] = pages
        first += len(pages) * layout.page_units(pool)
    return SlotWrite(assignment.slot, packed.buffer, vector)


def share_bank(
    layout: BankLayout, bank_bytes: int, known_ranks: Sequence[Mapping[str, int]]
) -> dict[PoolKey, int]:
    """Pages per pool, the zero page included, for a bank of about ``bank_bytes``.

    Pools are sized by what adapters ask of them: those known at the start, else all projections
    at one rank. In eighths of the bank: executables are compiled for pools of a size, and one more
    adapter seldom is a reason to compile anew. Every pool holds what the largest adapter needs of
    it, so that one that comes later is never shut out for good.
    """
    demand = dict.fromkeys(layout.pools, 0)
    for ranks in known_ranks or [{p.name: layout.max_rank for p in layout.projections}]:
        for pool, count in layout.pages_needed(ranks).items():
            demand[pool] += count * layout.page_bytes(pool)
    shares = _eighths(demand)
    return {
        pool: 1
        + max(
            layout.most_pages[pool], bank_bytes * shares[pool] // (_PARTS * layout.page_bytes(pool))
        )
        for pool in layout.pools
    }


_PARTS = 8


def _eighths(demand: Mapping[PoolKey, int]) -> dict[PoolKey, int]:
    """Proportional, eight in all: rounded down, then the largest remainders get what is left."""
    total = sum(demand.values())
    shares = {pool: _PARTS * wanted // total for pool, wanted in demand.items()}
    left = _PARTS - sum(shares.values())
    by_remainder = sorted(demand, key=lambda pool: _PARTS * demand[pool] % total, reverse=True)
    for pool in by_remainder[:left]:
        shares[pool] += 1
    return shares
