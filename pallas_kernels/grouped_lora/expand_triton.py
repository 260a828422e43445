"""Expand: y[t] += (scale * sum_s h[s, t]) @ B, in place."""

from __future__ import annotations

from collections.abc import Callable
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
    Rows,
    Scalars,
    as_row,
    both,
    by_count,
    fetch,
    is_one_of,
    launch,
    load,
    locate,
    pick,
    rows_of_block,
    spread,
)
from pallas_kernels.triton_parts import cdiv, let_the_next_kernel_start, precision


@partial(jax.jit, static_argnums=0)
def expand(
    cut: Cut,
    y: jax.Array,
    inner: jax.Array,
    pools: list[jax.Array],
    scale: jax.Array,
    *common: jax.Array,
) -> jax.Array:
    num_blocks = common[2].shape[0]
    return launch(
        _expand_kernel,
        "lora_expand",
        cut,
        cut.tuning.expand,
        (sum(cut.column_tiles), num_blocks),
        [y, inner, scale, *common, *pools],
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        aliases={0: 0},
    )


class _Span(NamedTuple):
    """A program's columns: where they begin in B and in y; where B ends, if that may be inside."""

    in_b: jax.Array
    in_y: jax.Array
    end: int | None


class _Columns(NamedTuple):
    """Some of one output's columns: in B, in y, and which of them are columns."""

    in_b: jax.Array
    in_y: jax.Array
    inside: jax.Array | None


class _Inner(NamedTuple):
    """The rank of one output and one block: where its columns of h and its pages of B are."""

    h_ref: Any
    tables_ref: Any
    pool_ref: Any
    layer: jax.Array
    b: jax.Array
    row: jax.Array  # of the tables
    column: jax.Array  # of h
    pages: Scalars  # of the first tile
    num_pages: jax.Array
    scale: jax.Array


def _expand_kernel(
    cut: Cut,
    _: Any,  # y, which is also the output
    h_ref: Any,
    scale_ref: Any,
    tables_ref: Any,
    num_pages_ref: Any,
    first_ref: Any,
    count_ref: Any,
    layer_ref: Any,
    *refs: Any,
) -> None:
    """Program (columns, block): adds the block's h @ B to a tile of one output's columns."""
    *pool_refs, y_ref = refs
    tile, b = pl.program_id(0), pl.program_id(1)
    if cut.early and not cut.interpret:
        b = let_the_next_kernel_start(b)
    output, tile_in_output = locate(tile, list(accumulate(cut.column_tiles)))
    row = pick(output, cut.site_rows)
    first, count, layer = fetch(first_ref, b), fetch(count_ref, b), fetch(layer_ref, b * 0)
    num_pages = fetch(num_pages_ref, b, row)
    pages = _pages_of_b(cut, tables_ref, b, row, 0, cut.tuning.expand.block_r)
    scale = fetch(scale_ref, b, row, layer)
    column = output * (cut.table_width * PAGE)
    for i, pool_ref in enumerate(pool_refs):
        mine = is_one_of(output, [o for o, pool in enumerate(cut.pool_of) if pool == i])
        inner = _Inner(h_ref, tables_ref, pool_ref, layer, b, row, column, pages, num_pages, scale)

        @pl.when((count > 0) & (num_pages > 0) & mine)
        def add(inner: _Inner = inner) -> None:
            span = _span(cut, output, tile_in_output, inner.pool_ref.shape[-1])
            by_count(
                cut,
                count,
                one=lambda: _expand_row(cut, y_ref, first, inner, span),
                many=lambda: _expand_rows(cut, y_ref, first, count, inner, span),
            )


def _pages_of_b(
    cut: Cut, tables_ref: Any, b: jax.Array, row: jax.Array, tile: jax.Array | int, block_r: int
) -> Scalars:
    per_tile = block_r // PAGE
    inside = (jnp.minimum(tile * per_tile + i, cut.table_width - 1) for i in range(per_tile))
    return [fetch(tables_ref, b, row, 1, j) for j in inside]


def _span(cut: Cut, output: jax.Array, tile: jax.Array, width: int) -> _Span:
    block_n = cut.tuning.expand.block_n
    in_b = tile * block_n
    in_y = pick(output, [0, *accumulate(cut.widths[:-1])]) + in_b
    return _Span(in_b, in_y, None if width % block_n == 0 else width)


def _columns(span: _Span, size: int, part: jax.Array | int = 0) -> _Columns:
    """The ``part``-th ``size`` columns of a span."""
    offsets = part * size + jnp.arange(size)
    in_b = span.in_b + offsets
    return _Columns(in_b, span.in_y + offsets, None if span.end is None else in_b < span.end)


def _expand_row(cut: Cut, y_ref: Any, row: jax.Array, inner: _Inner, span: _Span) -> None:
    """A block of one row, by multiply-and-sum."""
    columns = _columns(span, cut.tuning.expand.block_n)
    where = row, columns.in_y
    y = load(y_ref, where, columns.inside)

    def product(ranks: Ranks) -> jax.Array:
        b = _read_b(inner, ranks, columns)
        h = _row_of_h(cut, inner, row, ranks)
        return jnp.sum(h.astype(jnp.float32)[:, None] * b.astype(jnp.float32), axis=0)

    total = _sum_over_ranks(cut, inner, y.astype(jnp.float32), product)
    pltriton.store(y_ref.at[where], total.astype(y.dtype), mask=columns.inside)


