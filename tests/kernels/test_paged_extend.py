"""Extend on packed tokens, in interpret mode, against the plain reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import Rotation, rotate
from pallas_kernels.paged_attention.enter_triton import paged_enter
from pallas_kernels.paged_attention.extend_triton import (
    BLOCK_QUERIES,
    QueryBlocks,
    max_query_blocks,
    paged_extend,
    paged_extend_fused,
    query_blocks,
)
from pallas_kernels.paged_attention.extend_tuning import ExtendTuning

TOLERANCE = 2e-5  # f32: sums of up to 400 terms of size 1, in another order
BF16_TOLERANCE = 1.6e-2  # weights and outputs of size 1 are rounded at 2^-9, twice
SMALL = ExtendTuning(rows=16, keys=16, num_warps=4, num_stages=2)
# one size of every array, where a case allows it, so that cases share what was compiled
NUM_PAGES, NUM_CHUNKS, MAX_BLOCKS, MAX_POSITIONS, MAX_LENGTH = 20, 12, 21, 64, 40


@dataclass(frozen=True)
class Case:
    """``chunks``: (tokens already in the pool, tokens of this step) of each sequence."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    chunks: tuple[tuple[int, int], ...] = ((0, 37),)
    block_queries: int = 32
    rows: int = 100  # at least; those after the last chunk are padding
    tuning: ExtendTuning | None = SMALL
    dtype: Any = jnp.float32


PACKED = ((0, 13), (29, 1), (0, 33), (7, 40), (50, 5))
SLOPES_12 = tuple(2.0 ** -(0.5 * i) for i in range(1, 13))  # most have no short binary form
CASES = {
    "a prompt": Case(),
    "a chunk in mid prompt": Case(chunks=((19, 37),)),
    "one token": Case(chunks=((0, 1),)),
    "one token behind a past": Case(chunks=((40, 1),)),
    "whole blocks and pages": Case(chunks=((32, 64),), rows=0),
    "packed": Case(chunks=PACKED),
    "packed, mha": Case(num_kv_heads=4, chunks=PACKED),
    "packed, 9 over 3": Case(num_heads=9, num_kv_heads=3, chunks=PACKED),
    "packed, 13 over 1": Case(num_heads=13, num_kv_heads=1, chunks=PACKED),  # 71 scaled down
    "a group larger than the tile": Case(num_heads=23, num_kv_heads=1, chunks=((5, 12),)),
    "head_dim 64, 9 over 3": Case(num_heads=9, num_kv_heads=3, head_dim=64, chunks=((3, 21),)),
    "head_dim 80": Case(head_dim=80, chunks=((0, 21), (30, 9))),
    "head_dim 96": Case(head_dim=96, chunks=((0, 21), (30, 9))),
    "page of 32": Case(page_size=32, chunks=PACKED),
    "page of 64": Case(page_size=64, chunks=PACKED),
    "four pages a turn": Case(tuning=replace(SMALL, keys=64), chunks=PACKED),
    "window in a turn": Case(window=3, chunks=PACKED),
    "window of a page": Case(window=16, chunks=PACKED),
    "window over pages": Case(window=37, chunks=PACKED),
    "window beyond": Case(window=1000, chunks=PACKED),
    "window, two pages a turn": Case(window=20, tuning=replace(SMALL, keys=32), chunks=PACKED),
    "window, page of 64": Case(window=20, page_size=64, chunks=((100, 50), (0, 70))),
    # from 257 on a position is rounded to bf16 before it is multiplied
    "alibi": Case(
        num_heads=12, num_kv_heads=12, alibi_slopes=SLOPES_12, chunks=((370, 30), (250, 16), (0, 9))
    ),
    "alibi, gqa": Case(alibi_slopes=(0.5, 0.25, 0.125, 0.3), chunks=PACKED),
    "alibi, gqa, window": Case(alibi_slopes=(0.5, 0.25, 0.125, 0.3), window=11, chunks=PACKED),
    "f32 as it is tuned": Case(
        tuning=None, head_dim=64, page_size=64, block_queries=128, chunks=((0, 130), (70, 20))
    ),
    "bf16 as it is tuned": Case(
        tuning=None,
        head_dim=128,
        page_size=64,
        block_queries=128,
        chunks=((0, 130), (70, 20)),
        dtype=jnp.bfloat16,
    ),
}


