"""Attention over a paged KV pool: writes a step's keys and values, then attends.

For a query at position p of its sequence:

    out = sum_j softmax_j(scale * (q . k_j + alibi * j)) v_j   over max(0, p - window + 1) <= j <= p

    q: [T, H, h]    k, v: [T, K, h]     rotated here, if there is a rotation; H is a multiple of K
    pool: [P, 2, K, page_size, h]       keys at [:, 0], values at [:, 1]

Who computes follows from how the queries are given:

    Tiles    XLA: N tiles of T / N consecutive queries of one sequence; page_table i32[N, W]
    Decodes  Pallas: every query its own sequence; page_table i32[T, W]
    Chunks   Pallas: packed chunks of prompts; page_table i32[C, W] and blocks of queries
    Whole    jax's own: rows of whole sequences, which need no pool and leave it as it is; the only
             one that can be differentiated

Position j lies in page page_table[n, j // page_size]. A position < 0 is padding, whose output is
unspecified, and finite but for chunks. The bias follows transformers' Falcon: added before scaling,
rounded to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.decode_triton import paged_decode_fused
from pallas_kernels.paged_attention.enter_triton import paged_enter
from pallas_kernels.paged_attention.extend_triton import QueryBlocks, paged_extend_fused
from pallas_kernels.paged_attention.whole import Kernels, whole_attention

__all__ = [
    "AttentionSpec",
    "Chunks",
    "Decodes",
    "Packed",
    "Places",
    "Queries",
    "QueryBlocks",
    "Rotation",
    "Tiles",
    "Whole",
    "attention",
    "fused_attention",
    "rotate",
]


@dataclass(frozen=True)
class AttentionSpec:
    """What does not change from step to step."""

    scale: float
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None


class Rotation(NamedTuple):
    """cos and sin of every token's angles, f32[T, h / 2]. Su et al. 2021, arXiv:2104.09864."""

    cos: jax.Array
    sin: jax.Array


class Places(NamedTuple):
    """Where each token's key and value go: i32[T] each. Padding goes to page 0, nobody's."""

    pages: jax.Array
    offsets: jax.Array


class Tiles(NamedTuple):
    page_table: jax.Array
    positions: jax.Array  # i32[N, T / N]


class Decodes(NamedTuple):
    page_table: jax.Array
    positions: jax.Array  # i32[T]
    interpret: bool = False


class Chunks(NamedTuple):
    page_table: jax.Array
    blocks: QueryBlocks
    interpret: bool = False


class Whole(NamedTuple):
    segments: jax.Array  # i32[B, T]: tokens of a row with one number are one sequence
    positions: jax.Array  # i32[B, T], in the sequence
    kernels: Kernels = "xla"


Packed = Decodes | Chunks
Queries = Tiles | Packed | Whole


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rotation: Rotation | None,
    pool: jax.Array,
    places: Places,
    queries: Queries,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """([T, H, h] in q's dtype, the pool with the step's keys and values)."""
    if isinstance(queries, Packed):
        qkv = jnp.concatenate([q, k, v], axis=1)
        return fused_attention(qkv, rotation, pool, places, queries, spec)
    q, k = rotate(q, rotation), rotate(k, rotation)
    if isinstance(queries, Whole):
        segments, positions, kernels = queries
        out = whole_attention(q, k, v, segments, positions, kernels=kernels, **vars(spec))
        return out, pool
    pool = pool.at[places.pages, :, :, places.offsets].set(
        jnp.stack([k, v], axis=1).astype(pool.dtype)
    )
    out = xla.paged_attention(
        q.reshape(*queries.positions.shape, *q.shape[1:]), pool, *queries, **vars(spec)
    )
    return out.reshape(q.shape), pool


def fused_attention(
    qkv: jax.Array,
    rotation: Rotation | None,
    pool: jax.Array,
    places: Places,
    queries: Packed,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """``attention`` by Pallas; qkv: [T, H + 2 K, h], as one product leaves them."""
    interpret = queries.interpret
    if isinstance(queries, Decodes):
        table, positions, _ = queries
        return paged_decode_fused(
            qkv, rotation, pool, table, positions, interpret=interpret, **vars(spec)
        )
    pool = paged_enter(qkv, rotation, pool, *places, interpret=interpret)
    table, blocks, _ = queries
    out = paged_extend_fused(qkv, rotation, pool, table, blocks, interpret=interpret, **vars(spec))
    return out, pool


def rotate(x: jax.Array, rotation: Rotation | None) -> jax.Array:
    """x: [T, heads, h] -> the same, rotated in halves; as it is without a rotation (ALiBi)."""
    if rotation is None:
        return x
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (part[:, None, :] for part in rotation)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
