"""Small pieces that the kernels in Pallas' Triton dialect share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The whole operand as one block: a pointer, which programs index by themselves."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def precision(x: jax.Array) -> lax.Precision:
    """f32 in IEEE arithmetic, never TF32; bf16 products are exact either way."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def cdiv(a: jax.Array, b: int) -> jax.Array:
    """ceil(a / b) for a >= 0; ``//`` would spend instructions on signs."""
    return lax.div(a + jnp.int32(b - 1), jnp.int32(b))


def bf16(x: jax.Array) -> jax.Array:
    """f32 rounded to bf16, to even; a cast there and back a compiler is free to leave out."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = lax.shift_right_logical(bits, jnp.uint32(16)) & jnp.uint32(1)
    rounded = (bits + jnp.uint32(0x7FFF) + odd) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(rounded, jnp.float32)


def rotated(
    ref: Any, index: tuple[jax.Array, ...], mask: jax.Array, head_dim: int, angles: Sequence[Any]
) -> jax.Array:
    """A block of q or k from ref [T, heads, h] after the rotation in halves, in its own dtype.

    ``index``: (token, head, column), broadcast against each other; ``angles``: references of cos
    and sin, f32[T, h / 2], or none: the block is as it is. Rounded once, at the end.
    """
    x = pltriton.load(ref.at[index], mask=mask, other=0.0)
    if not angles:
        return x
    token, head, columns = index
    half = head_dim // 2
    left = columns < half
    partner = jnp.where(left, columns + half, columns - half)
    other = pltriton.load(ref.at[token, head, partner], mask=mask, other=0.0).astype(jnp.float32)
    angle = jnp.where(left, columns, columns - half)
    cos, sin = (pltriton.load(part.at[token, angle], mask=mask, other=0.0) for part in angles)
    turned = x.astype(jnp.float32) * cos + other * jnp.where(left, -sin, sin)
    return turned.astype(x.dtype)


def let_the_next_kernel_start(index: jax.Array) -> jax.Array:
    """Its programs may take their places now; they wait at their start until this grid is done.

    XLA begins every kernel with ``griddepcontrol.wait`` and joins them by programmatic edges
    (xla/backends/gpu/codegen/emitters/transforms/insert_pdl_ops.cc), so this hides its launch.
    Only for a reader that is a Triton kernel, whose loads stay behind its wait: XLA's own kernels
    may load through the read-only path, which the compiler is free to move before it.
    """
    [same] = pltriton.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[jnp.full((1,), index)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), index.dtype)],
    )
    return jnp.sum(same)  # a scalar again: through a block, what is known of its indices is lost
