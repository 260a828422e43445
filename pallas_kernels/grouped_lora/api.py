"""Each row's own adapter, added to a site's output; a site is projections of one input.

For a row t of block b, and a projection's rank pages i in [0, num_pages[b]):

    y[t] += sum_i ((x[t] @ A[a_pages[b, i]]^T) * scale[b]) @ B[b_pages[b, i]]

    y: [T, sum of N_i]            the projections' outputs side by side; summed in f32
    x: [T, D]
    a_pool: [P, L, 8, D]          rank pages (8 columns of rank, every layer) of width D
    b_pools: [P, L, 8, N_i]       rank pages of width N_i
    tables: i32[NB, Q, 2, W]      pages of A, of B; W even, entries past a rank name the zero page
    num_pages: i32[NB, Q]         0 costs nothing
    scale: f32[NB, Q, L]          alpha / rank (rsLoRA: alpha / sqrt(rank))

"xla" takes NB blocks of T / NB consecutive rows, "pallas" the blocks that the host lists
(``RowBlocks``); "pallas_interpret" runs the same kernels on a CPU.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_lora import pallas_triton, xla
from pallas_kernels.grouped_lora.operands import BLOCK_ROWS, RowBlocks, SitePages

__all__ = ["BLOCK_ROWS", "Implementation", "RowBlocks", "SitePages", "grouped_lora"]

Implementation = Literal["xla", "pallas", "pallas_interpret"]


def grouped_lora(
    y: jax.Array,
    x: jax.Array,
    site: SitePages,
    blocks: RowBlocks | None,
    layer: int,
    *,
    block_rows: int = BLOCK_ROWS,
    early: bool = False,
    implementation: Implementation,
) -> jax.Array:
    """y with the rows' adapters added: [T, sum of N_i] in y's dtype.

    ``early``: what reads y next is a Triton kernel, which may then take its place already.
    """
    if implementation == "xla":
        widths = [pool.shape[-1] for pool in site.b_pools]
        parts = jnp.split(y, list(accumulate(widths))[:-1], axis=-1)
        pages = [site.projection(i, layer) for i in range(len(widths))]
        added = [xla.grouped_lora(part, x, p, layer) for part, p in zip(parts, pages, strict=True)]
        return jnp.concatenate(added, axis=-1)
    assert blocks is not None
    return pallas_triton.grouped_lora(
        y,
        x,
        site,
        blocks,
        layer,
        block_rows=block_rows,
        early=early,
        interpret=implementation == "pallas_interpret",
    )
