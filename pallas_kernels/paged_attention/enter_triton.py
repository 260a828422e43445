"""Enters a step's keys and values into the paged pool on a GPU, in Pallas' Triton dialect.

XLA's scatter takes 530 us a layer for the 8192 tokens of Llama-2-7B whose bytes take 90: it writes
element by element. Here a program owns some tokens of one kv head and writes whole rows of a page.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_parts import rotated, whole

BLOCK_TOKENS = 32
_NUM_WARPS = 4


def paged_enter(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    pool: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The pool with k, rotated, and v of every token at [page, 0] and [page, 1] of its place.

    qkv: [T, H + 2 K, h]             heads of q, then k, then v, as one product leaves them
    rotation: (cos, sin), f32[T, h / 2], as in ``paged_decode_fused``; None: k stays as it is
    pool: [P, 2, K, page_size, h]    qkv's dtype; written in place when donated
    pages, offsets: i32[T]           page 0 is nobody's: padding, which is not written
    """
    operands = [pages, offsets, qkv, pool, *(rotation or ())]
    return _enter(interpret, *operands)


# The layers of a model are one function, traced and lowered once.
@partial(jax.jit, static_argnums=0)
def _enter(interpret: bool, *operands: jax.Array) -> jax.Array:
    pages, _, _, pool, *_ = operands
    return pl.pallas_call(
        _enter_kernel,
        # heads run fastest: programs of a wave share the rows of few tokens
        grid=(pool.shape[2], pl.cdiv(pages.shape[0], BLOCK_TOKENS)),
        in_specs=[whole(x.shape) for x in operands],
        out_specs=whole(pool.shape),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="paged_enter",
    )(*operands)


def _enter_kernel(pages_ref: Any, offsets_ref: Any, qkv_ref: Any, _: Any, *refs: Any) -> None:
    """Program (kv, block of tokens)."""
    *angles, pool_ref = refs
    kv, block = pl.program_id(0), pl.program_id(1)
    num_tokens, num_heads, head_dim = qkv_ref.shape
    num_kv = pool_ref.shape[2]
    tokens = block * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS)
    inside = tokens < num_tokens
    page = pltriton.load(pages_ref.at[tokens], mask=inside, other=0)
    offset = pltriton.load(offsets_ref.at[tokens], mask=inside, other=0)
    columns = jnp.arange(pl.next_power_of_2(head_dim))
    mask = (page > 0)[:, None] & (columns < head_dim)[None, :]

    def index(head: jax.Array) -> tuple[jax.Array, ...]:
        return tokens[:, None], head, columns[None, :]

    k_head = num_heads - 2 * num_kv + kv
    key = rotated(qkv_ref, index(k_head), mask, head_dim, angles)
    value = pltriton.load(qkv_ref.at[index(k_head + num_kv)], mask=mask, other=0.0)
    for side, new in enumerate((key, value)):
        where = pool_ref.at[page[:, None], side, kv, offset[:, None], columns[None, :]]
        pltriton.store(where, new, mask=mask)
