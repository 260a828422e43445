"""An op for the kernels' benchmark: right, wrong and broken contestants, tiny, on any device."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.kernels.protocol import Built, Contestant, KernelCase

LAYERS = 2


def cases() -> list[KernelCase]:
    return [
        KernelCase("fake", "small", 1.0, 2.0, lambda: _built(8)),
        KernelCase("fake", "cannot be built", 1.0, None, _unbuildable),
        KernelCase("fake", "large", 1.0, None, lambda: _built(16)),
    ]


def sweep() -> list[KernelCase]:
    return [KernelCase("fake", "small", 1.0, 2.0, lambda: _candidates(8))]


def _unbuildable() -> Built:
    raise MemoryError("no room for\nthis case")


def _built(size: int) -> Built:
    x = jnp.arange(float(size * size)).reshape(size, size) / (size * size)
    weights = tuple(x + i for i in range(LAYERS))
    contestants = (
        _matmul("ours", x, weights),
        Contestant("in place", LAYERS, _in_place, (x, weights), (0,), lambda: x @ x),
        _matmul("inexact", x, weights, once=lambda: x @ x * 1.5),
        _matmul("not a number", x, weights, once=lambda: x @ x * jnp.nan),
        _matmul("misshapen", x, weights, once=lambda: (x @ x)[:1]),
        Contestant("broken", LAYERS, _broken, (x,)),
        Contestant("empty", LAYERS, lambda x: x, (x,)),
    )
    return Built(contestants, wanted=x @ x)


def _candidates(size: int) -> Built:
    x = jnp.ones((size, size))
    names = ("Tuning(tile=8)", "Tuning(tile=16)")
    made = tuple(_matmul(name, x, (x,) * LAYERS) for name in names)
    return Built((*made, Contestant("Tuning(tile=0)", LAYERS, _broken, (x,))), wanted=x @ x)


def _matmul(
    name: str,
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    once: Callable[[], jax.Array] | None = None,
) -> Contestant:
    return Contestant(name, LAYERS, _chain, (x, weights), once=once or (lambda: x @ x))


def _chain(x: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
    for w in weights:
        x = x @ w
    return x


def _in_place(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """What it donates comes back second."""
    return _chain(x, weights)[0], x + 1


def _broken(x: jax.Array) -> jax.Array:
    raise ValueError("tile is 0")
