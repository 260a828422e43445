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
    rank_pages,
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
    at one rank. Every pool holds at least one page, so that no target is shut out for good.
    """
    demand = dict.fromkeys(layout.pools, 0)
    everything = {p.name: layout.max_rank for p in layout.projections}
    for ranks in known_ranks or [everything]:
        for pool, count in layout.pages_needed(ranks).items():
            demand[pool] += count
    floor = {pool: rank_pages(layout.max_rank) if demand[pool] == 0 else 1 for pool in demand}
    unit = sum(layout.page_bytes(pool) * count for pool, count in demand.items())
    turns = bank_bytes / unit
    return {pool: 1 + max(floor[pool], int(count * turns)) for pool, count in demand.items()}
