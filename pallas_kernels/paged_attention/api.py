"""Attention of query tiles over a paged KV pool.

For query i of tile n, standing at position p = q_positions[n, i] of its sequence:

    out[n, i] = sum_j softmax_j(scale * (q . k_j + alibi * j)) v_j
                over max(0, p - window + 1) <= j <= p

    q: [N, Q, H, h]                N tiles of Q queries; a tile belongs to one sequence
    pool: [P, 2, K, page_size, h]  keys at [:, 0], values at [:, 1]; H is a multiple of K
    page_table: i32[N, W]          position j of tile n lies in page page_table[n, j // page_size]
    q_positions: i32[N, Q]         < 0: a padded query, whose output is 0

Decode is Q = 1; a chunk of a prompt is several tiles. Keys of the queries themselves are already in
the pool. The bias follows transformers' Falcon: added before scaling, rounded to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.paged_attention import xla


@dataclass(frozen=True)
class AttentionSpec:
    """What does not change from step to step."""

    scale: float
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    q_positions: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """Attends; returns [N, Q, H, h] in q's dtype. See the module's formula."""
    return xla.paged_attention(
        q,
        pool,
        page_table,
        q_positions,
        scale=spec.scale,
        window=spec.window,
        alibi_slopes=spec.alibi_slopes,
    )
