"""The pieces that architectures share: sites, norms, rotary embedding, attention over pages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jlorax.models.config import Rope
from jlorax.models.lora import LoraBatch
from pallas_kernels.paged_attention.api import AttentionSpec, paged_attention


class TokenBatch(NamedTuple):
    """One step's tokens, packed. T tokens in N attention tiles of T / N tokens.

    A padded token has position -1 and writes to page 0, which no sequence owns.
    """

    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rope_lengths: jax.Array  # i32[T]: the length that dynamic RoPE scales by
    kv_pages: jax.Array  # i32[T]: where the token's keys and values go
    kv_offsets: jax.Array  # i32[T]
    page_table: jax.Array  # i32[N, W]


class Rotation(NamedTuple):
    """cos and sin of every token's angles, f32[T, 1, head_dim / 2]; made once a step."""

    cos: jax.Array
    sin: jax.Array


class Site(nnx.Module):
    """Projections of one input, as one matrix product: y_i = x @ W_i (+ b_i) + LoRA_i."""

    def __init__(
        self, names: tuple[str, ...], d_in: int, d_out: tuple[int, ...], bias: bool, dtype: str
    ) -> None:
        self.names = names
        self.d_out = d_out
        self.weight = nnx.Param(jnp.zeros((d_in, sum(d_out)), dtype))
        self.bias = nnx.Param(jnp.zeros((sum(d_out),), dtype)) if bias else None

    def __call__(self, x: jax.Array, lora: LoraBatch | None, layer: int) -> tuple[jax.Array, ...]:
        """x: [T, d_in] -> one [T, d_out_i] per projection."""
        y = x @ self.weight[...]
        if self.bias is not None:
            y += self.bias[...]
        ends = [sum(self.d_out[: i + 1]) for i in range(len(self.d_out) - 1)]
        parts = tuple(jnp.split(y, ends, axis=-1))
        return parts if lora is None else lora.add(parts, x, self.names, layer)


class Embedding(nnx.Module):
    """Token embedding [V, D], and the head's weight when the model ties them."""

    def __init__(self, vocab_size: int, d_model: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, d_model), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]


class Head(nnx.Module):
    """lm_head: logits in f32, [B, D] -> [B, V]. ``weight`` [V, D] as in the files."""

    def __init__(self, vocab_size: int, d_model: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, d_model), dtype))


def head_logits(x: jax.Array, weight: jax.Array, lora: LoraBatch | None) -> jax.Array:
    """f32[B, V]. The adapter's share is computed from the head's own input, tied or not."""
    logits = jnp.einsum("bd,vd->bv", x, weight, preferred_element_type=jnp.float32)
    return logits if lora is None else lora.add([logits], x, ("lm_head",), 0)[0]


class RMSNorm(nnx.Module):
    """x / rms(x) * w, in f32. Zhang and Sennrich, 2019, arXiv:1910.07467."""

    def __init__(self, width: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight[...]


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * w + b, in f32."""

    def __init__(self, width: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...] + self.bias[...]).astype(x.dtype)


def rotation(rope: Rope, batch: TokenBatch) -> Rotation:
    """Angles of every token of the step. Su et al. 2021, arXiv:2104.09864 (half-split form)."""
    inv_freq = _frequencies(rope, batch.rope_lengths)
    angles = jnp.maximum(batch.positions, 0)[:, None].astype(jnp.float32) * inv_freq
    angles = angles[:, None, :]
    return Rotation(
        jnp.cos(angles) * rope.attention_scaling, jnp.sin(angles) * rope.attention_scaling
    )


def _frequencies(rope: Rope, lengths: jax.Array) -> jax.Array:
    """f32[1 or T, head_dim / 2]."""
    fixed = jnp.asarray(rope.inv_freq, jnp.float32)[None]
    if rope.dynamic is None:
        return fixed
    dim = 2 * len(rope.inv_freq)
    length = jnp.maximum(lengths, rope.dynamic.max_position).astype(jnp.float32)[:, None]
    factor = rope.dynamic.factor
    stretch = factor * length / rope.dynamic.max_position - (factor - 1)
    theta = rope.dynamic.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: jax.Array, rotation: Rotation | None) -> jax.Array:
    """x: [T, heads, head_dim] -> the same, rotated; as it is without a rotation (ALiBi)."""
    if rotation is None:
        return x
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    batch: TokenBatch,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Writes this step's keys and values to their pages, then attends over the pages.

    q: [T, H, h]   k, v: [T, K, h]   pool: [P, 2, K, page_size, h] -> ([T, H * h], pool)
    """
    pool = pool.at[batch.kv_pages, :, :, batch.kv_offsets].set(
        jnp.stack([k, v], axis=1).astype(pool.dtype)
    )
    num_tiles = batch.page_table.shape[0]
    tiles = q.reshape(num_tiles, -1, *q.shape[1:])
    positions = batch.positions.reshape(num_tiles, -1)
    out = paged_attention(tiles, pool, batch.page_table, positions, spec)
    return out.reshape(q.shape[0], -1), pool
