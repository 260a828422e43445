"""One optimizer step and one evaluation, as functions to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlorax.models.layers import Outputs, TokenBatch
from jlorax.training.frozen import FrozenBase, Leaf, recomputed
from jlorax.training.lora import Adapter, AdapterShape, TrainedLora
from jlorax.training.losses import Objective, Summed, target_logprobs
from jlorax.training.products import frozen_product
from pallas_kernels.paged_attention.api import Places, Whole
from pallas_kernels.paged_attention.whole import Kernels


class Rows(NamedTuple):
    """B rows of T tokens, and the M places in them whose next token is to be learnt."""

    tokens: jax.Array  # i32[B, T]
    segments: jax.Array  # i32[B, T]: a row's sequences; 0 is padding
    positions: jax.Array  # i32[B, T], in the sequence
    places: jax.Array  # i32[M] into B * T
    targets: jax.Array  # i32[M]: the token that follows; -1: none


class TrainState(NamedTuple):
    """All that changes from step to step, and all that a checkpoint holds."""

    adapter: Adapter
    optimizer: optax.OptState
    step: jax.Array  # i32[]: optimizer steps made


class StepResult(NamedTuple):
    """``is_finite`` False: loss or gradients were not, and nothing was changed."""

    loss: jax.Array  # f32[], mean over the targets
    grad_norm: jax.Array  # f32[], before clipping
    is_finite: jax.Array  # bool[]


@dataclass(frozen=True)
class Forward:
    """From rows to a loss, by the adapted model. ``recompute``: keep only blocks' inputs."""

    base: FrozenBase
    shape: AdapterShape
    objective: Objective
    recompute: bool
    kernels: Kernels

    def loss(
        self, adapter: Adapter, leaves: list[Leaf], rows: Rows, dropout_key: jax.Array | None
    ) -> Summed:
        module, unfold = self.base.merge(leaves)
        lora = TrainedLora(self.shape, adapter, dropout_key)
        num_tokens = rows.tokens.size
        nowhere = jnp.zeros((num_tokens,), jnp.int32)
        batch = TokenBatch(
            tokens=rows.tokens.reshape(-1),
            positions=rows.positions.reshape(-1),
            rope_lengths=jnp.full((num_tokens,), rows.tokens.shape[1], jnp.int32),
            places=Places(nowhere, nowhere),
            queries=Whole(rows.segments, rows.positions, self.kernels),
        )
        pools = [jnp.zeros((0,))] * len(module.blocks)
        outputs = Outputs(rows.places, lora)
        wrap = recomputed(unfold) if self.recompute else unfold
        hidden, _ = module(batch, pools, lora, outputs=outputs, wrap=wrap, product=frozen_product)
        head = module.embedding if module.head is None else module.head
        logprobs = target_logprobs(
            hidden, rows.targets, head.weight[...], lora, lambda h: module.logits(h, lora)
        )
        return self.objective(logprobs, rows.targets >= 0)


def make_step(
    forward: Forward, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, list[Leaf], Rows], tuple[TrainState, StepResult]]:
    """(state, leaves, rows) -> (state, result). ``rows`` have a leading axis: micro-batches,
    whose gradients are added up, each target counting the same. The state is to be donated."""

    def total(adapter: Adapter, *rest: Any) -> tuple[jax.Array, jax.Array]:
        return forward.loss(adapter, *rest)

    grad = jax.value_and_grad(total, has_aux=True)

    def step(state: TrainState, leaves: list[Leaf], rows: Rows) -> tuple[TrainState, StepResult]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        num_parts = rows.tokens.shape[0]

        def add_part(sums: Any, part: tuple[jax.Array, Rows]) -> tuple[Any, None]:
            number, one = part
            own_key = jax.random.fold_in(key, number)
            (loss, weight), gradients = grad(state.adapter, leaves, one, own_key)
            return jax.tree.map(jnp.add, sums, (loss, weight, gradients)), None

        zero = jnp.float32(0)
        sums = (zero, zero, jax.tree.map(jnp.zeros_like, state.adapter))
        parts = jnp.arange(num_parts), rows
        if num_parts == 1:
            sums, _ = add_part(sums, jax.tree.map(lambda x: x[0], parts))
        else:
            sums, _ = jax.lax.scan(add_part, sums, parts)
        loss, weight, gradients = sums
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        updates, moments = optimizer.update(gradients, state.optimizer, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = TrainState(adapter, moments, state.step + 1)
        kept = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)
        return kept, StepResult(loss / weight, norm, is_finite)

    return step


def make_evaluation(forward: Forward) -> Callable[[Adapter, list[Leaf], Rows], Summed]:
    """Of one micro-batch, nothing dropped."""
    return lambda adapter, leaves, rows: forward.loss(adapter, leaves, rows, None)
