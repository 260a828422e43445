"""Named steps for tests and benchmarks: who owns which rows, at which rank, and where in the bank.

A shape is what is compiled; a case is data for it: many cases run on one compilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, product
from typing import Any

import numpy as np

PAGE = 8  # rank columns of a page
ZERO_PAGE = 0  # table entries past an adapter's rank name it; all zeros


class Popularity(Enum):
    """How a step's rows fall to the adapters that are resident."""

    IDENTICAL = "identical"  # all to one
    DISTINCT = "distinct"  # as evenly as can be
    UNIFORM = "uniform"  # each by a fair draw: some get none
    ZIPF = "zipf"  # the i-th in proportion to 1 / i


def rows_of_adapters(
    popularity: Popularity, num_rows: int, num_adapters: int, seed: int = 0
) -> tuple[int, ...]:
    """Rows of each adapter; they add up."""
    if popularity is Popularity.IDENTICAL:
        return (num_rows, *[0] * (num_adapters - 1))
    if popularity is Popularity.DISTINCT:
        each, more = divmod(num_rows, num_adapters)
        return tuple(each + (i < more) for i in range(num_adapters))
    weights = 1.0 / np.arange(1, num_adapters + 1)
    if popularity is Popularity.UNIFORM:
        weights = np.ones(num_adapters)
    drawn = np.random.default_rng(seed).multinomial(num_rows, weights / weights.sum())
    return tuple(drawn.tolist())