@dataclass(frozen=True)
class Given:
    """A case's arrays. ``owned``: bool[P, page_size], what some query of the step may see."""

    case: Case
    q: np.ndarray
    pool: np.ndarray
    page_table: np.ndarray
    blocks: QueryBlocks
    owned: np.ndarray

    @property
    def num_live(self) -> int:
        return sum(length for _, length in self.case.chunks)

    @property
    def fixed(self) -> dict[str, Any]:
        case = self.case
        return {
            "scale": case.head_dim**-0.5,
            "window": case.window,
            "alibi_slopes": case.alibi_slopes,
        }


def given(case: Case, seed: int = 0) -> Given:
    """Sequences on shuffled pages; entries behind a window and beyond the end name page 0."""
    random = np.random.default_rng(seed)
    page_size = case.page_size
    ends = [past + length for past, length in case.chunks]
    num_pages = max(NUM_PAGES, 3 + sum(-(-end // page_size) for end in ends))
    free = iter(random.permutation(np.arange(1, num_pages)))
    table = np.zeros((NUM_CHUNKS, -(-max(MAX_POSITIONS, *ends) // page_size)), np.int32)
    owned = np.zeros((num_pages, page_size), bool)
    for row, (past, length) in zip(table, case.chunks, strict=False):
        oldest = 0 if case.window is None else max(past - case.window + 1, 0)
        for j in range(oldest // page_size * page_size, past + length):
            if row[j // page_size] == 0:
                row[j // page_size] = next(free)
            owned[row[j // page_size], j % page_size] = True
    pasts, lengths = zip(*case.chunks, strict=True)
    blocks = query_blocks(lengths, pasts, case.block_queries, MAX_BLOCKS)
    return Given(
        case=case,
        q=random.normal(size=(max(case.rows, sum(lengths)), case.num_heads, case.head_dim)),
        pool=random.normal(size=(num_pages, 2, case.num_kv_heads, page_size, case.head_dim)),
        page_table=table,
        blocks=blocks,
        owned=owned,
    )


FIXED = ("scale", "window", "alibi_slopes")
# as the step runs it: whole, under jit, where XLA may fuse and drop roundings
_extend = jax.jit(paged_extend, static_argnames=(*FIXED, "interpret", "tuning"))
_reference = jax.jit(reference.paged_attention, static_argnames=FIXED)


def extend(g: Given) -> np.ndarray:
    q, pool = jnp.asarray(g.q, g.case.dtype), jnp.asarray(g.pool, g.case.dtype)
    blocks = QueryBlocks(*map(jnp.asarray, g.blocks))
    out = _extend(q, pool, g.page_table, blocks, interpret=True, tuning=g.case.tuning, **g.fixed)
    return np.asarray(out, np.float32)


def expected(g: Given) -> np.ndarray:
    """Rows of the chunks by the reference in f32, from operands rounded as the kernel's are."""
    ends = np.cumsum([length for _, length in g.case.chunks])
    longest = max(MAX_LENGTH, *(length for _, length in g.case.chunks))
    q = np.zeros((NUM_CHUNKS, longest, *g.q.shape[1:]))
    positions = np.full((NUM_CHUNKS, longest), -1, np.int32)
    for c, (past, length) in enumerate(g.case.chunks):
        q[c, :length] = g.q[ends[c] - length : ends[c]]
        positions[c, :length] = np.arange(past, past + length)
    rounded = (jnp.asarray(x, g.case.dtype).astype(jnp.float32) for x in (q, g.pool))
    # under jit XLA would leave out the reference's roundings of the bias
    attend = reference.paged_attention if g.case.alibi_slopes else _reference
    out = np.asarray(attend(*rounded, g.page_table, positions, **g.fixed))
    return np.concatenate([out[c, :length] for c, (_, length) in enumerate(g.case.chunks)])


def tolerance(case: Case) -> float:
    return TOLERANCE if case.dtype == jnp.float32 else BF16_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    g = given(CASES[name])
    want = expected(g)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(extend(g)[: g.num_live], want, atol=tolerance(g.case), rtol=0)


@pytest.mark.parametrize(
    "case",
    [
        Case(chunks=PACKED),
        Case(chunks=PACKED, window=20),
        Case(chunks=PACKED, window=20, tuning=replace(SMALL, keys=64)),
        Case(chunks=PACKED, num_heads=5, num_kv_heads=1, alibi_slopes=(0.5, 0.3, 0.2, 0.1, 0.05)),
        Case(chunks=PACKED, page_size=64, head_dim=80, dtype=jnp.bfloat16),
    ],
    ids=["causal", "window", "pages a turn", "alibi", "bf16"],
)
def test_nothing_beyond_the_sequence_shows(case: Case) -> None:
    """NaN wherever no query may look: other pages, page 0, the last page's end."""
    g = given(case)
    where = g.owned[:, None, None, :, None]
    zero, poison = (replace(g, pool=np.where(where, g.pool, fill)) for fill in (0.0, np.nan))
    got = extend(poison)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, extend(zero))


def test_rows_in_no_block_keep_their_queries() -> None:
    g = given(Case(chunks=PACKED))
    np.testing.assert_array_equal(extend(g)[g.num_live :], g.q[g.num_live :].astype(np.float32))


def test_without_blocks_nothing_changes() -> None:
    g = given(Case(chunks=PACKED))
    nobody = QueryBlocks(*(np.zeros_like(x) for x in g.blocks))
    np.testing.assert_array_equal(extend(replace(g, blocks=nobody)), g.q.astype(np.float32))


def test_the_cut_into_blocks_does_not_matter() -> None:
    """Neither its size, nor the order of blocks, nor empty ones between."""
    g = given(Case(chunks=PACKED))
    fine = given(replace(g.case, block_queries=5))
    np.testing.assert_allclose(extend(fine), extend(g), atol=TOLERANCE)
    order = np.random.default_rng(1).permutation(len(g.blocks.first))
    mixed = QueryBlocks(*(x[order] for x in g.blocks))
    np.testing.assert_array_equal(extend(replace(g, blocks=mixed)), extend(g))


def test_many_short_prompts() -> None:
    g = given(Case(chunks=tuple((7 * i % 11, 1 + 5 * i % 9) for i in range(12))))
    np.testing.assert_allclose(extend(g)[: g.num_live], expected(g), atol=TOLERANCE)


BREAKS: dict[str, Callable[[Given], Given]] = {
    "a position too far": lambda g: replace(
        g, blocks=g.blocks._replace(position=np.asarray(g.blocks.position) + 1)
    ),
    "another chunk's pages": lambda g: replace(
        g, blocks=g.blocks._replace(chunk=np.roll(g.blocks.chunk, 1))
    ),
    "rows shifted": lambda g: replace(
        g, blocks=g.blocks._replace(first=np.asarray(g.blocks.first) + 1)
    ),
    "values for keys": lambda g: replace(g, pool=g.pool[:, ::-1]),
    "heads in another order": lambda g: replace(g, q=g.q[:, ::-1]),
    "a wider window": lambda g: replace(g, case=replace(g.case, window=10)),
    "no bias": lambda g: replace(g, case=replace(g.case, alibi_slopes=None)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparison_notices(name: str) -> None:
    g = given(Case(chunks=((3, 20), (40, 9)), window=9, alibi_slopes=(0.5, 0.25, 0.125, 0.3)))
    error = np.abs(extend(BREAKS[name](g))[: g.num_live] - expected(g)).max()
    assert not error < 50 * TOLERANCE


FUSED = {
    "rotated": Case(chunks=PACKED),
    "rotated, 13 over 1": Case(num_heads=13, num_kv_heads=1, chunks=PACKED),
    "rotated, head_dim 80": Case(head_dim=80, chunks=((0, 21), (30, 9))),
    "alibi": Case(chunks=PACKED, alibi_slopes=(0.5, 0.25, 0.125, 0.3)),
    "bf16": Case(chunks=PACKED, head_dim=64, page_size=64, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_the_steps_apart(name: str) -> None:
    """Rotating, entering keys and values, attending: by the kernels, and in plain jnp."""
    g = given(FUSED[name])
    case, random = g.case, np.random.default_rng(2)
    num_tokens, num_kv = len(g.q), case.num_kv_heads
    pages, offsets = places(g)
    qkv = random.normal(size=(num_tokens, case.num_heads + 2 * num_kv, case.head_dim))
    qkv, pool = jnp.asarray(qkv, case.dtype), jnp.asarray(g.pool, case.dtype)
    turn = None
    if case.alibi_slopes is None:
        angles = random.uniform(0, 6, (num_tokens, case.head_dim // 2)).astype(np.float32)
        turn = Rotation(jnp.cos(angles), jnp.sin(angles))

    entered = paged_enter(qkv, turn, pool, pages, offsets, interpret=True)
    blocks = QueryBlocks(*map(jnp.asarray, g.blocks))
    out = paged_extend_fused(
        qkv, turn, entered, g.page_table, blocks, interpret=True, tuning=case.tuning, **g.fixed
    )

    q, k, v = jnp.split(qkv, [case.num_heads, case.num_heads + num_kv], axis=1)
    live = slice(0, g.num_live)
    new = jnp.stack([rotate(k, turn), v], axis=1)[live]
    want_pool = pool.at[pages[live], :, :, offsets[live]].set(new)
    error = 2e-2 if case.dtype == jnp.bfloat16 else 1e-6  # a rounding step of the largest key
    as_f32 = (np.asarray(x, np.float32) for x in (entered, want_pool))
    np.testing.assert_allclose(*as_f32, atol=error, rtol=0)
    apart = replace(
        g, q=np.asarray(rotate(q, turn), np.float32), pool=np.asarray(want_pool, np.float32)
    )
    got = np.asarray(out, np.float32)[live]
    np.testing.assert_allclose(got, expected(apart), atol=2 * tolerance(case), rtol=0)


def places(g: Given) -> tuple[np.ndarray, np.ndarray]:
    """Page and offset of every packed token; page 0 for padding."""
    pages, offsets = np.zeros((2, len(g.q)), np.int32)
    row = 0
    for table, (past, length) in zip(g.page_table, g.case.chunks, strict=False):
        at = np.arange(past, past + length)
        pages[row : row + length] = table[at // g.case.page_size]
        offsets[row : row + length] = at % g.case.page_size
        row += length
    return pages, offsets


def test_padding_enters_nothing() -> None:
    g = given(Case(chunks=PACKED))
    qkv = jnp.ones((len(g.q), 8, 16))
    pool = paged_enter(qkv, None, jnp.asarray(g.pool), *places(g), interpret=True)
    np.testing.assert_array_equal(pool[0], g.pool.astype(np.float32)[0])
    assert (np.asarray(pool) == 1).sum() == g.num_live * 2 * 2 * 16


def test_query_blocks() -> None:
    blocks = query_blocks([5, 0, 3, 4], [10, 0, 2, 0], block_queries=4, max_blocks=6)
    assert [x.tolist() for x in blocks] == [
        [4, 0, 5, 8, 0, 0],
        [1, 4, 3, 4, 0, 0],
        [0, 0, 2, 3, 0, 0],
        [14, 10, 2, 0, 0, 0],
    ]
    assert all(x.dtype == np.int32 for x in blocks)
    assert not np.any(query_blocks([], [], 4, 2))


def test_query_blocks_refuses_more_than_there_is_room_for() -> None:
    with pytest.raises(ValueError, match="4 blocks of queries, room for 3"):
        query_blocks([5, 3, 4], [0, 0, 0], block_queries=4, max_blocks=3)


@pytest.mark.parametrize("lengths", [[64], [1] * 5, [65, 1, 63, 130], [128, 128], [129] * 3])
def test_max_query_blocks_is_enough(lengths: list[int]) -> None:
    room = max_query_blocks(sum(lengths), len(lengths), 64)
    query_blocks(lengths, [0] * len(lengths), 64, room)
    assert max_query_blocks(512, 1, BLOCK_QUERIES) == -(-512 // BLOCK_QUERIES)
