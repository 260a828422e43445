"""How the extend kernel is cut: plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ExtendTuning:
    """One launch. ``rows`` and ``keys`` are powers of two.

    ``rows``: (token, query head) pairs of a program, 64 or a multiple for the Hopper matrix units.
    ``keys``: positions that a program reads at once: part of a page, a page or several.
    ``num_stages``: 2 prefetches the next keys and values; 3 their page's number too; 5 two turns.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By the least head_dim, bf16. Swept on an H100, 2026-11-25, jax 0.11.2. 64 rows read twice
# what 128 do, but two such programs fit a multiprocessor and hide each other's softmax.
EXTEND: Mapping[int, ExtendTuning] = {
    1: ExtendTuning(64, 64, 4, 2),
    128: ExtendTuning(64, 64, 4, 5),
}
# IEEE f32 products are unrolled multiply-adds: small tiles keep compiling short.
_F32 = ExtendTuning(rows=32, keys=32, num_warps=4, num_stages=2)


def extend_tuning(itemsize: int, head_dim: int) -> ExtendTuning:
    """For elements of this many bytes."""
    return _F32 if itemsize == 4 else EXTEND[max(least for least in EXTEND if least <= head_dim)]


def extend_candidates(head_dim: int) -> Iterator[ExtendTuning]:
    """What is worth timing on a card, bf16. Four stages give the code of three."""
    for rows, keys, warps in ((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)):
        for stages in (2, 3, 5):
            yield ExtendTuning(rows, keys, warps, stages)
    yield ExtendTuning(64, 128, 4, 2)
    yield ExtendTuning(128, 32, 4, 2)
    yield ExtendTuning(128, 128, 8, 2)
    if head_dim <= 64:
        yield ExtendTuning(128, 64, 4, 2)
        yield ExtendTuning(256, 64, 8, 2)
        yield ExtendTuning(256, 32, 8, 2)
