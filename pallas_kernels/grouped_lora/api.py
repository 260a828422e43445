"""Each row's own adapter, added to a linear map's output.

For token t of block b = t // (T / NB), a projection's rank pages i in [0, num_pages):

    y[t] += sum_i ((x[t] @ A[a_pages[b, i]]^T) * scale[b]) @ B[b_pages[b, i]]

    y: [T, N]                     summed in f32
    x: [T, D]                     NB blocks of T / NB consecutive rows, one adapter each
    a_pool: [P, L, 8, D]          rank pages (8 columns of rank, every layer) of width D
    b_pool: [P, L, 8, N]          rank pages of width N
    a_pages, b_pages: i32[NB, W]  W even; entries past an adapter's rank name the zero page
    num_pages: i32[]              the most pages that any block of this step has: 0 costs nothing
    scale: f32[NB]                alpha / rank (rsLoRA: alpha / sqrt(rank)) of this layer
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pallas_kernels.grouped_lora import xla
from pallas_kernels.grouped_lora.operands import ProjectionPages

__all__ = ["ProjectionPages", "grouped_lora"]


def grouped_lora(
    ys: Sequence[jax.Array], x: jax.Array, projections: Sequence[ProjectionPages], layer: int
) -> tuple[jax.Array, ...]:
    """The outputs y_i of projections that share the input x (a site), with their adapters added."""
    return tuple(
        xla.grouped_lora(y, x, pages, layer) for y, pages in zip(ys, projections, strict=True)
    )
