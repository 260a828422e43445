"""Chooses the next token on the device, each row by its own parameters.

Order: penalties, temperature, then filters and draw in ``pallas_kernels.sampling`` (transformers'
order). A draw depends on (seed, position) alone, never on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    seen: jax.Array,
    counts: jax.Array,
    implementation: Implementation = "xla",
) -> Sampled:
    """logits: f32[B, V]   seen: bool[B, V] prompt or answer   counts: i32[B, V] answer."""
    is_greedy = rows.temperature <= 0.0
    penalised = _penalise(logits, rows, seen, counts)
    warm = penalised / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
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


def _penalise(
    logits: jax.Array, rows: SamplingRows, seen: jax.Array, counts: jax.Array
) -> jax.Array:
    """Repetition as in CTRL (Keskar et al. 2019, arXiv:1909.05858); the others as OpenAI's API."""
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(seen, repeated, logits)
    out -= rows.frequency_penalty[:, None] * counts
    return out - rows.presence_penalty[:, None] * (counts > 0)


def _uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seeds, positions)
