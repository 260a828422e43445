"""Grouped LoRA in plain XLA: gathers two rank pages a block and turn, as many turns as needed.

The trip count follows the largest rank of the step, so rank 8 to 16 is one turn and a step without
adapters is none: a loop that does not run costs about a microsecond on two cores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_lora.operands import ProjectionPages

_PAGES_PER_TURN = 2
_GATHER_BYTES = 4 << 20  # more than this at once, and blocks are taken one by one


def grouped_lora(y: jax.Array, x: jax.Array, projection: ProjectionPages, layer: int) -> jax.Array:
    """As ``api.grouped_lora`` for one projection: [T, N] in y's dtype.

    The loop starts from y itself: from zeros, XLA would hold a buffer of them for every layer.
    """
    num_blocks, width = projection.a_pages.shape[0], y.shape[-1]
    blocks = x.reshape(num_blocks, -1, x.shape[-1])
    start = y.reshape(num_blocks, -1, width).astype(jnp.float32)
    wide = num_blocks * _PAGES_PER_TURN * 8 * width * x.dtype.itemsize > _GATHER_BYTES
    add = _add_one_by_one if wide else _add
    return add(start, blocks, projection, layer).reshape(y.shape).astype(y.dtype)


def _add(start: jax.Array, blocks: jax.Array, projection: ProjectionPages, layer: int) -> jax.Array:
    """start: f32[NB, M, N]   blocks: [NB, M, D] -> f32[NB, M, N]."""

    def turn(i: jax.Array, total: jax.Array) -> jax.Array:
        shrink = _gather(projection.a_pool, projection.a_pages, i, layer)
        expand = _gather(projection.b_pool, projection.b_pages, i, layer)
        inner = jnp.einsum("bmd,brd->bmr", blocks, shrink, preferred_element_type=jnp.float32)
        inner = (inner * projection.scale[:, None, None]).astype(blocks.dtype)
        return total + jnp.einsum("bmr,brn->bmn", inner, expand, preferred_element_type=jnp.float32)

    turns = (projection.num_pages + _PAGES_PER_TURN - 1) // _PAGES_PER_TURN
    return lax.fori_loop(0, turns, turn, start)


def _add_one_by_one(
    start: jax.Array, blocks: jax.Array, projection: ProjectionPages, layer: int
) -> jax.Array:
    """The same with one block's pages at a time: the head's are 49,152 wide and more."""

    def visit(b: jax.Array, total: jax.Array) -> jax.Array:
        def only(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, b, 1)

        block = projection._replace(
            a_pages=only(projection.a_pages),
            b_pages=only(projection.b_pages),
            scale=only(projection.scale),
        )
        added = _add(only(total), only(blocks), block, layer)
        return lax.dynamic_update_slice_in_dim(total, added, b, axis=0)

    visits = jnp.where(projection.num_pages > 0, blocks.shape[0], 0)
    return lax.fori_loop(0, visits, visit, start)


def _gather(pool: jax.Array, pages: jax.Array, turn: jax.Array, layer: int) -> jax.Array:
    """[NB, 16, width]: this turn's two pages of every block, at one layer."""
    here = lax.dynamic_slice_in_dim(pages, turn * _PAGES_PER_TURN, _PAGES_PER_TURN, axis=1)
    return pool[here, layer].reshape(pages.shape[0], -1, pool.shape[-1])
