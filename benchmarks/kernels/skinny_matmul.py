"""Skinny matmuls of Llama-2-7B: our kernels beside XLA's products in both layouts.

A chain passes from layer to layer through the real data where the shapes allow it (o and a whole
feed-forward network); elsewhere through one column of the output, which a small kernel adds to the
input. That kernel alone is the "empty chain".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernels.protocol import (
    BF16_TFLOP_PER_S,
    READ_TB_PER_S,
    Built,
    Contestant,
    KernelCase,
)
from benchmarks.kernels.results import EMPTY, OURS
from pallas_kernels.skinny_matmul import api, pallas_triton, reference, tuning, xla
from pallas_kernels.skinny_matmul.api import Implementation
from pallas_kernels.skinny_matmul.cases import MODELS, ROWS
from pallas_kernels.skinny_matmul.operands import Norm
from pallas_kernels.skinny_matmul.tuning import Op, Tile

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
LLAMA = MODELS["llama-2-7b"]
LEAST_BYTES = 1 << 30  # of weights in a chain: 20 times what L2 holds
EPS = 1e-5

Step = Callable[[Any, Any], Any]  # (state, a layer's weights) -> output, or the next state
Forms = Mapping[str, tuple[Step, tuple[Any, ...]]]  # name -> a step, and its weights by layer
_barrier: Callable[[Any], Any] = lax.optimization_barrier


@dataclass(frozen=True)
class Shape:
    """A weight [k, n] of the model, and what its product should take by rows, in microseconds."""

    name: str
    k: int
    n: int
    targets_us: Mapping[int, float]
    transposed: bool = False

    @property
    def num_layers(self) -> int:
        return max(4, -(-LEAST_BYTES // (2 * self.k * self.n)))

    def floor_us(self, rows: int) -> float:
        """Weights, x and y once through memory; or the arithmetic."""
        moved = 2 * (self.k * self.n + rows * (self.k + self.n))
        return max(
            moved / READ_TB_PER_S * 1e-6, 2 * rows * self.k * self.n / BF16_TFLOP_PER_S * 1e-6
        )


OUT = Shape("o", *LLAMA.out, {1: 13.0, 64: 14.0, 256: 20.0})
DOWN = Shape("down", *LLAMA.down, {1: 32.0, 64: 34.0, 256: 45.0})
QKV = Shape("qkv", *LLAMA.qkv, {})
GATE_UP = Shape("gate_up", *LLAMA.up, {})
LM_HEAD = Shape("lm_head", *LLAMA.head, {}, transposed=True)
MLP = Shape("mlp", LLAMA.up.k, LLAMA.up.n + LLAMA.down.k, {})  # as many weights as gate, up, down


def cases() -> list[KernelCase]:
    """Products alone, products with the sum and norm behind them, a feed-forward network."""
    return [
        *(_matmul(shape, rows) for shape in (OUT, DOWN, QKV, GATE_UP, LM_HEAD) for rows in ROWS),
        *(_matmul_add_norm(shape, rows) for shape in (OUT, DOWN) for rows in ROWS),
        *(_mlp(rows) for rows in ROWS),
    ]


def sweep() -> list[KernelCase]:
    """Tiles to choose from; the first of each case is the default rule's."""
    few = (1, 8, 64)
    return [
        *(_sweep("split_matmul", shape, rows) for shape in (OUT, DOWN) for rows in ROWS),
        *(_sweep("swiglu_split_matmul", DOWN, rows) for rows in few),
        *(_sweep("matmul_swiglu", GATE_UP, rows) for rows in (1, 8, 32, 64)),
        *(_sweep("matmul", shape, rows) for shape in (QKV, LM_HEAD) for rows in few),
    ]


def _matmul(shape: Shape, rows: int) -> KernelCase:
    def build() -> Built:
        x, stored = _draw(0, rows, shape.k), _weights(shape)
        turned = tuple(jnp.swapaxes(w, 0, 1) for w in stored)
        k_major, n_major = (turned, stored) if shape.transposed else (stored, turned)
        ours = functools.partial(
            api.matmul,
            implementation="pallas",
            transposed=shape.transposed,
            out_dtype=_out_dtype(shape),
        )
        by_xla = functools.partial(xla.matmul, out_dtype=_out_dtype(shape))
        forms: Forms = {
            OURS: (ours, stored),
            "xla [K, N]": (by_xla, k_major),
            "xla [N, K]": (functools.partial(by_xla, transposed=True), n_major),
        }
        contestants = [
            _contestant(name, _linked(form), x, layers, _once(form, x, layers[0]))
            for name, (form, layers) in forms.items()
        ]
        empty = _contestant(f"{EMPTY} chain", _linked(lambda x, w: w[:1]), x, stored)
        wanted = reference.matmul(x, stored[0], transposed=shape.transposed, out_dtype=F32)
        return Built((*contestants, empty), wanted)

    return _case("matmul", shape, rows, build)


