"""Grouped LoRA on a GPU: shrink and expand, in Pallas' Triton dialect.

A decode step reads every distinct adapter once and computes next to nothing with it; a prefill
reads x and writes y, and adapters come from the L2 cache. Both are streams from memory.

    shrink   h[s, t] = x[t, D_s] @ A[:, D_s]^T     partial sums, f32, over each split D_s of D
             program (split, lane, block): the pages of rank that the block's adapter has in the
             whole site, laid end to end and cut into tiles:   | q0 q1 | k0 v0 | v1 -- |

    expand   y[t] += (scale * sum_s h[s, t]) @ B   program (columns, block): one output's columns

Shrink needs x alone, so that it runs beside the base model's matrix product; only expand is on the
way of a step. How much a program reads is decided by its adapter's true rank and targets, in the
kernel. The cut in two is S-LoRA's and Punica's (Sheng et al., 2023, arXiv:2311.03285; Chen et al.,
2023, arXiv:2310.18547), who launch it for every projection and pad the rank.

A page that an adapter does not have, a row beyond a block and a column beyond a matrix are masked,
never read: what a stranger left there cannot enter a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_lora.expand_triton import expand
from pallas_kernels.grouped_lora.operands import BLOCK_ROWS, RowBlocks, SitePages
from pallas_kernels.grouped_lora.shrink_triton import shrink
from pallas_kernels.grouped_lora.triton_parts import PAGE, Cut
from pallas_kernels.grouped_lora.tuning import Tuning, TuningKey, choose


def grouped_lora(
    y: jax.Array,
    x: jax.Array,
    site: SitePages,
    blocks: RowBlocks,
    layer: int,
    *,
    block_rows: int = BLOCK_ROWS,
    early: bool = False,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """y[t, N_i] += scale_i[b] * (x[t] @ A_i[b]^T) @ B_i[b], in place, for the rows t of block b.

    y: [T, sum of N_i]   the site's outputs side by side, bf16 or f32
    x: [T, D]            the pools' dtype, bf16 or f32
    site, blocks         see ``operands``; no block has more than ``block_rows`` rows (16 or a
                         larger power of two), no two blocks share a row
    early                as ``let_the_next_kernel_start``; its condition is the caller's to keep

    Sums in f32, h rounded to x's dtype between the two products; f32 products in IEEE precision.
    """
    widths = tuple(pool.shape[-1] for pool in site.b_pools)
    table_width = site.tables.shape[-1]
    (num_tokens, d_in), max_rank = x.shape, table_width * PAGE
    if tuning is None:
        kind, itemsize = jax.devices()[0].device_kind, x.dtype.itemsize
        key = TuningKey(kind, itemsize, num_tokens, block_rows, d_in, max_rank, widths)
        tuning = choose(key)
    pools, pool_of = _distinct(site.b_pools)
    cut = Cut(block_rows, d_in, widths, pool_of, site.rows, table_width, tuning, early, interpret)
    layer_operand = jnp.asarray(np.array([layer], np.int32))
    common = site.tables, site.num_pages, blocks.first, blocks.count, layer_operand
    inner = shrink(cut, x, site.a_pool, *common)
    return expand(cut, y, inner, pools, site.scale, *common)


def _distinct(pools: Sequence[jax.Array]) -> tuple[list[jax.Array], tuple[int, ...]]:
    """The pools, each once, and which of them every output has."""
    once = list({id(pool): pool for pool in pools}.values())
    ids = [id(pool) for pool in once]
    return once, tuple(ids.index(id(pool)) for pool in pools)
