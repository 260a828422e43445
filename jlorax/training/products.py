"""Products with the frozen weights, which may be narrower than what they are multiplied with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def frozen_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x @ weight, [T, d_in] and [d_in, d_out], in x's dtype; the weight gets no gradient.

    A narrower weight makes x narrow for the product, which is summed in float32: a CPU multiplies
    bfloat16 three times as fast as float32 (AVX512-BF16, AMX), but only where XLA is not asked for
    a result in bfloat16, and everything between the products is faster in float32.
    """
    if weight.dtype == x.dtype:
        return x @ weight
    narrow = x.astype(weight.dtype)
    return jnp.matmul(narrow, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return frozen_product(x, weight), weight


def _backward(weight: jax.Array, slope: jax.Array) -> tuple[jax.Array, None]:
    return frozen_product(slope, weight.T), None


frozen_product.defvjp(_forward, _backward)
