"""Shrink: h[s, t] = x[t, D_s] @ A[:, D_s]^T, partial sums over each split D_s of D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.grouped_lora.triton_parts import (
    PAGE,
    Cut,
    Ranks,
    Scalars,
    as_row,
    both,
    by_count,
    fetch,
    launch,
    load,
    locate,
    pick,
    rows_of_block,
    spread,
)
from pallas_kernels.triton_parts import cdiv, let_the_next_kernel_start, precision


# jitted by themselves, and the layer an operand: the layers of a model are then one kernel, traced,
# lowered and compiled once.
@partial(jax.jit, static_argnums=0)
def shrink(cut: Cut, x: jax.Array, pool: jax.Array, *common: jax.Array) -> jax.Array:
    """h: f32[splits, T, inner], written where a block has pages."""
    t = cut.tuning.shrink
    num_blocks = common[2].shape[0]
    out = jax.ShapeDtypeStruct((t.splits, x.shape[0], cut.inner), jnp.float32)
    grid = t.splits, t.lanes, num_blocks
    return launch(_shrink_kernel, "lora_shrink", cut, t, grid, [x, pool, *common], out)


class _Refs(NamedTuple):
    """What shrink's bodies read and write."""

    x: Any
    pool: Any
    layer: jax.Array
    tables: Any
    h: Any


def _shrink_kernel(
    cut: Cut,
    x_ref: Any,
    pool_ref: Any,
    tables_ref: Any,
    num_pages_ref: Any,
    first_ref: Any,
    count_ref: Any,
    layer_ref: Any,
    h_ref: Any,
) -> None:
    """Program (split, lane, block): every ``lanes``-th tile of the block's rank, over the split."""
    split, lane, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if not cut.interpret:  # expand, a kernel of ours, is h's only reader
        b = let_the_next_kernel_start(b)
    t = cut.tuning.shrink
    first, count, layer = fetch(first_ref, b), fetch(count_ref, b), fetch(layer_ref, b * 0)
    refs = _Refs(x_ref, pool_ref, layer, tables_ref, h_ref)
    ends = list(accumulate(fetch(num_pages_ref, b, row) for row in cut.site_rows))
    tiles = cdiv(ends[-1] * PAGE, t.block_r)

    def visit(turn: jax.Array | int, carry: tuple[Scalars, Scalars]) -> tuple[Scalars, Scalars]:
        tile = lane + turn * t.lanes
        ranks = _site_ranks(cut, tile, ends[-1], *carry)
        by_count(
            cut,
            count,
            one=lambda: _shrink_row(cut, refs, split, first, ranks),
            many=lambda: _shrink_rows(cut, refs, split, first, count, ranks),
        )
        return _find_pages(cut, refs, b, tile + t.lanes, ends)

    found = _find_pages(cut, refs, b, lane, ends)
    turns = jnp.where(count > 0, cdiv(jnp.maximum(tiles - lane, 0), t.lanes), 0)
    lax.fori_loop(0, turns, visit, found)


def _find_pages(
    cut: Cut, refs: _Refs, b: jax.Array, tile: jax.Array, ends: Sequence[jax.Array]
) -> tuple[Scalars, Scalars]:
    """The pages in a tile of the block's rank, and where each one's columns of h begin.

    Scalars: a vector of lookups would go through shared memory to where the loads of A want it.
    """
    per_tile = cut.tuning.shrink.block_r // PAGE
    pages, columns = [], []
    for i in range(per_tile):
        output, j = locate(tile * per_tile + i, ends)
        inside = jnp.minimum(j, cut.table_width - 1)  # the last tile may end past the table
        pages.append(fetch(refs.tables, b, pick(output, cut.site_rows), 0, inside))
        columns.append((output * cut.table_width + j) * PAGE)
    return pages, columns


def _site_ranks(
    cut: Cut, tile: jax.Array, num_pages: jax.Array, pages: Scalars, columns: Scalars
) -> Ranks:
    lane = jnp.arange(cut.tuning.shrink.block_r)
    in_page = lane & (PAGE - 1)
    live = tile * cut.tuning.shrink.block_r + lane < num_pages * PAGE
    return Ranks(spread(pages, lane), in_page, spread(columns, lane) + in_page, live)


def _shrink_row(cut: Cut, refs: _Refs, split: jax.Array, row: jax.Array, ranks: Ranks) -> None:
    """A block of one row, by multiply-and-sum: no shared memory, no padding to 16 rows."""

    def product(ks: jax.Array, inside: jax.Array | None) -> jax.Array:
        x = load(refs.x, (row, ks), inside)
        a = _read_a(refs, ranks, ks, inside)
        return jnp.sum(x.astype(jnp.float32)[None, :] * a.astype(jnp.float32), axis=1)

    total = _sum_over_split(cut, split, ranks.live.shape, cut.row_k, product)
    pltriton.store(refs.h.at[split, row, ranks.column], total, mask=ranks.live)


def _shrink_rows(
    cut: Cut, refs: _Refs, split: jax.Array, first: jax.Array, count: jax.Array, ranks: Ranks
) -> None:
    rows = rows_of_block(cut, first, count)

    def product(ks: jax.Array, inside: jax.Array | None) -> jax.Array:
        x = load(refs.x, (rows.ids, ks[None, :]), both(rows.own, as_row(inside)))
        a = _read_a(refs, ranks, ks, inside)
        return pltriton.dot(x, a, trans_b=True, precision=precision(a))

    shape, block_k = (cut.block_rows, *ranks.live.shape), cut.tuning.shrink.block_k
    total = _sum_over_split(cut, split, shape, block_k, product)
    where = refs.h.at[split, rows.ids, ranks.column[None, :]]
    pltriton.store(where, total, mask=rows.own & ranks.live[None, :])


def _read_a(refs: _Refs, ranks: Ranks, ks: jax.Array, inside: jax.Array | None) -> jax.Array:
    """[block_r, block_k] of A."""
    where = ranks.page[:, None], refs.layer, ranks.in_page[:, None], ks[None, :]
    return load(refs.pool, where, both(ranks.live[:, None], as_row(inside)))


def _sum_over_split(
    cut: Cut,
    split: jax.Array,
    shape: tuple[int, ...],
    at_once: int,
    product: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """f32[shape]: the sum of ``product`` over the split's turns, of ``at_once`` of D each."""
    begin = split * cut.split_k
    end = begin + cut.split_k
    is_whole = cut.d_in % (cut.tuning.shrink.splits * cut.split_k) == 0 == cut.split_k % at_once

    def turn(i: jax.Array | int, total: jax.Array) -> jax.Array:
        ks = begin + i * at_once + jnp.arange(at_once)
        inside = None if is_whole else ks < jnp.minimum(end, cut.d_in)
        return total + product(ks, inside)

    turns, start = pl.cdiv(cut.split_k, at_once), jnp.zeros(shape, jnp.float32)
    return turn(0, start) if turns == 1 else lax.fori_loop(0, turns, turn, start)
