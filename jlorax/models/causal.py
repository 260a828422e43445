"""A decoder around the blocks of any architecture: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
from flax import nnx

from jlorax.models.config import ModelShape, Rope
from jlorax.models.layers import (
    Embedding,
    Head,
    Rotation,
    TokenBatch,
    head_logits,
    rotation,
)
from jlorax.models.lora import LoraBatch


class Block(Protocol):
    """One layer: x [T, D] and its KV pool in, both out; ``turn`` is None for a model with ALiBi."""

    def __call__(
        self,
        x: jax.Array,
        turn: Rotation | None,
        batch: TokenBatch,
        pool: jax.Array,
        lora: LoraBatch | None,
        layer: int,
    ) -> tuple[jax.Array, jax.Array]: ...


class CausalModel(nnx.Module):
    """``rope`` None: the blocks know positions by themselves."""

    def __init__(
        self,
        shape: ModelShape,
        rope: Rope | None,
        tie_embeddings: bool,
        blocks: Sequence[Block],
        norm: nnx.Module,
        dtype: str,
    ) -> None:
        self.rope = rope
        self.embedding = Embedding(shape.vocab_size, shape.d_model, dtype)
        self.blocks = nnx.List(blocks)
        self.norm = norm
        self.head = None if tie_embeddings else Head(shape.vocab_size, shape.d_model, dtype)

    def __call__(
        self, batch: TokenBatch, pools: list[jax.Array], lora: LoraBatch | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Hidden states [T, D] before the head, and the layers' KV pools with the step's tokens."""
        x = self.embedding(batch.tokens)
        turn = None if self.rope is None else rotation(self.rope, batch)
        written = []
        for layer, (block, pool) in enumerate(zip(self.blocks, pools, strict=True)):
            x, pool = block(x, turn, batch, pool, lora, layer)
            written.append(pool)
        return self.norm(x), written

    def logits(self, x: jax.Array, lora: LoraBatch | None) -> jax.Array:
        """x: [B, D] -> f32[B, V]."""
        head = self.embedding if self.head is None else self.head
        return head_logits(x, head.weight[...], lora)
