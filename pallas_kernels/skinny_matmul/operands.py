"""What every implementation of the skinny matmuls takes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Norm(NamedTuple):
    """The norm behind a residual sum. ``bias`` belongs to "layer" alone.

    rms: x / rms(x) * weight (Zhang and Sennrich, 2019, arXiv:1910.07467), rounded to x's dtype
    before the weight, as Llama does.
    layer: (x - mean(x)) / std(x) * weight + bias, rounded once.
    """

    kind: Literal["rms", "layer"]
    weight: jax.Array  # [N]
    eps: float
    bias: jax.Array | None = None  # [N]


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """f32 is multiplied as IEEE f32, not as TF32, the default on a GPU."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, both products rounded to the operands' dtype; in f32 between.

    Shazeer, 2020, arXiv:2002.05202.
    """
    wide = gate.astype(jnp.float32)
    return (wide / (1.0 + jnp.exp(-wide))).astype(gate.dtype) * up


def normalise(x: jax.Array, norm: Norm, width: int) -> jax.Array:
    """x: [..., >= width], 0 from ``width`` on -> the same, normed; as ``jlorax.models.layers`` do.

    ``norm``'s arrays are as wide as x. Written for kernels too, whose blocks are powers of two.
    """
    wide = x.astype(jnp.float32)
    if norm.kind == "rms":
        wide *= lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) / width + norm.eps)
        return wide.astype(x.dtype) * norm.weight
    wide -= jnp.sum(wide, axis=-1, keepdims=True) / width
    if x.shape[-1] != width:
        wide = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < width, wide, 0.0)
    wide *= lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) / width + norm.eps)
    assert norm.bias is not None, "a layer norm has a bias"
    return (wide * norm.weight + norm.bias).astype(x.dtype)
