"""Paged attention the slow, plain way: gather everything, one softmax. The oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    q_positions: jax.Array,
    *,
    scale: float,
    window: int | None,
    alibi_slopes: tuple[float, ...] | None,
) -> jax.Array:
    """As ``api.paged_attention``."""
    num_heads, num_kv = q.shape[2], pool.shape[2]
    gathered = pool[page_table]  # [N, W, 2, K, page_size, h]
    keys, values = (
        jnp.repeat(
            gathered[:, :, i].transpose(0, 1, 3, 2, 4).reshape(q.shape[0], -1, num_kv, q.shape[3]),
            num_heads // num_kv,
            axis=2,
        )
        for i in (0, 1)
    )
    scores = jnp.einsum("nqhd,nshd->nhqs", q, keys).astype(jnp.float32)
    positions = jnp.arange(keys.shape[1])
    if alibi_slopes is not None:
        slopes = jnp.asarray(alibi_slopes, jnp.bfloat16)[:, None, None]
        scores += (slopes * positions.astype(jnp.bfloat16)).astype(jnp.float32)
    visible = positions <= q_positions[:, None, :, None]
    if window is not None:
        visible &= positions > q_positions[:, None, :, None] - window
    weights = jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf), axis=-1)
    weights = jnp.where(visible.any(-1, keepdims=True), weights, 0.0)
    return jnp.einsum("nhqs,nshd->nqhd", weights, values).astype(q.dtype)
