"""Grouped LoRA the slow, plain way: every block by itself, every page. The oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_lora.operands import ProjectionPages


def grouped_lora(y: jax.Array, x: jax.Array, projection: ProjectionPages, layer: int) -> jax.Array:
    """As ``api.grouped_lora`` for one projection: [T, N] in y's dtype."""
    num_blocks = projection.a_pages.shape[0]
    rows = x.shape[0] // num_blocks
    deltas = []
    for b in range(num_blocks):
        a = projection.a_pool[projection.a_pages[b], layer].reshape(-1, x.shape[-1])
        n = projection.b_pool.shape[-1]
        expand = projection.b_pool[projection.b_pages[b], layer].reshape(-1, n)
        block = x[b * rows : (b + 1) * rows].astype(jnp.float32)
        inner = (block @ a.astype(jnp.float32).T) * projection.scale[b]
        deltas.append(inner @ expand.astype(jnp.float32))
    return (y.astype(jnp.float32) + jnp.concatenate(deltas)).astype(y.dtype)
