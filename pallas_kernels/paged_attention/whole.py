"""Attention among whole sequences, without a pool: for training, where nothing is kept.

Differentiable. jax's own attention: cuDNN's kernels on a GPU (Dao et al. 2022, arXiv:2205.14135),
plain XLA elsewhere.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Kernels = Literal["xla", "cudnn"]


def whole_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None,
    alibi_slopes: tuple[float, ...] | None,
    kernels: Kernels,
) -> jax.Array:
    """q: [N, H, h], k and v: [N, K, h] with N = B * T, rotated -> [N, H, h].

    segments: i32[B, T]: tokens attend to those before them in their row's same segment.
    positions: i32[B, T]: of each token in its segment.
    """
    rows = segments.shape
    q, k, v = (x.reshape(*rows, *x.shape[1:]) for x in (q, k, v))
    mask = _visible(segments, window)
    bias = None if alibi_slopes is None else _alibi(alibi_slopes, positions, scale)
    if kernels == "xla":
        out = _by_heads(q, k, v, bias, mask, scale)
    else:
        out = jax.nn.dot_product_attention(
            q, k, v, bias, mask[:, None], scale=scale, is_causal=True, implementation=kernels
        )
    return out.reshape(-1, *out.shape[2:])


def _visible(segments: jax.Array, window: int | None) -> jax.Array:
    """bool[B, T, T]: whether a query (first T) sees a key."""
    places = jnp.arange(segments.shape[1])
    distance = places[:, None] - places
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (segments[:, :, None] == segments[:, None, :]) & near


def _by_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    scale: float,
) -> jax.Array:
    """A product a row and kv head, of contiguous operands: on a CPU half the time of jax's own
    form, which leaves the heads in the middle."""
    b, t, heads, width = q.shape
    kv, group = k.shape[2], heads // k.shape[2]
    q = q.reshape(b, t, kv, group, width).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(b, heads, t, t)
    if bias is not None:
        scores += bias
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    weights = weights.astype(v.dtype).reshape(b, kv, -1, t)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, v)
    return out.reshape(b, kv, group, t, width).transpose(0, 3, 1, 2, 4)


def _alibi(slopes: tuple[float, ...], positions: jax.Array, scale: float) -> jax.Array:
    """f32[B, H, 1, T], of the keys; rounded as transformers' Falcon rounds it."""
    steep = _bf16(jnp.asarray(slopes, jnp.float32))[:, None, None]
    return _bf16(steep * _bf16(positions[:, None, None, :].astype(jnp.float32))) * scale


def _bf16(x: jax.Array) -> jax.Array:
    """f32 rounded to bf16's precision; a cast there and back XLA is free to leave out."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
