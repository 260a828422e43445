"""What a scoring step finds of its tokens, beside all that an extend step does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlorax.device import sampling
from jlorax.device.parts import in_parts
from jlorax.device.sampling import Scored
from jlorax.layout import NO_TARGET
from pallas_kernels.sampling.api import Implementation

_ROWS_PER_PART = {"xla": 8, "pallas": 64, "pallas_interpret": 64}

Head = Callable[[jax.Array, jax.Array], jax.Array]


class StepScores(NamedTuple):
    """Of T tokens, and of C chunks of them."""

    logprobs: jax.Array  # f32[T]: of the token's target, of the raw distribution
    top_tokens: jax.Array  # i32[T, 20]
    top_logprobs: jax.Array  # f32[T, 20]
    hidden_sums: jax.Array  # f32[C, D]: of the final hidden states


def score(
    hidden: jax.Array,
    slots: jax.Array,
    inputs: dict[str, jax.Array],
    num_chunks: int,
    head: Head,
    implementation: Implementation,
) -> StepScores:
    """hidden: [T, D], after the final norm   slots: i32[T]   head: ([n, D], i32[n]) -> f32[n, V]"""
    targets, num_alternatives = inputs["score_targets"], inputs["score_alternatives"]

    def compute(part: tuple[jax.Array, ...]) -> Scored:
        hidden, slots, targets, num_alternatives = part
        logits = head(hidden, slots)
        return sampling.score(logits, jnp.maximum(targets, 0), num_alternatives, implementation)

    def compute_wanted(part: tuple[jax.Array, ...]) -> Scored:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, part))
        return lax.cond(jnp.any(part[2] != NO_TARGET), compute, lambda _: nothing, part)

    whole = hidden, slots, targets, num_alternatives
    found = in_parts(
        compute_wanted if implementation == "xla" else compute,
        whole,
        hidden.shape[0],
        _ROWS_PER_PART[implementation],
    )
    return StepScores(*found, _sums(hidden, inputs["score_chunks"], num_chunks))


def _sums(hidden: jax.Array, chunks: jax.Array, num_chunks: int) -> jax.Array:
    """As a product, whose order of adding is the same always. Padding may hold no numbers."""
    member = jnp.arange(num_chunks)[:, None] == chunks
    wide = jnp.where((chunks < num_chunks)[:, None], hidden.astype(jnp.float32), 0.0)
    return jnp.matmul(member.astype(jnp.float32), wide, precision=lax.Precision.HIGHEST)