def _matmul_add_norm(shape: Shape, rows: int) -> KernelCase:
    """state: x [T, K], and the residual [T, N]; x is the norm of the layer before, if K is N."""

    def build() -> Built:
        weights, norm = _weights(shape), _norm()
        turned = tuple(jnp.swapaxes(w, 0, 1) for w in weights)
        state = _draw(0, rows, shape.k), _draw(1, rows, shape.n)

        def ours(early: tuple[bool, bool], state: Any, w: Any) -> Any:
            x, residual = state
            tile = tuning.choose("split_matmul", tuning.H100, rows, shape.k, shape.n, 2)
            assert isinstance(tile, Tile), "left to XLA"
            partials = pallas_triton.split_matmul(x, w, tile, early=early[0])
            return pallas_triton.reduce_add_norm(partials, residual, norm, early=early[1])

        def by_xla(turn: bool, state: Any, w: Any) -> Any:
            x, residual = state
            return xla.matmul_add_norm(x, w.T if turn else w, residual, norm)

        forms: dict[str, Any] = {
            OURS: (functools.partial(ours, (True, False)), weights),
            f"{OURS}, neither early": (functools.partial(ours, (False, False)), weights),
            "xla [K, N]": (functools.partial(by_xla, False), weights),
            "xla [N, K]": (functools.partial(by_xla, True), turned),
        }
        if shape.k == shape.n:  # else the next kernel is XLA's
            forms[f"{OURS}, both early"] = functools.partial(ours, (True, True)), weights
        contestants = [
            _contestant(name, _residual(form), state, layers, _once(form, state, layers[0]))
            for name, (form, layers) in forms.items()
        ]
        if shape.k != shape.n:
            empty = _residual(lambda state, w: (state[1], w[:1]))
            contestants.append(_contestant(f"{EMPTY} chain", empty, state, weights))
        wanted = reference.matmul_add_norm(state[0], weights[0], state[1], norm)
        return Built(tuple(contestants), jnp.stack(wanted).astype(F32))

    return _case("matmul_add_norm", shape, rows, build)


def _mlp(rows: int) -> KernelCase:
    """state: the norm of the layer before and the residual, [T, D] both.

    A layer has both matrices, and the next layer's gate and up to warm.
    """

    def build() -> Built:
        norm, ups, downs = _norm(), _weights(GATE_UP), _weights(DOWN)
        layers = tuple(zip(ups, downs, (*ups[1:], ups[0]), strict=False))
        state = _draw(0, rows, LLAMA.out.n), _draw(1, rows, LLAMA.out.n)

        def by_up(up: Implementation, down: Implementation, warm: bool, state: Any, w: Any) -> Any:
            hidden = api.matmul_swiglu(state[0], w[0], implementation=up)
            return api.matmul_add_norm(
                hidden,
                w[1],
                state[1],
                norm,
                implementation=down,
                next_weight=w[2] if warm else None,
            )

        def by_down(state: Any, w: Any) -> Any:
            gate_up = api.matmul(state[0], w[0], implementation="pallas")
            return api.swiglu_matmul_add_norm(
                gate_up, w[1], state[1], norm, implementation="pallas"
            )

        forms: Mapping[str, Step] = {
            f"{OURS}, activated by up": functools.partial(by_up, "pallas", "pallas", False),
            f"{OURS}, the same, warming": functools.partial(by_up, "pallas", "pallas", True),
            f"{OURS}, activated by down": by_down,
            "xla up, our down": functools.partial(by_up, "xla", "pallas", False),
            "xla": functools.partial(by_up, "xla", "xla", False),
        }
        wanted = by_up("reference", "reference", False, state, layers[0])
        return Built(
            tuple(
                _contestant(name, _swapped(form), state, layers, _once(form, state, layers[0]))
                for name, form in forms.items()
            ),
            jnp.stack(wanted).astype(F32),
        )

    return _case("mlp", MLP, rows, build)


