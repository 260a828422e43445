"""Grouped LoRA the slow, plain way, in numpy and f64: every block and projection by itself."""

from __future__ import annotations

import jax
import numpy as np

from pallas_kernels.grouped_lora.operands import RowBlocks, SitePages


def grouped_lora(
    y: jax.Array, x: jax.Array, site: SitePages, blocks: RowBlocks, layer: int
) -> np.ndarray:
    """As ``pallas_triton.grouped_lora``: f64[T, sum of N_i]."""
    out, wide_x = np.array(y, np.float64), np.asarray(x, np.float64)
    for b, (first, count) in enumerate(zip(blocks.first, blocks.count, strict=True)):
        first, count = int(first), int(count)
        rows, start = slice(first, first + count), 0
        for b_pool, row in zip(site.b_pools, site.rows, strict=True):
            num_pages = site.num_pages[b, row]
            a, expand = (
                np.asarray(pool[site.tables[b, row, side, :num_pages], layer], np.float64)
                for side, pool in enumerate((site.a_pool, b_pool))
            )
            inner = wide_x[rows] @ a.reshape(-1, a.shape[-1]).T * float(site.scale[b, row, layer])
            width = b_pool.shape[-1]
            out[rows, start : start + width] += inner @ expand.reshape(-1, width)
            start += width
    return out