def _expand_rows(
    cut: Cut, y_ref: Any, first: jax.Array, count: jax.Array, inner: _Inner, span: _Span
) -> None:
    """A block of several rows, by parts of the columns: the sums of one take few registers, which
    leaves them to loads."""
    rows = rows_of_block(cut, first, count)
    few = partial(_expand_few_ranks, cut, y_ref, rows, inner, span)
    many = partial(_expand_many_ranks, cut, y_ref, rows, inner, span)
    if not cut.loops_over_ranks:
        return few()
    fits = inner.num_pages * PAGE <= cut.tuning.expand.block_r
    pl.when(fits)(few)
    pl.when(~fits)(many)
    return None


def _expand_few_ranks(cut: Cut, y_ref: Any, rows: Rows, inner: _Inner, span: _Span) -> None:
    """Rank of one tile: every part's B is asked for before the first is needed."""
    ranks = _ranks_of_output(inner, inner.pages, 0)
    parts = [_columns(span, cut.part_n, part) for part in range(cut.column_parts)]
    b_parts = [_read_b(inner, ranks, columns) for columns in parts]
    h = _rows_of_h(cut, inner, rows, ranks)
    for columns, b in zip(parts, b_parts, strict=True):
        y = _read_y(y_ref, rows, columns)
        total = pltriton.dot(h, b, precision=precision(b)) + y.astype(jnp.float32)
        _write_y(y_ref, rows, columns, total)


def _expand_many_ranks(cut: Cut, y_ref: Any, rows: Rows, inner: _Inner, span: _Span) -> None:
    """Part by part: what one part's sums need of B is much by itself."""
    wide_r = cut.tuning.expand.wide_r
    turns = cdiv(inner.num_pages * PAGE, wide_r)

    def add(part: jax.Array, _: None) -> None:
        columns = _columns(span, cut.part_n, part)

        def visit(turn: jax.Array, total: jax.Array) -> jax.Array:
            pages = _pages_of_b(cut, inner.tables_ref, inner.b, inner.row, turn, wide_r)
            ranks = _ranks_of_output(inner, pages, turn)
            b = _read_b(inner, ranks, columns)
            h = _rows_of_h(cut, inner, rows, ranks)
            return total + pltriton.dot(h, b, precision=precision(b))

        y = _read_y(y_ref, rows, columns).astype(jnp.float32)
        _write_y(y_ref, rows, columns, lax.fori_loop(0, turns, visit, y))

    lax.fori_loop(0, cut.column_parts, add, None)


def _read_y(y_ref: Any, rows: Rows, columns: _Columns) -> jax.Array:
    mask = both(rows.own, as_row(columns.inside))
    return load(y_ref, (rows.ids, columns.in_y[None, :]), mask)


def _write_y(y_ref: Any, rows: Rows, columns: _Columns, total: jax.Array) -> None:
    mask = jnp.broadcast_to(both(rows.own, as_row(columns.inside)), total.shape)
    where = y_ref.at[rows.ids, columns.in_y[None, :]]
    pltriton.store(where, total.astype(y_ref.dtype), mask=mask)


def _ranks_of_output(inner: _Inner, pages: Scalars, turn: jax.Array | int) -> Ranks:
    """The ``turn``-th tile of the output's rank, as wide as its pages."""
    lane = jnp.arange(len(pages) * PAGE)
    r = turn * lane.size + lane
    live = r < inner.num_pages * PAGE
    return Ranks(spread(pages, lane), lane & (PAGE - 1), inner.column + r, live)


def _row_of_h(cut: Cut, inner: _Inner, row: jax.Array, ranks: Ranks) -> jax.Array:
    """[block_r] in the pool's dtype: scale * sum of the splits."""
    splits = jnp.arange(pl.next_power_of_2(cut.tuning.shrink.splits))
    mask = (splits < cut.tuning.shrink.splits)[:, None] & ranks.live[None, :]
    parts = load(inner.h_ref, (splits[:, None], row, ranks.column[None, :]), mask)
    return (jnp.sum(parts, axis=0) * inner.scale).astype(inner.pool_ref.dtype)


def _rows_of_h(cut: Cut, inner: _Inner, rows: Rows, ranks: Ranks) -> jax.Array:
    """[block_rows, block_r], likewise."""
    mask = rows.own & ranks.live[None, :]
    total = jnp.zeros(mask.shape, jnp.float32)
    for split in range(cut.tuning.shrink.splits):
        total += load(inner.h_ref, (split, rows.ids, ranks.column[None, :]), mask)
    return (total * inner.scale).astype(inner.pool_ref.dtype)


def _read_b(inner: _Inner, ranks: Ranks, columns: _Columns) -> jax.Array:
    """[block_r, block_n] of B."""
    where = ranks.page[:, None], inner.layer, ranks.in_page[:, None], columns.in_b[None, :]
    return load(inner.pool_ref, where, both(ranks.live[:, None], as_row(columns.inside)))


def _sum_over_ranks(
    cut: Cut, inner: _Inner, start: jax.Array, product: Callable[[Ranks], jax.Array]
) -> jax.Array:
    """f32: ``start`` and the sum of ``product`` over the block's tiles of rank, mostly one.

    Pages are read one turn ahead and carried: an address that depended on a load of its own turn
    would put two latencies into every turn.
    """
    block_r = cut.tuning.expand.block_r

    def visit(turn: jax.Array | int, carry: tuple[Scalars, jax.Array]) -> tuple[Scalars, jax.Array]:
        pages, total = carry
        following = _pages_of_b(cut, inner.tables_ref, inner.b, inner.row, turn + 1, block_r)
        return following, total + product(_ranks_of_output(inner, pages, turn))

    if not cut.loops_over_ranks:
        return start + product(_ranks_of_output(inner, inner.pages, 0))
    first = visit(0, (inner.pages, start))
    return lax.fori_loop(1, cdiv(inner.num_pages * PAGE, block_r), visit, first)[1]