def _sweep(op: Op, shape: Shape, rows: int) -> KernelCase:
    """Every candidate; its name is its line in tuning.py."""
    width = shape.n // 2 if op == "matmul_swiglu" else shape.n

    def build() -> Built:
        weights, norm = _weights(shape), _norm()
        activated = op == "swiglu_split_matmul"
        x = _draw(0, rows, shape.k * (2 if activated else 1))
        residual = _draw(1, rows, shape.n)

        def split(tile: Tile, state: Any, w: Any) -> Any:
            partials = pallas_triton.split_matmul(
                state[0], w, tile, activated=activated, early=True
            )
            return pallas_triton.reduce_add_norm(partials, state[1], norm)

        def whole(tile: Tile, x: Any, w: Any) -> Any:
            if op == "matmul_swiglu":
                return pallas_triton.matmul_swiglu(x, w, tile)
            return pallas_triton.matmul(
                x, w, tile, transposed=shape.transposed, out_dtype=_out_dtype(shape)
            )

        def candidate(tile: Tile) -> Contestant:
            name = f'(H100, "{op}", {rows}, {shape.k}, {width}): {_code(tile)}'
            if op in ("split_matmul", "swiglu_split_matmul"):
                step = _residual(functools.partial(split, tile))
                return _contestant(name, step, (x, residual), weights)
            return _contestant(name, _linked(functools.partial(whole, tile)), x, weights)

        return Built(tuple(map(candidate, tuning.candidates(op, rows, shape.k, width))))

    return _case(op, shape, rows, build)


# Chains. ------------------------------------------------------------------------------------------


def _linked(product: Step) -> Step:
    """x' = x + a little of the product's first column."""

    def step(x: Any, w: Any) -> Any:
        return _add_a_little(x, _barrier(product(x, w)))

    return step


def _swapped(form: Step) -> Step:
    """(residual, normed) -> (normed, residual), which is the next layer's state."""
    return lambda state, w: form(state, w)[::-1]


def _residual(form: Step) -> Step:
    """(x, residual) -> the same of the next layer; x is the norm, or takes a little of it."""

    def step(state: Any, w: Any) -> Any:
        residual, normed = _barrier(form(state, w))
        same = state[0].shape == normed.shape
        return (normed if same else _add_a_little(state[0], normed)), residual

    return step


def _add_a_little(x: Any, y: Any) -> Any:
    """The barriers keep XLA from making this part of a product."""
    return _barrier(x + (y[:, :1] * 1e-3).astype(x.dtype))


def _contestant(
    name: str, step: Step, state: Any, layers: tuple[Any, ...], once: Any = None
) -> Contestant:
    one = jax.jit(step)  # traced and lowered once for all layers

    def chain(state: Any, layers: tuple[Any, ...]) -> Any:
        for w in layers:
            state = one(state, w)
        return state

    return Contestant(name, len(layers), chain, (state, layers), once=once)


def _once(form: Step, state: Any, w: Any) -> Callable[[], jax.Array]:
    """f32 [T, N], or [2, T, N] of a residual and its norm."""

    def run() -> jax.Array:
        out = jax.jit(form)(state, w)
        return (jnp.stack(out) if isinstance(out, tuple) else out).astype(F32)

    return run


# Operands. ----------------------------------------------------------------------------------------


def _case(op: str, shape: Shape, rows: int, build: Callable[[], Built]) -> KernelCase:
    target_us = shape.targets_us.get(rows)
    return KernelCase(op, f"{shape.name}, {rows} rows", shape.floor_us(rows), target_us, build)


def _weights(shape: Shape) -> tuple[jax.Array, ...]:
    """One a layer, such that a product is about as large as its input."""
    dims = (shape.n, shape.k) if shape.transposed else (shape.k, shape.n)
    return tuple(_draw(10 + layer, *dims, scale=shape.k**-0.5) for layer in range(shape.num_layers))


def _norm() -> Norm:
    return Norm("rms", 1 + _draw(2, LLAMA.out.n, scale=0.1), EPS)


def _draw(seed: int, *dims: int, scale: float = 1.0) -> jax.Array:
    drawn: jax.Array = _draw_bf16(dims, scale, jnp.uint32(seed))
    return drawn


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_bf16(dims: tuple[int, ...], scale: float, seed: jax.Array) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), dims)).astype(BF16)


def _out_dtype(shape: Shape) -> Any:
    """Logits are f32."""
    return F32 if shape.transposed else BF16


def _code(tile: Tile) -> str:
    numbers = ", ".join(str(number) for number in dataclasses.astuple(tile))
    return f"Tile({numbers})"
