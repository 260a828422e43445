"""How the two launches of grouped LoRA are cut, per device: plain data, and a rule for the rest.

The rows are keyed by what decides how many programs there are and how much each has to read: the
number of tokens, the rank that the tables have room for, the widths of the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

H100 = "NVIDIA H100 80GB HBM3"
_LEAST_ROWS = 16  # of a tile of the matrix units
_DECODE_TOKENS = 256  # steps of more tokens carry chunks of prompts: a block is many rows


@dataclass(frozen=True)
class ShrinkTuning:
    """x @ A^T. Every number but ``splits`` and ``lanes`` is a power of two.

    ``splits``: programs that share one sum over D; each leaves a partial result.
    ``lanes``: programs that share a block's tiles of rank columns.
    ``block_r``: rank columns of a tile.
    ``block_k``: how much of D a program reads at once.
    """

    splits: int
    lanes: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandTuning:
    """h @ B: a program for every ``block_n`` output columns, ``block_r`` rank columns at once.

    ``wide_r``: rank columns at once where an adapter has more, for a block of several rows.
    """

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    wide_r: int


@dataclass(frozen=True)
class Tuning:
    """``single``: blocks of one row by multiply-and-sum: no shared memory, no padding to 16."""

    shrink: ShrinkTuning
    expand: ExpandTuning
    single: bool


@dataclass(frozen=True)
class TuningKey:
    """``num_tokens`` and ``max_rank`` are the most that a row holds for."""

    device_kind: str
    itemsize: int
    num_tokens: int
    block_rows: int
    d_in: int
    max_rank: int
    widths: tuple[int, ...]


_QKV, _OUT = (4096, 4096, 4096), (4096,)  # Llama-2-7B's sites of attention
_PREFILL = ExpandTuning(128, 16, num_warps=4, num_stages=1, wide_r=16)
# Where the rule is slower by more than the noise: us a site, in brackets by the rule. Swept on
# 2026-11-25 at room for rank 16 (64 adapters) and on 2026-11-26 at room for rank 64 (32 adapters),
# jax 0.11.2.
MEASURED: dict[TuningKey, Tuning] = {
    TuningKey(H100, 2, 2048, 64, 4096, 16, _QKV): Tuning(  # 84.5 (87.1)
        ShrinkTuning(4, 1, 64, 64, 4, 6), _PREFILL, single=False
    ),
    TuningKey(H100, 2, 8192, 64, 4096, 16, _OUT): Tuning(  # 81.8 (86.5)
        ShrinkTuning(1, 1, 16, 128, 4, 4), _PREFILL, single=False
    ),
    # The rule's own, so that the rows for 8192 tokens do not hold for fewer.
    TuningKey(H100, 2, 2048, 64, 4096, 64, _QKV): Tuning(
        ShrinkTuning(4, 1, 64, 64, 4, 4), _PREFILL, single=False
    ),
    TuningKey(H100, 2, 2048, 64, 4096, 64, _OUT): Tuning(
        ShrinkTuning(4, 1, 32, 64, 4, 4), _PREFILL, single=False
    ),
    TuningKey(H100, 2, 8192, 64, 4096, 64, _QKV): Tuning(  # 258 (287); of rank 64: 431 (463)
        ShrinkTuning(1, 1, 64, 64, 4, 6), _PREFILL, single=False
    ),
    # Put together from two sweeps: beside the row's for rank 16, which takes 87, and 188 at rank
    # 64, this shrink took 1 more and 68 less.
    TuningKey(H100, 2, 8192, 64, 4096, 64, _OUT): Tuning(  # 88 (95); of rank 64: 120 (165)
        ShrinkTuning(1, 1, 64, 64, 4, 6), _PREFILL, single=False
    ),
}


def rows_per_block(num_tokens: int) -> int:
    """How long the host should cut blocks: a decode step's rows differ, a prompt's do not.

    Rows of one block share a read of their adapter from the L2 cache, which at 16 rows is as much
    traffic as the rows themselves.
    """
    return _LEAST_ROWS if num_tokens <= _DECODE_TOKENS else 64


def choose(wanted: TuningKey) -> Tuning:
    """The measured row with the fewest tokens and the least rank that holds, else the rule's."""
    rows = [
        key
        for key in MEASURED
        if replace(key, num_tokens=wanted.num_tokens, max_rank=wanted.max_rank) == wanted
        and key.num_tokens >= wanted.num_tokens
        and key.max_rank >= wanted.max_rank
    ]
    if rows:
        return MEASURED[min(rows, key=lambda key: (key.num_tokens, key.max_rank))]
    return rule(wanted)


def rule(key: TuningKey) -> Tuning:
    """From the registers and the bytes in flight that the machine code shows.

    A decode step's bytes are all asked for at once: 4 to 8 KB of A or B a program, about a thousand
    programs for 64 adapters. Above 64 rows shrink goes in stages, for the matrix units, and expand
    takes twice the columns, for there are up to a block a row, and most may be empty. Two thirds of
    what a block of many rows would hold in registers are sums: so it goes by parts. A prefill
    streams x, y and partial sums, in tiles of 64 rows, which the Hopper matrix units want. IEEE f32
    products are unrolled multiply-adds: small tiles.
    """
    if key.itemsize == 4:
        return _f32_rule(key)
    return _decode_rule(key) if key.block_rows == _LEAST_ROWS else _prefill_rule(key)


