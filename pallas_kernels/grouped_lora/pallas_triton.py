"""Grouped LoRA on a GPU: shrink and expand, in Pallas' Triton dialect.

A decode step reads every distinct adapter once and computes next to nothing with it; a prefill
reads x and writes y, and adapters come from the L2 cache. Both are streams from memory.

    shrink   h[s, t] = x[t, D_s] @ A[:, D_s]^T     partial sums, f32, over each split D_s of D
             program (split, lane, block): the pages of rank that the block's adapter has in the
             whole site, laid end to end and cut into tiles:   | q0 q1 | k0 v0 | v1 -- |

    expand   y[t] += (scale * sum_s h[s, t]) @ B   program (columns, block): one output's columns

Shrink needs x alone, so that it runs beside the base model's matrix product; only expand is on the
way of a step. How much a program reads is decided by its adapter's true rank and targets, in the
kernel. The cut in two is S-LoRA's and Punica's (Sheng et al., 2023, arXiv:2311.03285; Chen et al.,
2023, arXiv:2310.18547), who launch it for every projection and pad the rank.

A page that an adapter does not have, a row beyond a block and a column beyond a matrix are masked,
never read: what a stranger left there cannot enter a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.grouped_lora.operands import BLOCK_ROWS, RowBlocks, SitePages
from pallas_kernels.grouped_lora.tuning import (
    ExpandTuning,
    ShrinkTuning,
    Tuning,
    TuningKey,
    choose,
)
from pallas_kernels.triton_parts import cdiv, let_the_next_kernel_start, precision, whole

_PAGE = 8  # rank columns of a page


def grouped_lora(
    y: jax.Array,
    x: jax.Array,
    site: SitePages,
    blocks: RowBlocks,
    layer: int,
    *,
    block_rows: int = BLOCK_ROWS,
    early: bool = False,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """y[t, N_i] += scale_i[b] * (x[t] @ A_i[b]^T) @ B_i[b], in place, for the rows t of block b.

    y: [T, sum of N_i]   the site's outputs side by side, bf16 or f32
    x: [T, D]            the pools' dtype, bf16 or f32
    site, blocks         see ``operands``; no block has more than ``block_rows`` rows (16 or a
                         larger power of two), no two blocks share a row
    early                as ``let_the_next_kernel_start``; its condition is the caller's to keep

    Sums in f32, h rounded to x's dtype between the two products; f32 products in IEEE precision.
    """
    widths = tuple(pool.shape[-1] for pool in site.b_pools)
    table_width = site.tables.shape[-1]
    (num_tokens, d_in), max_rank = x.shape, table_width * _PAGE
    if tuning is None:
        kind, itemsize = jax.devices()[0].device_kind, x.dtype.itemsize
        key = TuningKey(kind, itemsize, num_tokens, block_rows, d_in, max_rank, widths)
        tuning = choose(key)
    pools, pool_of = _distinct(site.b_pools)
    cut = _Cut(block_rows, d_in, widths, pool_of, site.rows, table_width, tuning, early, interpret)
    layer_operand = jnp.asarray(np.array([layer], np.int32))
    common = site.tables, site.num_pages, blocks.first, blocks.count, layer_operand
    inner = _shrink(cut, x, site.a_pool, *common)
    return _expand(cut, y, inner, pools, site.scale, *common)


@dataclass(frozen=True)
class _Cut:
    """What is fixed at compile time."""

    block_rows: int
    d_in: int
    widths: tuple[int, ...]  # of the site's outputs
    pool_of: tuple[int, ...]  # which of the distinct pools of B each output has
    site_rows: tuple[int, ...]
    table_width: int
    tuning: Tuning
    early: bool
    interpret: bool

    @property
    def inner(self) -> int:
        """Columns of h: every output has room for every page, most of it never touched."""
        return len(self.widths) * self.table_width * _PAGE

    @property
    def k_turns(self) -> int:
        """Times that a program of shrink reads ``block_k`` of D."""
        shrink = self.tuning.shrink
        return pl.cdiv(self.d_in, shrink.block_k * shrink.splits)

    @property
    def loops_over_ranks(self) -> bool:
        """Whether an adapter may have more rank than expand takes at once."""
        return self.table_width * _PAGE > self.tuning.expand.block_r

    @property
    def column_tiles(self) -> tuple[int, ...]:
        """Programs of expand for each output, per block."""
        return tuple(pl.cdiv(n, self.tuning.expand.block_n) for n in self.widths)


# jitted by themselves, and the layer an operand: the layers of a model are then one kernel, traced,
# lowered and compiled once.
@partial(jax.jit, static_argnums=0)
def _shrink(cut: _Cut, x: jax.Array, pool: jax.Array, *common: jax.Array) -> jax.Array:
    """h: f32[splits, T, inner], written where a block has pages."""
    t = cut.tuning.shrink
    num_blocks = common[2].shape[0]
    out = jax.ShapeDtypeStruct((t.splits, x.shape[0], cut.inner), jnp.float32)
    grid = t.splits, t.lanes, num_blocks
    return _launch(_shrink_kernel, "lora_shrink", cut, t, grid, [x, pool, *common], out)


@partial(jax.jit, static_argnums=0)
def _expand(
    cut: _Cut,
    y: jax.Array,
    inner: jax.Array,
    pools: list[jax.Array],
    scale: jax.Array,
    *common: jax.Array,
) -> jax.Array:
    num_blocks = common[2].shape[0]
    return _launch(
        _expand_kernel,
        "lora_expand",
        cut,
        cut.tuning.expand,
        (sum(cut.column_tiles), num_blocks),
        [y, inner, scale, *common, *pools],
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        aliases={0: 0},
    )


def _launch(
    kernel: Callable[..., None],
    name: str,
    cut: _Cut,
    tuning: ShrinkTuning | ExpandTuning,
    grid: tuple[int, ...],
    operands: list[jax.Array],
    out: jax.ShapeDtypeStruct,
    aliases: dict[int, int] | None = None,
) -> jax.Array:
    """Every operand whole: a pointer, which programs index by themselves."""
    return pl.pallas_call(
        partial(kernel, cut),
        grid=grid,
        in_specs=[whole(operand.shape) for operand in operands],
        out_specs=whole(out.shape),
        out_shape=out,
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(
            num_warps=tuning.num_warps, num_stages=tuning.num_stages
        ),
        interpret=cut.interpret,
        name=name,
    )(*operands)


class _Refs(NamedTuple):
    """What shrink's bodies read and write."""

    x: Any
    pool: Any
    layer: jax.Array
    tables: Any
    h: Any


