"""Matrix products of few rows, bound by reading the weight, and what follows them in a layer.

    matmul                  y = x @ w
    matmul_swiglu           y = swiglu(x @ w + delta)                  swiglu(g | u) = silu(g) * u
    matmul_add_norm         r' = r + (x @ w + delta);  y = norm(r')    in two launches
    swiglu_matmul_add_norm  the same for x = swiglu(gate | up)
    split_matmul, reduce_add_norm    the two launches by themselves, where a LoRA contribution is
                            computed beside the first and added in the second

    x: [T, K]    w: [K, N], row-major    r, delta: [T, N]    products summed in f32

A product is rounded to x's dtype before delta or residual are added, and each sum is rounded, as in
the models' layers. ``implementation`` says who computes; "pallas" leaves to XLA what
``tuning.choose`` leaves to it on this ``device_kind``, and "pallas_interpret" runs the same kernels
on a CPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.skinny_matmul import pallas_triton, reference, tuning, xla
from pallas_kernels.skinny_matmul.operands import Norm, swiglu

__all__ = [
    "Implementation",
    "Norm",
    "matmul",
    "matmul_add_norm",
    "matmul_swiglu",
    "reduce_add_norm",
    "split_matmul",
    "swiglu_matmul_add_norm",
]

Implementation = Literal["reference", "xla", "pallas", "pallas_interpret"]


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    implementation: Implementation,
    transposed: bool = False,
    out_dtype: jnp.dtype | None = None,
    device_kind: str = tuning.H100,
) -> jax.Array:
    """[T, N] of ``out_dtype`` (x's by default). ``transposed``: w is [N, K], as a head's [V, D]."""
    k, n = w.shape[::-1] if transposed else w.shape
    tile = _tile("matmul", implementation, device_kind, x, (k, n))
    if tile is None:
        return _plain(implementation).matmul(x, w, transposed=transposed, out_dtype=out_dtype)
    return pallas_triton.matmul(
        x,
        w,
        tile,
        transposed=transposed,
        out_dtype=out_dtype,
        interpret=implementation == "pallas_interpret",
    )


def matmul_swiglu(
    x: jax.Array,
    w: jax.Array,
    delta: jax.Array | None = None,
    *,
    implementation: Implementation,
    device_kind: str = tuning.H100,
) -> jax.Array:
    """[T, F] of w [K, 2 F], gate's columns before up's; delta: [T, 2 F]."""
    k, n = w.shape
    tile = _tile("matmul_swiglu", implementation, device_kind, x, (k, n // 2))
    if tile is None:
        return _plain(implementation).matmul_swiglu(x, w, delta)
    interpret = implementation == "pallas_interpret"
    return pallas_triton.matmul_swiglu(x, w, tile, delta, interpret=interpret)


def split_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    implementation: Implementation,
    device_kind: str = tuning.H100,
) -> jax.Array:
    """f32[splits, T, N], whose sum over the splits is x @ w. For ``reduce_add_norm`` alone.

    Its kernel lets the next one begin early, which only a kernel of Triton's may (see
    ``pallas_triton``).
    """
    tile = _tile("split_matmul", implementation, device_kind, x, w.shape)
    if tile is None:
        return _plain(implementation).split_matmul(x, w)
    interpret = implementation == "pallas_interpret"
    return pallas_triton.split_matmul(x, w, tile, early=True, interpret=interpret)


def reduce_add_norm(
    partials: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
    *,
    implementation: Implementation,
    next_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(residual + (sum of the partials + delta), its norm), both [T, N] of residual's dtype.

    ``next_weight`` [K, N] is a hint: its first rows are read into L2 meanwhile.
    """
    if implementation in ("reference", "xla"):
        return _plain(implementation).reduce_add_norm(partials, residual, norm, delta)
    interpret = implementation == "pallas_interpret"
    return pallas_triton.reduce_add_norm(
        partials, residual, norm, delta, next_weight=next_weight, interpret=interpret
    )


def matmul_add_norm(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
    *,
    implementation: Implementation,
    device_kind: str = tuning.H100,
    next_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(residual + (x @ w + delta), its norm): the layer's residual stream and the next input."""
    if _tile("split_matmul", implementation, device_kind, x, w.shape) is None:
        return _plain(implementation).matmul_add_norm(x, w, residual, norm, delta)
    partials = split_matmul(x, w, implementation=implementation, device_kind=device_kind)
    return reduce_add_norm(
        partials, residual, norm, delta, implementation=implementation, next_weight=next_weight
    )


def swiglu_matmul_add_norm(
    gate_up: jax.Array,
    w: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
    *,
    implementation: Implementation,
    device_kind: str = tuning.H100,
    next_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same of x = swiglu(gate | up); gate_up: [T, 2 K].

    Where the tuning finds that computing x in every column of tiles costs more than a launch, XLA
    computes it first.
    """
    if implementation in ("reference", "xla"):
        return _plain(implementation).swiglu_matmul_add_norm(gate_up, w, residual, norm, delta)
    tile = _tile("swiglu_split_matmul", implementation, device_kind, gate_up, w.shape)
    if tile is None:
        x = swiglu(*jnp.split(gate_up, 2, axis=-1))
        return matmul_add_norm(
            x,
            w,
            residual,
            norm,
            delta,
            implementation=implementation,
            device_kind=device_kind,
            next_weight=next_weight,
        )
    interpret = implementation == "pallas_interpret"
    partials = pallas_triton.split_matmul(
        gate_up, w, tile, activated=True, early=True, interpret=interpret
    )
    return reduce_add_norm(
        partials, residual, norm, delta, implementation=implementation, next_weight=next_weight
    )


def _tile(
    op: tuning.Op,
    implementation: Implementation,
    device_kind: str,
    x: jax.Array,
    weight: tuple[int, ...],
) -> tuning.Tile | None:
    """How to cut the product with a weight [K, N]; None: not with a kernel of ours."""
    if implementation in ("reference", "xla"):
        return None
    k, n = weight
    choice = tuning.choose(op, device_kind, x.shape[0], k, n, x.dtype.itemsize)
    return None if choice == tuning.XLA else choice


def _plain(implementation: Implementation) -> ModuleType:
    return reference if implementation == "reference" else xla
