"""What one op's benchmark offers: cases, each with several implementations of the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

READ_TB_PER_S = 3.11  # an H100's own read rate, as measured by a plain reduction
BF16_TFLOP_PER_S = 790.0  # an 8192-cubed matrix product


@dataclass(frozen=True)
class Contestant:
    """One implementation. ``chain`` does ``num_layers`` calls, each needing the one before it and
    reading data of its own, so that nothing is found in the L2 cache; it is jitted by the harness.

    ``once`` computes the case's checked output by the same implementation, or is None.
    """

    name: str
    num_layers: int
    chain: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    once: Callable[[], jax.Array] | None = None


Step = Callable[[jax.Array, Any], jax.Array]  # (queries, a layer's operands) -> the next's queries


def layer_by_layer(name: str, step: Step, q: jax.Array, layers: tuple[Any, ...]) -> Contestant:
    """What one layer's attention gives is what the next one asks."""
    one = jax.jit(step)  # traced and lowered once for all layers

    def chain(q: jax.Array, layers: tuple[Any, ...]) -> jax.Array:
        for layer in layers:
            q = one(q, layer)
        return q

    return Contestant(
        name, len(layers), chain, (q, layers), donate=(0,), once=lambda: one(q, layers[0])
    )


@dataclass(frozen=True)
class Built:
    """A case's arrays and contestants, on the device."""

    contestants: tuple[Contestant, ...]
    wanted: jax.Array | None = None  # f32, what ``once`` must give
    tolerance: float = 2e-2  # of the largest, for bf16 operands


@dataclass(frozen=True)
class KernelCase:
    """``floor_us``: the bytes that one call must move, or its arithmetic, at the card's rates."""

    op: str
    name: str
    floor_us: float
    target_us: float | None
    build: Callable[[], Built]