class _Ranks(NamedTuple):
    """A tile of rank columns: each one's page and row in it, its column of h, whether it is one."""

    page: jax.Array
    in_page: jax.Array
    column: jax.Array
    live: jax.Array


_Scalars = list[jax.Array]


def _shrink_kernel(
    cut: _Cut,
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
    first, count, layer = _fetch(first_ref, b), _fetch(count_ref, b), _fetch(layer_ref, b * 0)
    refs = _Refs(x_ref, pool_ref, layer, tables_ref, h_ref)
    ends = list(accumulate(_fetch(num_pages_ref, b, row) for row in cut.site_rows))
    tiles = cdiv(ends[-1] * _PAGE, t.block_r)

    def visit(turn: jax.Array | int, carry: tuple[_Scalars, _Scalars]) -> tuple[_Scalars, _Scalars]:
        tile = lane + turn * t.lanes
        ranks = _site_ranks(cut, tile, ends[-1], *carry)
        _by_count(
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
    cut: _Cut, refs: _Refs, b: jax.Array, tile: jax.Array, ends: Sequence[jax.Array]
) -> tuple[_Scalars, _Scalars]:
    """The pages in a tile of the block's rank, and where each one's columns of h begin.

    Scalars: a vector of lookups would go through shared memory to where the loads of A want it.
    """
    per_tile = cut.tuning.shrink.block_r // _PAGE
    pages, columns = [], []
    for i in range(per_tile):
        output, j = _locate(tile * per_tile + i, ends)
        inside = jnp.minimum(j, cut.table_width - 1)  # the last tile may end past the table
        pages.append(_fetch(refs.tables, b, _pick(output, cut.site_rows), 0, inside))
        columns.append((output * cut.table_width + j) * _PAGE)
    return pages, columns


def _site_ranks(
    cut: _Cut, tile: jax.Array, num_pages: jax.Array, pages: _Scalars, columns: _Scalars
) -> _Ranks:
    lane = jnp.arange(cut.tuning.shrink.block_r)
    in_page = lane & (_PAGE - 1)
    live = tile * cut.tuning.shrink.block_r + lane < num_pages * _PAGE
    return _Ranks(_spread(pages, lane), in_page, _spread(columns, lane) + in_page, live)


def _locate(page: jax.Array, ends: Sequence[jax.Array | int]) -> tuple[jax.Array, jax.Array]:
    """Which output the site's page belongs to, and which of its pages it is."""
    output, j = jnp.int32(0), page
    for i, end in enumerate(ends[:-1], 1):
        beyond = page >= end
        output = lax.select(beyond, jnp.int32(i), output)
        j = lax.select(beyond, page - end, j)
    return output, j


def _shrink_row(cut: _Cut, refs: _Refs, split: jax.Array, row: jax.Array, ranks: _Ranks) -> None:
    """A block of one row, by multiply-and-sum: no shared memory, no padding to 16 rows."""

    def product(ks: jax.Array, inside: jax.Array | None) -> jax.Array:
        x = _load(refs.x, (row, ks), inside)
        a = _read_a(refs, ranks, ks, inside)
        return jnp.sum(x.astype(jnp.float32)[None, :] * a.astype(jnp.float32), axis=1)

    total = _sum_over_split(cut, split, ranks.live.shape, product)
    pltriton.store(refs.h.at[split, row, ranks.column], total, mask=ranks.live)


def _shrink_rows(
    cut: _Cut, refs: _Refs, split: jax.Array, first: jax.Array, count: jax.Array, ranks: _Ranks
) -> None:
    rows, own = _block_rows(cut, first, count)

    def product(ks: jax.Array, inside: jax.Array | None) -> jax.Array:
        x = _load(refs.x, (rows, ks[None, :]), _both(own, _as_row(inside)))
        a = _read_a(refs, ranks, ks, inside)
        return pltriton.dot(x, a, trans_b=True, precision=precision(a))

    total = _sum_over_split(cut, split, (cut.block_rows, *ranks.live.shape), product)
    where = refs.h.at[split, rows, ranks.column[None, :]]
    pltriton.store(where, total, mask=own & ranks.live[None, :])


def _read_a(refs: _Refs, ranks: _Ranks, ks: jax.Array, inside: jax.Array | None) -> jax.Array:
    """[block_r, block_k] of A."""
    where = ranks.page[:, None], refs.layer, ranks.in_page[:, None], ks[None, :]
    return _load(refs.pool, where, _both(ranks.live[:, None], _as_row(inside)))


def _sum_over_split(
    cut: _Cut,
    split: jax.Array,
    shape: tuple[int, ...],
    product: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """f32[shape]: the sum of ``product`` over the split's turns through D."""
    block_k = cut.tuning.shrink.block_k
    begin = split * (cut.k_turns * block_k)
    whole = cut.d_in % (cut.tuning.shrink.splits * cut.k_turns * block_k) == 0

    def turn(i: jax.Array | int, total: jax.Array) -> jax.Array:
        ks = begin + i * block_k + jnp.arange(block_k)
        return total + product(ks, None if whole else ks < cut.d_in)

    start = jnp.zeros(shape, jnp.float32)
    return turn(0, start) if cut.k_turns == 1 else lax.fori_loop(0, cut.k_turns, turn, start)


class _Columns(NamedTuple):
    """A tile of one output's columns: in B, in y, and which of them are columns."""

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
    pages: _Scalars  # of the first tile
    num_pages: jax.Array
    scale: jax.Array


def _expand_kernel(
    cut: _Cut,
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
    output, tile_in_output = _locate(tile, list(accumulate(cut.column_tiles)))
    row = _pick(output, cut.site_rows)
    first, count, layer = _fetch(first_ref, b), _fetch(count_ref, b), _fetch(layer_ref, b * 0)
    num_pages, pages = _fetch(num_pages_ref, b, row), _pages_of_b(cut, tables_ref, b, row, 0)
    scale = _fetch(scale_ref, b, row, layer)
    column = output * (cut.table_width * _PAGE)
    for i, pool_ref in enumerate(pool_refs):
        mine = _is_one_of(output, [o for o, pool in enumerate(cut.pool_of) if pool == i])
        inner = _Inner(h_ref, tables_ref, pool_ref, layer, b, row, column, pages, num_pages, scale)

        @pl.when((count > 0) & (num_pages > 0) & mine)
        def add(inner: _Inner = inner) -> None:
            columns = _columns(cut, output, tile_in_output, inner.pool_ref.shape[-1])
            _by_count(
                cut,
                count,
                one=lambda: _expand_row(cut, y_ref, first, inner, columns),
                many=lambda: _expand_rows(cut, y_ref, first, count, inner, columns),
            )


def _pages_of_b(
    cut: _Cut, tables_ref: Any, b: jax.Array, row: jax.Array, tile: jax.Array | int
) -> _Scalars:
    per_tile = cut.tuning.expand.block_r // _PAGE
    inside = (jnp.minimum(tile * per_tile + i, cut.table_width - 1) for i in range(per_tile))
    return [_fetch(tables_ref, b, row, 1, j) for j in inside]


def _columns(cut: _Cut, output: jax.Array, tile: jax.Array, width: int) -> _Columns:
    block_n = cut.tuning.expand.block_n
    in_b = tile * block_n + jnp.arange(block_n)
    starts = [0, *accumulate(cut.widths[:-1])]
    inside = None if width % block_n == 0 else in_b < width
    return _Columns(in_b, _pick(output, starts) + in_b, inside)


def _expand_row(cut: _Cut, y_ref: Any, row: jax.Array, inner: _Inner, columns: _Columns) -> None:
    """A block of one row, by multiply-and-sum."""
    y = _load(y_ref, (row, columns.in_y), columns.inside)

    def product(ranks: _Ranks) -> jax.Array:
        b = _read_b(inner, ranks, columns)
        h = _row_of_h(cut, inner, row, ranks)
        return jnp.sum(h.astype(jnp.float32)[:, None] * b.astype(jnp.float32), axis=0)

    total = _sum_over_ranks(cut, inner, columns.in_b.shape, product) + y.astype(jnp.float32)
    where = y_ref.at[row, columns.in_y]
    pltriton.store(where, total.astype(y.dtype), mask=columns.inside)


def _expand_rows(
    cut: _Cut, y_ref: Any, first: jax.Array, count: jax.Array, inner: _Inner, columns: _Columns
) -> None:
    """y is asked for first, unless that would hold its registers through a loop."""
    rows, own = _block_rows(cut, first, count)
    mask = _both(own, _as_row(columns.inside))
    where = rows, columns.in_y[None, :]
    early = None if cut.loops_over_ranks else _load(y_ref, where, mask)

    def product(ranks: _Ranks) -> jax.Array:
        b = _read_b(inner, ranks, columns)
        h = _rows_of_h(cut, inner, rows, own, ranks)
        return pltriton.dot(h, b, precision=precision(b))

    shape = cut.block_rows, cut.tuning.expand.block_n
    total = _sum_over_ranks(cut, inner, shape, product)
    y = _load(y_ref, where, mask) if early is None else early
    total += y.astype(jnp.float32)
    pltriton.store(y_ref.at[where], total.astype(y.dtype), mask=jnp.broadcast_to(mask, shape))


def _row_of_h(cut: _Cut, inner: _Inner, row: jax.Array, ranks: _Ranks) -> jax.Array:
    """[block_r] in the pool's dtype: scale * sum of the splits."""
    splits = jnp.arange(pl.next_power_of_2(cut.tuning.shrink.splits))
    mask = (splits < cut.tuning.shrink.splits)[:, None] & ranks.live[None, :]
    parts = _load(inner.h_ref, (splits[:, None], row, ranks.column[None, :]), mask)
    return (jnp.sum(parts, axis=0) * inner.scale).astype(inner.pool_ref.dtype)


def _rows_of_h(
    cut: _Cut, inner: _Inner, rows: jax.Array, own: jax.Array, ranks: _Ranks
) -> jax.Array:
    """[block_rows, block_r], likewise."""
    mask = own & ranks.live[None, :]
    total = jnp.zeros(mask.shape, jnp.float32)
    for split in range(cut.tuning.shrink.splits):
        total += _load(inner.h_ref, (split, rows, ranks.column[None, :]), mask)
    return (total * inner.scale).astype(inner.pool_ref.dtype)


def _read_b(inner: _Inner, ranks: _Ranks, columns: _Columns) -> jax.Array:
    """[block_r, block_n] of B."""
    where = ranks.page[:, None], inner.layer, ranks.in_page[:, None], columns.in_b[None, :]
    return _load(inner.pool_ref, where, _both(ranks.live[:, None], _as_row(columns.inside)))


def _sum_over_ranks(
    cut: _Cut, inner: _Inner, shape: tuple[int, ...], product: Callable[[_Ranks], jax.Array]
) -> jax.Array:
    """f32[shape]: the sum of ``product`` over the block's tiles of rank.

    Pages are read one turn ahead and carried: an address that depended on a load of its own turn
    would put two latencies into every turn.
    """
    block_r = cut.tuning.expand.block_r
    lane = jnp.arange(block_r)

    def visit(
        turn: jax.Array | int, carry: tuple[_Scalars, jax.Array]
    ) -> tuple[_Scalars, jax.Array]:
        pages, total = carry
        r = turn * block_r + lane
        live = r < inner.num_pages * _PAGE
        ranks = _Ranks(_spread(pages, lane), lane & (_PAGE - 1), inner.column + r, live)
        total += product(ranks)
        return _pages_of_b(cut, inner.tables_ref, inner.b, inner.row, turn + 1), total

    carry = inner.pages, jnp.zeros(shape, jnp.float32)
    if not cut.loops_over_ranks:
        return visit(0, carry)[1]
    return lax.fori_loop(0, cdiv(inner.num_pages * _PAGE, block_r), visit, carry)[1]


def _by_count(
    cut: _Cut, count: jax.Array, one: Callable[[], None], many: Callable[[], None]
) -> None:
    if not cut.tuning.single:
        return many()
    pl.when(count == 1)(one)
    pl.when(count > 1)(many)
    return None


def _block_rows(cut: _Cut, first: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block's rows, and which of the tile's are its own: [block_rows, 1]."""
    offsets = jnp.arange(cut.block_rows)[:, None]
    return first + offsets, offsets < count


def _distinct(pools: Sequence[jax.Array]) -> tuple[list[jax.Array], tuple[int, ...]]:
    """The pools, each once, and which of them every output has."""
    once = list({id(pool): pool for pool in pools}.values())
    ids = [id(pool) for pool in once]
    return once, tuple(ids.index(id(pool)) for pool in pools)


def _pick(index: jax.Array, values: Sequence[int]) -> jax.Array:
    """values[index]: of few constants, by selection."""
    picked = jnp.int32(values[0])
    for i, value in enumerate(values[1:], 1):
        picked = lax.select(index == i, jnp.int32(value), picked)
    return picked


def _is_one_of(index: jax.Array, values: Sequence[int]) -> jax.Array:
    return reduce(or_, (index == value for value in values))


def _spread(pages: Sequence[jax.Array], lane: jax.Array) -> jax.Array:
    """The scalar of the page that each rank column is in."""
    spread = jnp.broadcast_to(pages[0], lane.shape)
    for i, page in enumerate(pages[1:], 1):
        spread = jnp.where(lane >= i * _PAGE, page, spread)
    return spread


def _fetch(ref: Any, *where: jax.Array | int) -> jax.Array:
    """ref[where], a scalar, asked for here and now.

    A compiler moves a plain load behind the branch that decides whether its value is needed, and
    with that lets one latency wait for another: a third of a microsecond of a two-microsecond
    kernel.
    """
    zero = where[0] * 0  # interpret mode takes no literal for the index of a volatile load
    return pltriton.load(ref.at[tuple(index + zero for index in where)], volatile=True)


def _load(ref: Any, where: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """ref[where], 0 outside of the mask."""
    if mask is None:
        return pltriton.load(ref.at[where])
    shape = jnp.broadcast_shapes(*(jnp.shape(index) for index in where))
    return pltriton.load(ref.at[where], mask=jnp.broadcast_to(mask, shape), other=0.0)


def _as_row(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask[None, :]


def _both(mask: jax.Array, other: jax.Array | None) -> jax.Array:
    return mask if other is None else mask & other
