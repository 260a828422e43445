"""Chooses the next token on the device, each row by its own parameters.

Order: penalties, biases, masks, temperature, then filters and draw in ``pallas_kernels.sampling``
(transformers' order). A draw depends on (seed, position) alone, never on the batch. Reported
log-probabilities are those of the logits as they came.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlorax.layout import MASK_BITS
from pallas_kernels.sampling import api
from pallas_kernels.sampling.api import Implementation, RowParameters, Sampled

NUM_ALTERNATIVES = 20  # the most top log-probabilities a request may ask for


class SamplingRows(NamedTuple):
    """Parameters of B rows; see types.SamplingParams for meanings and ranges."""

    temperature: jax.Array  # f32[B], 0 = greedy
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    top_k: jax.Array  # i32[B], 0 = off
    num_alternatives: jax.Array  # i32[B]
    seeds: jax.Array  # u32[B, 2]
    positions: jax.Array  # i32[B]: where the drawn token will stand


class Books(NamedTuple):
    """What is kept for B rows."""

    seen: jax.Array  # bool[B, V]: in prompt or answer
    counts: jax.Array  # i32[B, V]: in the answer
    masks: jax.Array  # i32[B, ceil(V / 32)]: bit i % 32 of word i // 32 allows token i
    bias: jax.Array  # f32[B, V]: added to the logits


class Drawn(NamedTuple):
    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B], of the raw distribution


def greedy(logits: jax.Array) -> Drawn:
    """logits: f32[B, V]."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Drawn(tokens, chosen - jax.nn.logsumexp(logits, axis=-1))


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    books: Books,
    implementation: Implementation = "xla",
) -> Sampled:
    """logits: f32[B, V]."""
    is_greedy = rows.temperature <= 0.0
    altered = _penalise(logits, rows, books.seen, books.counts) + books.bias
    allowed = jnp.where(_may_be_drawn(books.masks, logits.shape[1]), altered, -jnp.inf)
    warm = allowed / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
    parameters = RowParameters(
        is_greedy=is_greedy,
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
        typical_p=rows.typical_p,
        points=_uniform(rows.seeds, rows.positions),
        num_alternatives=rows.num_alternatives,
    )
    return api.sample(
        logits,
        warm,
        parameters,
        max_alternatives=NUM_ALTERNATIVES,
        implementation=implementation,
    )


class Scored(NamedTuple):
    """Of B given tokens, in the raw distributions that they were drawn from."""

    logprobs: jax.Array  # f32[B]
    top_tokens: jax.Array  # i32[B, A], as many as were asked for, then zeros
    top_logprobs: jax.Array  # f32[B, A]


def score(
    logits: jax.Array,
    targets: jax.Array,
    num_alternatives: jax.Array,
    implementation: Implementation = "xla",
) -> Scored:
    """logits: f32[B, V]   targets, num_alternatives: i32[B]."""
    zeros = jnp.zeros(targets.shape, jnp.float32)
    nothing = RowParameters(
        is_greedy=jnp.ones(targets.shape, jnp.bool_),
        top_k=jnp.zeros(targets.shape, jnp.int32),
        top_p=zeros + 1,
        min_p=zeros,
        typical_p=zeros + 1,
        points=zeros,
        num_alternatives=num_alternatives,
    )
    best = api.sample(
        logits,
        logits,
        nothing,
        max_alternatives=NUM_ALTERNATIVES,
        implementation=implementation,
    )
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return Scored(logprobs, best.top_tokens, best.top_logprobs)


def _penalise(
    logits: jax.Array, rows: SamplingRows, seen: jax.Array, counts: jax.Array
) -> jax.Array:
    """Repetition as in CTRL (Keskar et al. 2019, arXiv:1909.05858); the others as OpenAI's API."""
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(seen, repeated, logits)
    out -= rows.frequency_penalty[:, None] * counts
    return out - rows.presence_penalty[:, None] * (counts > 0)


def _may_be_drawn(masks: jax.Array, vocab_size: int) -> jax.Array:
    """bool[B, V]."""
    bits = (masks[:, :, None] >> jnp.arange(MASK_BITS, dtype=jnp.int32)) & 1
    return bits.reshape(masks.shape[0], -1)[:, :vocab_size] != 0


def _uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seeds, positions)
