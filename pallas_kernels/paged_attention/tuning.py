"""How the decode kernel is cut, per device: plain data, and a rule for what was never measured.

A *stream* is one (sequence, kv head): K and V that a program reads once for a whole group of query
heads. How many streams a launch has decides how finely each must be cut to fill the device, so the
rows are keyed by it rather than by the batch: 64 sequences of 8 kv heads need what 16 of 32 need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

H100 = "NVIDIA H100 80GB HBM3"
_MULTIPROCESSORS = 132
_MAX_SPLITS = 16


@dataclass(frozen=True)
class DecodeTuning:
    """One launch. Every number but ``num_stages`` is a power of two.

    ``splits``: programs that share a stream; > 1 costs partial results and a second launch.
    ``turn``: positions that a program reads at once: part of a page, a page or several.
    ``dot``: scores and sums on the matrix units, the group padded to 16 rows or more; otherwise by
    multiply-and-sum, for a group of one.
    ``num_stages``: n keeps n - 1 turns in flight through shared memory; nothing without ``dot``.
    """

    splits: int
    turn: int
    dot: bool
    num_warps: int
    num_stages: int


# (device kind, group, head_dim, least number of streams), bf16. Swept on 2026-11-25, jax 0.11.2.
DECODE: Mapping[tuple[str, int, int, int], DecodeTuning] = {
    (H100, 1, 128, 1): DecodeTuning(8, 64, False, 4, 1),
    (H100, 1, 128, 128): DecodeTuning(1, 32, True, 2, 3),
    (H100, 1, 128, 1024): DecodeTuning(1, 64, True, 4, 2),
    (H100, 4, 128, 1): DecodeTuning(8, 64, True, 4, 2),
    (H100, 4, 128, 32): DecodeTuning(4, 64, True, 2, 3),
    (H100, 4, 128, 256): DecodeTuning(1, 64, True, 4, 2),
}


def decode_tuning(
    device_kind: str, group: int, head_dim: int, streams: int, itemsize: int = 2
) -> DecodeTuning:
    """The measured row with the most streams not above these, else the rule's."""
    if itemsize == 4:
        return _f32_rule(group, streams)
    rows = [
        least
        for kind, *shape, least in DECODE
        if (kind, *shape) == (device_kind, group, head_dim) and least <= streams
    ]
    if not rows:
        return decode_rule(group, streams)
    return DECODE[device_kind, group, head_dim, max(rows)]


def decode_rule(group: int, streams: int) -> DecodeTuning:
    """Splits until about four programs stand on every multiprocessor of an H100.

    Enough bytes are in flight then: 3.1 TB/s at 700 ns is 16 KB a multiprocessor, one page's keys
    at a head_dim of 128. Of a large group two: its partial results, f32 of every query head,
    outweigh the keys and values that a finer split reads.
    """
    programs = (4 if group <= 16 else 2) * _MULTIPROCESSORS
    splits = _clip(_power_of_two(programs // streams), 1, _MAX_SPLITS)
    if group == 1:
        return DecodeTuning(splits, turn=32, dot=True, num_warps=2, num_stages=3)
    num_warps = 4 if group <= 16 else 8
    return DecodeTuning(splits, turn=64, dot=True, num_warps=num_warps, num_stages=3)


def _f32_rule(group: int, streams: int) -> DecodeTuning:
    """IEEE products are multiply-adds either way: padded rows would be work, for nothing."""
    return replace(decode_rule(group, streams), turn=32, dot=group > 1, num_stages=2)


def decode_candidates(group: int, streams: int) -> Iterator[DecodeTuning]:
    """What is worth timing on a card."""
    usual = decode_rule(group, streams).splits
    splits = sorted({1, *(_clip(usual * 2**e // 4, 1, 2 * _MAX_SPLITS) for e in range(4))})
    for s, (turn, warps, stages) in itertools.product(splits, _dot_shapes(group)):
        yield DecodeTuning(s, turn, True, warps, stages)
    if group == 1:
        for s, (turn, warps) in itertools.product(
            splits, ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4))
        ):
            yield DecodeTuning(s, turn, False, warps, 1)


def _dot_shapes(group: int) -> tuple[tuple[int, int, int], ...]:
    """(turn, warps, stages)."""
    if group == 1:
        return (16, 1, 4), (32, 1, 3), (32, 2, 3), (32, 2, 4), (64, 2, 3), (64, 4, 2), (64, 4, 3)
    if group <= 16:
        return (32, 2, 3), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2)
    return (32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3)


def _power_of_two(n: int) -> int:
    """The largest not above n; 1 for less."""
    return 1 << (max(n, 1).bit_length() - 1)


def _clip(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))