def _decode_rule(key: TuningKey) -> Tuning:
    outputs, rank_tiles = len(key.widths), -(-key.max_rank // 16)
    if key.num_tokens > 64:
        most_splits, block_n = 4 if outputs > 1 else 8, 256 if rank_tiles == 1 else 512
        shrink = _shrink_cut(
            key.d_in, most_splits, outputs, 16, block_k=128, num_warps=2, num_stages=3
        )
        return Tuning(shrink, ExpandTuning(block_n, 16, 2, 1, wide_r=32), single=True)
    few = key.num_tokens <= 8
    lanes = outputs * min(rank_tiles, 4) if key.num_tokens < 8 else outputs
    most_splits = 32 if few else 16
    block_k = 256 if key.d_in <= 256 * most_splits else 512
    shrink = _shrink_cut(key.d_in, most_splits, lanes, 16, block_k, num_warps=block_k // 128)
    return Tuning(shrink, ExpandTuning(128 if few else 256, 16, 1, 1, wide_r=32), single=True)


def _prefill_rule(key: TuningKey) -> Tuning:
    """Shrink takes all rank columns of a site at once, if they are few: x is then read once."""
    columns = max(16, len(key.widths) * min(key.max_rank, 32))
    block_r = min(64, 1 << (columns - 1).bit_length())
    warps = min(key.block_rows // _LEAST_ROWS, 8)
    return Tuning(
        _shrink_cut(key.d_in, 4, 1, block_r, block_k=64, num_warps=warps),
        ExpandTuning(128, 16, warps, num_stages=1, wide_r=16),
        single=key.num_tokens <= _DECODE_TOKENS,  # perhaps the head's, an output each
    )


def _f32_rule(key: TuningKey) -> Tuning:
    is_decode = key.block_rows == _LEAST_ROWS
    return Tuning(
        _shrink_cut(key.d_in, 8 if is_decode else 4, 1, 16, block_k=64, num_warps=4),
        ExpandTuning(64 if is_decode else 32, 16, num_warps=4, num_stages=1, wide_r=16),
        single=key.num_tokens <= _DECODE_TOKENS,
    )


def _shrink_cut(
    d_in: int,
    most_splits: int,
    lanes: int,
    block_r: int,
    block_k: int,
    num_warps: int,
    num_stages: int = 4,
) -> ShrinkTuning:
    """As few splits as take equally many turns."""
    turns = -(-d_in // (block_k * most_splits))
    splits = -(-d_in // (block_k * turns))
    return ShrinkTuning(splits, lanes, block_r, block_k, num_warps, num_stages if turns > 1 else 1)


def candidates(key: TuningKey) -> Iterator[Tuning]:
    """What is worth timing on a card, bf16: one kernel varied at a time, the other by the rule."""
    start = rule(key)
    is_decode = key.block_rows == _LEAST_ROWS
    yield start
    for splits, block_k, warps, stages in _DECODE_SHRINK if is_decode else _PREFILL_SHRINK:
        splits = min(splits, -(-key.d_in // block_k))
        shrink = replace(
            start.shrink, splits=splits, block_k=block_k, num_warps=warps, num_stages=stages
        )
        if shrink != start.shrink:
            yield replace(start, shrink=shrink)
    for block_n, warps in _DECODE_EXPAND if is_decode else _PREFILL_EXPAND:
        expand = replace(start.expand, block_n=block_n, num_warps=warps)
        if expand != start.expand:
            yield replace(start, expand=expand)
    if is_decode:
        yield replace(start, single=False)


# splits, block_k, warps, stages
_DECODE_SHRINK = (
    (32, 128, 1, 1),
    (16, 256, 1, 1),
    (16, 256, 2, 1),
    (16, 256, 4, 1),
    (8, 512, 2, 1),
    (8, 512, 4, 1),
    (4, 1024, 4, 1),
    (4, 1024, 8, 1),
    (8, 128, 2, 3),
    (4, 128, 2, 3),
    (4, 256, 2, 2),
    (4, 256, 4, 3),
)
_PREFILL_SHRINK = (
    (1, 64, 4, 6),
    (1, 128, 4, 4),
    (2, 64, 4, 4),
    (2, 128, 4, 4),
    (4, 64, 4, 3),
    (4, 64, 4, 6),
    (4, 128, 4, 3),
    (4, 128, 8, 3),
    (8, 64, 4, 4),
)
# block_n, warps
_DECODE_EXPAND = ((128, 1), (128, 2), (256, 1), (256, 2), (512, 2), (512, 4), (1024, 4))
_PREFILL_EXPAND = ((64, 2), (64, 4), (128, 4), (128, 8), (256, 4), (256, 8), (512, 8))
