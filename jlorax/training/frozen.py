"""The frozen base as training holds it: as served, or with its products' weights in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jlorax.models.causal import Block, CausalModel, RunBlock
from jlorax.models.weights import BaseModel


class Quantized(NamedTuple):
    """A weight [d_in, d_out] as w = q * scale. Symmetric, by output: LLM.int8()'s vector-wise
    scheme without outliers (Dettmers et al. 2022, arXiv:2208.07339)."""

    q: jax.Array  # i8[d_in, d_out]
    scale: jax.Array  # f32[d_out]


@jax.jit
def quantize(weight: jax.Array) -> Quantized:
    wide = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=0), 1e-12) / 127
    return Quantized(jnp.round(wide / scale).astype(jnp.int8), scale)


def dequantize(weight: Quantized, dtype: str) -> jax.Array:
    return (weight.q.astype(jnp.float32) * weight.scale).astype(dtype)


Leaf = jax.Array | Quantized
Form = Literal["int8", "bfloat16"]


class FrozenBase(NamedTuple):
    """``leaves``: the model's, some of them quantized. They are an argument of every step."""

    model: BaseModel
    leaves: list[Leaf]

    @property
    def size_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.leaves))

    @property
    def num_parameters(self) -> int:
        whole = (leaf.q if isinstance(leaf, Quantized) else leaf for leaf in self.leaves)
        return sum(leaf.size for leaf in whole)

    def merge(self, leaves: list[Leaf]) -> tuple[CausalModel, Callable[[Block], Block]]:
        """The module, and what gives a block of it its weights in full.

        Only what one block needs is ever in full at once: the caller unfolds a block where it
        computes it, and again where it computes it backwards.
        """
        plain = [leaf.q if isinstance(leaf, Quantized) else leaf for leaf in leaves]
        scales = {id(leaf.q): leaf.scale for leaf in leaves if isinstance(leaf, Quantized)}
        return self.model.merge(plain), lambda block: _unfolded(block, scales, self.model.dtype)


def frozen_base(model: BaseModel, form: Form | None = None) -> FrozenBase:
    """Takes the model's leaves out of it, so that a full weight goes when its other form is there.

    ``form``: of the weights of blocks' products; None: as they are.
    """
    in_blocks = _leaves_of_blocks(model)
    leaves: list[Leaf] = []
    while model.leaves:
        leaf = model.leaves.pop(0)
        changes = leaf.ndim == 2 and len(leaves) in in_blocks
        leaves.append(_formed(leaf, form) if changes else leaf)
    return FrozenBase(model, leaves)


def _formed(weight: jax.Array, form: Form | None) -> Leaf:
    match form:
        case "int8":
            return quantize(weight)
        case "bfloat16":
            return weight.astype(jnp.bfloat16)
        case None:
            return weight


def outlined_base(model: BaseModel, form: Form | None = None) -> FrozenBase:
    """Of a model without weights, whose leaves are shapes."""
    in_blocks = _leaves_of_blocks(model)
    leaves = [
        jax.eval_shape(partial(_formed, form=form), leaf)
        if leaf.ndim == 2 and i in in_blocks
        else leaf
        for i, leaf in enumerate(model.leaves)
    ]
    return FrozenBase(model, leaves)


def _leaves_of_blocks(model: BaseModel) -> set[int]:
    """Which leaves belong to blocks: embedding, head and norms stay as they are."""
    numbered: Any = model.merge([jnp.int32(i) for i in range(len(model.leaves))])
    return {int(leaf) for leaf in jax.tree.leaves(nnx.state(numbered.blocks))}


def _unfolded(block: Block, scales: dict[int, jax.Array], dtype: str) -> Block:
    graph, state = nnx.split(block)

    def full(leaf: Any) -> Any:
        scale = scales.get(id(leaf))
        return leaf if scale is None else dequantize(Quantized(leaf, scale), dtype)

    return nnx.merge(graph, jax.tree.map(full, state)) if scales else block


def recomputed(run: Callable[[Block], Block]) -> Callable[[Block], RunBlock]:
    """A block that keeps the stream before it alone, and computes the rest again on the way back.
    Chen et al. 2016, arXiv:1604.06174."""

    def wrap(block: Block) -> RunBlock:
        def call(stream: jax.Array, _: jax.Array, *rest: Any) -> Any:
            def inner(stream: jax.Array) -> Any:
                own = run(block)
                return own(stream, own.attention_norm(stream), *rest)

            return jax.checkpoint(inner)(stream)

        return call

    return wrap
