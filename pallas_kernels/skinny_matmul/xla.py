"""The skinny matmuls in plain XLA: the same functions, as the models write them without kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.skinny_matmul.operands import Norm, normalise, precision, swiglu


def matmul(
    x: jax.Array, w: jax.Array, *, transposed: bool = False, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """As ``api.matmul``."""
    form = "tk,nk->tn" if transposed else "tk,kn->tn"
    wanted = out_dtype or x.dtype
    return jnp.einsum(form, x, w, precision=precision(x.dtype), preferred_element_type=wanted)


def matmul_swiglu(x: jax.Array, w: jax.Array, delta: jax.Array | None = None) -> jax.Array:
    """As ``api.matmul_swiglu``."""
    gate_up = matmul(x, w) if delta is None else matmul(x, w) + delta
    return swiglu(*jnp.split(gate_up, 2, axis=-1))


def split_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """As ``api.split_matmul``, in one part."""
    return matmul(x, w, out_dtype=jnp.dtype(jnp.float32))[None]


def reduce_add_norm(
    partials: jax.Array, residual: jax.Array, norm: Norm, delta: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As ``api.reduce_add_norm``."""
    product = jnp.sum(partials, axis=0).astype(residual.dtype)
    return _add_norm(product, residual, norm, delta)


def matmul_add_norm(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.matmul_add_norm``."""
    return _add_norm(matmul(x, w), residual, norm, delta)


def swiglu_matmul_add_norm(
    gate_up: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.swiglu_matmul_add_norm``."""
    return matmul_add_norm(swiglu(*jnp.split(gate_up, 2, axis=-1)), w, residual, norm, delta)


def _add_norm(
    product: jax.Array, residual: jax.Array, norm: Norm, delta: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    total = residual + (product if delta is None else product + delta)
    return total, normalise(total, norm, total.shape[-1])