@dataclass(frozen=True)
class Shape:
    """A site in one step: D, the widths N_i, the limits of its tables and pools."""

    d_in: int
    widths: tuple[int, ...]
    num_tokens: int
    num_blocks: int
    max_rank: int = 16
    num_pages: int = 40  # of each pool
    block_rows: int = 16

    @property
    def table_width(self) -> int:
        return -(-self.max_rank // (2 * PAGE)) * 2


@dataclass(frozen=True)
class Case:
    """``rows[i]`` consecutive rows of adapter i, after ``base_rows`` of the base model.

    0 rows are an empty block in between. ``ranks[i]`` is the adapter's rank in every projection of
    the site, 0 where it has none.
    """

    rows: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    base_rows: int = 0


# Falcon-7B's widths are 71 * 64 and no multiple of 128; 31 and 71 are no multiple of anything.
SHAPES = {
    "q, k, v of equal width": Shape(64, (64, 64, 64), 24, 6),
    "grouped q, k, v": Shape(64, (64, 32, 32), 24, 6, max_rank=64),
    "one projection": Shape(24, (40,), 24, 17, max_rank=256, num_pages=320),
    "odd widths": Shape(71, (71, 31), 24, 6, max_rank=32),
    "Falcon-7B's widths": Shape(18176, (4672, 4544), 4, 3, num_pages=10),
    "prompts": Shape(32, (48, 48), 160, 7, max_rank=40, block_rows=64),
    "head": Shape(24, (20_000,), 4, 4, max_rank=32, num_pages=12),
}


def cases() -> dict[str, tuple[str, Case]]:
    """Name -> its shape's name, and the case."""
    mixed = {
        "one row": ("one projection", Case((1,), ((16,),))),
        "only the base": ("one projection", Case((0, 0), ((16,), (0,)), base_rows=24)),
        "adapters without the projection": ("one projection", Case((3, 2), ((0,), (0,)))),
        "mixed ranks": (
            "one projection",
            Case((1, 2, 3, 1, 4, 5, 1, 7), ((1,), (256,), (16,), (7,), (9,), (64,), (128,), (33,))),
        ),
        "other targets for each": (
            "q, k, v of equal width",
            Case(
                (5, 1, 7, 2, 4),
                ((16, 16, 16), (16, 0, 8), (0, 3, 0), (0, 0, 16), (1, 9, 0)),
                base_rows=3,
            ),
        ),
        "other widths and ranks for each": (
            "grouped q, k, v",
            Case((9, 1, 1, 6), ((64, 8, 1), (0, 64, 17), (40, 0, 0), (24, 24, 24)), base_rows=2),
        ),
        "one adapter over two blocks": ("grouped q, k, v", Case((24,), ((16, 16, 16),))),
        "odd widths": ("odd widths", Case((2, 1, 18), ((5, 24), (32, 0), (17, 3)), base_rows=1)),
        "wide": ("Falcon-7B's widths", Case((1, 3), ((16, 0), (3, 9)))),
        "prompts": ("prompts", Case((64, 1, 90), ((16, 16), (40, 0), (9, 33)), base_rows=2)),
        "head": ("head", Case((1, 0, 2), ((16,), (32,), (3,)))),
    }
    return mixed | {
        f"16 adapters, {popularity.value}": ("one projection", _sixteen(popularity))
        for popularity in Popularity
    }


def _sixteen(popularity: Popularity) -> Case:
    ranks = tuple((1 + 5 * i,) for i in range(16))
    return Case(rows_of_adapters(popularity, 20, 16), ranks, base_rows=4)


def empty_group_cases(num_groups: int, rows: int, rank: int, width: int) -> list[Case]:
    """Every pattern of groups that have no rows."""
    ranks = ((rank,) * width,) * num_groups
    return [Case(pattern, ranks) for pattern in product((0, rows), repeat=num_groups)]


@dataclass(frozen=True)
class Tables:
    """What the host hands over for a case, and the bank gathered by block (see ``operands``)."""

    tables: np.ndarray
    num_pages: np.ndarray
    scale: np.ndarray
    first: np.ndarray
    count: np.ndarray
    pages: list[list[list[list[int]]]]  # [adapter][projection][A, B]: page ids


def tables(shape: Shape, case: Case, num_layers: int = 1, seed: int = 0) -> Tables:
    """Pages in shuffled orders, A's another than B's, without a pool's first and its last."""
    random = np.random.default_rng(seed)
    orders = [iter((1 + random.permutation(shape.num_pages - 2)).tolist()) for _ in "AB"]
    pages = [
        [[[next(order) for _ in range(-(-rank // PAGE))] for order in orders] for rank in ranks]
        for ranks in case.ranks
    ]
    blocks = list(_blocks(shape, case))
    assert len(blocks) <= shape.num_blocks, f"{len(blocks)} blocks, room for {shape.num_blocks}"
    dims = shape.num_blocks, len(shape.widths)
    scale = random.uniform(0.5, 3.0, (len(case.rows), dims[1], num_layers))
    found = Tables(
        tables=np.full((*dims, 2, shape.table_width), ZERO_PAGE, np.int32),
        num_pages=np.zeros(dims, np.int32),
        scale=np.ones((*dims, num_layers), np.float32),
        first=np.zeros(shape.num_blocks, np.int32),
        count=np.zeros(shape.num_blocks, np.int32),
        pages=pages,
    )
    for b, (adapter, first, count) in enumerate(blocks):
        found.first[b], found.count[b], found.scale[b] = first, count, scale[adapter]
        for i, sides in enumerate(pages[adapter]):
            found.num_pages[b, i] = len(sides[0])
            found.tables[b, i, :, : len(sides[0])] = sides
    return found


def _blocks(shape: Shape, case: Case) -> list[tuple[int, int, int]]:
    """(adapter, first row, rows) of each block."""
    starts = accumulate(case.rows, initial=case.base_rows)
    blocks = []
    for adapter, (start, rows) in enumerate(zip(starts, case.rows, strict=False)):
        for first in range(start, start + max(rows, 1), shape.block_rows):
            blocks.append((adapter, first, min(shape.block_rows, start + rows - first)))
    return blocks


@dataclass(frozen=True)
class Built:
    """A case's arrays in f32, and what must come out, in f64, from the uncut matrices."""

    y: np.ndarray
    x: np.ndarray
    a_pool: np.ndarray
    b_pools: dict[int, np.ndarray]  # by width
    tables: Tables
    wanted: np.ndarray

    def arrays(self, dtype: Any = np.float32) -> dict[str, Any]:
        """What a jitted function takes; y stays f32 or becomes ``dtype`` at the caller's."""
        t = self.tables
        return {
            "a_pool": self.a_pool.astype(dtype),
            "b_pools": {width: pool.astype(dtype) for width, pool in self.b_pools.items()},
            "tables": t.tables,
            "num_pages": t.num_pages,
            "scale": t.scale,
            "first": t.first,
            "count": t.count,
        }


def build(shape: Shape, case: Case, num_layers: int = 2, layer: int = 1, seed: int = 0) -> Built:
    """Random matrices, cut into pages. All that no adapter owns is NaN, but for the zero page."""
    random = np.random.default_rng(seed)
    t = tables(shape, case, num_layers, seed)
    page = num_layers, PAGE
    a_pool = np.full((shape.num_pages, *page, shape.d_in), np.nan, np.float32)
    b_pools = {n: np.full((shape.num_pages, *page, n), np.nan, np.float32) for n in shape.widths}
    for pool in (a_pool, *b_pools.values()):
        pool[ZERO_PAGE] = 0.0
    x = random.normal(size=(shape.num_tokens, shape.d_in)).astype(np.float32)
    y = random.normal(size=(shape.num_tokens, sum(shape.widths))).astype(np.float32)
    wanted = y.astype(np.float64)
    starts = [0, *accumulate(shape.widths)]
    scale = {a: t.scale[b, :, layer] for b, (a, _, _) in enumerate(_blocks(shape, case))}
    rows_end = list(accumulate(case.rows, initial=case.base_rows))
    for adapter, ranks in enumerate(case.ranks):
        rows = slice(rows_end[adapter], rows_end[adapter + 1])
        for i, (rank, width) in enumerate(zip(ranks, shape.widths, strict=True)):
            a, b = (random.normal(size=(rank, n)) for n in (shape.d_in, width))
            for pool, matrix, ids in zip(
                (a_pool, b_pools[width]), (a, b), t.pages[adapter][i], strict=True
            ):
                pool[ids, layer] = _cut(matrix, len(ids))
            columns = slice(starts[i], starts[i + 1])
            wanted[rows, columns] += (x[rows] @ a.T @ b) * scale[adapter][i]
    return Built(y, x, a_pool, b_pools, t, wanted)


def _cut(matrix: np.ndarray, num_pages: int) -> np.ndarray:
    """[rank, n] -> [num_pages, 8, n], the last one filled up with zeros."""
    padded = np.zeros((num_pages * PAGE, matrix.shape[1]))
    padded[: matrix.shape[0]] = matrix
    return padded.reshape(num_pages, PAGE, matrix.shape[1])
