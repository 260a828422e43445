"""A decoder around the blocks of any architecture: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jlorax.models.config import ModelShape, Rope
from jlorax.models.layers import (
    Embedding,
    Head,
    Norm,
    Outputs,
    Product,
    StepView,
    TokenBatch,
    head_logits,
    rotation,
)
from jlorax.models.lora import Lora
from pallas_kernels.skinny_matmul.api import Implementation


class Block(Protocol):
    """One layer. It takes the residual stream and that stream's ``attention_norm``, [T, D] both,
    and gives the stream after it and its ``next_norm``, so that the last sum and the norm that
    follows it can be one launch; and the layer's KV pool in and out. ``outputs``: the only rows
    that are wanted of stream and norm; None: all."""

    @property
    def attention_norm(self) -> Norm: ...

    def __call__(
        self,
        stream: jax.Array,
        normed: jax.Array,
        step: StepView,
        pool: jax.Array,
        layer: int,
        next_norm: Norm,
        outputs: Outputs | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


RunBlock = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def _as_it_is(block: Block) -> RunBlock:
    return block


class CausalModel(nnx.Module):
    """``rope`` None: the blocks know positions by themselves."""

    def __init__(
        self,
        shape: ModelShape,
        rope: Rope | None,
        tie_embeddings: bool,
        blocks: Sequence[Block],
        norm: Norm,
        dtype: str,
    ) -> None:
        self.rope = rope
        self.embedding = Embedding(shape.vocab_size, shape.d_model, dtype)
        self.blocks = nnx.List(blocks)
        self.norm = norm
        self.head = None if tie_embeddings else Head(shape.vocab_size, shape.d_model, dtype)

    def __call__(
        self,
        batch: TokenBatch,
        pools: list[jax.Array],
        lora: Lora | None,
        implementation: Implementation = "xla",
        outputs: Outputs | None = None,
        wrap: Callable[[Block], RunBlock] = _as_it_is,
        product: Product = jnp.matmul,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Hidden states before the head, and the layers' KV pools with the step's tokens.

        [B, D] of the ``outputs``, or [T, D] of all tokens. ``wrap``: how blocks are called;
        training computes them again on the way back. ``product``: how sites multiply there.
        """
        turn = None if self.rope is None else rotation(self.rope, batch)
        step = StepView(batch, turn, lora, implementation, batch.tokens.shape[0], product)
        norms = [*(block.attention_norm for block in self.blocks), self.norm]
        stream = self.embedding(batch.tokens)
        normed = norms[0](stream)
        written = []
        for layer, (block, pool) in enumerate(zip(self.blocks, pools, strict=True)):
            wanted = outputs if layer == len(pools) - 1 else None
            stream, normed, pool = wrap(block)(
                stream, normed, step, pool, layer, norms[layer + 1], wanted
            )
            written.append(pool)
        return normed, written

    def logits(self, x: jax.Array, lora: Lora | None) -> jax.Array:
        """x: [B, D] -> f32[B, V]."""
        head = self.embedding if self.head is None else self.head
        return head_logits(x, head.weight[...], lora)
