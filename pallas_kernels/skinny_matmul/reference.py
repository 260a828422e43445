"""The skinny matmuls the slow, plain way: f32 throughout, rounded where the model rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.skinny_matmul.operands import Norm


def matmul(
    x: jax.Array, w: jax.Array, *, transposed: bool = False, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """As ``api.matmul``."""
    return _product(x, w.T if transposed else w).astype(out_dtype or x.dtype)


def matmul_swiglu(x: jax.Array, w: jax.Array, delta: jax.Array | None = None) -> jax.Array:
    """As ``api.matmul_swiglu``."""
    gate_up = _product(x, w).astype(x.dtype)
    return _swiglu(gate_up if delta is None else _add(gate_up, delta))


def split_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """As ``api.split_matmul``, in one part."""
    return _product(x, w)[None]


def reduce_add_norm(
    partials: jax.Array, residual: jax.Array, norm: Norm, delta: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As ``api.reduce_add_norm``."""
    product = jnp.sum(partials, axis=0).astype(residual.dtype)
    total = _add(residual, product if delta is None else _add(product, delta))
    return total, _normed(total, norm)


def matmul_add_norm(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.matmul_add_norm``."""
    return reduce_add_norm(split_matmul(x, w), residual, norm, delta)


def swiglu_matmul_add_norm(
    gate_up: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.swiglu_matmul_add_norm``."""
    return matmul_add_norm(_swiglu(gate_up), w, residual, norm, delta)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


def _swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    silu = (gate * jax.nn.sigmoid(gate)).astype(gate_up.dtype).astype(jnp.float32)
    return (silu * up).astype(gate_up.dtype)


def _normed(x: jax.Array, norm: Norm) -> jax.Array:
    wide = x.astype(jnp.float32)
    weight = norm.weight.astype(jnp.float32)
    if norm.kind == "rms":
        unit = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.eps)
        return (unit.astype(x.dtype).astype(jnp.float32) * weight).astype(x.dtype)
    assert norm.bias is not None
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    unit = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + norm.eps)
    return (unit * weight + norm.bias.astype(jnp.float32)).astype(x.dtype)
