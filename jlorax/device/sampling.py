"""Draws the next token on the device, each row by its own parameters.

Order: penalties, temperature, top-k, top-p, min-p, typical-p, draw (transformers' order). Nothing
is sorted: every filter is a threshold on a key, found by bisection over the bits of a float, so a
filter nobody asked for costs no pass over the vocabulary. Values equal to the threshold are kept.
A draw depends on (seed, position) alone, never on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NUM_ALTERNATIVES = 20  # the most top log-probabilities a request may ask for
_LANES = 128
_REMOVED = -jnp.inf


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
    seeds: jax.Array  # u32[B, 2]
    positions: jax.Array  # i32[B]: where the drawn token will stand


class Drawn(NamedTuple):
    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B], of the raw distribution


def greedy(logits: jax.Array) -> Drawn:
    """logits: f32[B, V]."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return Drawn(tokens, _logprobs_of(logits, tokens[:, None])[:, 0])


def sample(logits: jax.Array, rows: SamplingRows, seen: jax.Array, counts: jax.Array) -> Drawn:
    """logits: f32[B, V]   seen: bool[B, V] prompt or answer   counts: i32[B, V] answer."""
    penalised = _penalise(logits, rows, seen, counts)
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    is_greedy = rows.temperature <= 0.0
    warm = penalised / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
    warm = _top_k(warm, rows.top_k)
    warm = _top_p(warm, rows.top_p)
    warm = _min_p(warm, rows.min_p)
    warm = _typical_p(warm, rows.typical_p)
    tokens = jnp.where(is_greedy, best, _draw(warm, rows.seeds, rows.positions))
    return Drawn(tokens, _logprobs_of(logits, tokens[:, None])[:, 0])


def alternatives(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens: i32[B, 20] and their raw log-probabilities f32[B, 20]."""
    _, tokens = lax.top_k(logits, NUM_ALTERNATIVES)
    return tokens, _logprobs_of(logits, tokens)


def _logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _penalise(
    logits: jax.Array, rows: SamplingRows, seen: jax.Array, counts: jax.Array
) -> jax.Array:
    """Repetition as in CTRL (Keskar et al. 2019, arXiv:1909.05858); the others as OpenAI's API."""
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(seen, repeated, logits)
    out -= rows.frequency_penalty[:, None] * counts
    return out - rows.presence_penalty[:, None] * (counts > 0)


def _top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    active = k > 0
    wanted = jnp.where(active, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    threshold = _bisect(-logits, jnp.ones_like(logits), wanted.astype(jnp.float32), jnp.any(active))
    return jnp.where(active[:, None] & (-logits > threshold), _REMOVED, logits)


def _top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of most probable tokens with mass >= p. Holtzman et al. 2019."""
    active = p < 1.0
    probabilities = jax.nn.softmax(logits, axis=-1)
    threshold = _bisect(-logits, probabilities, p, jnp.any(active))
    return jnp.where(active[:, None] & (-logits > threshold), _REMOVED, logits)


def _min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens at least p times as probable as the best. Nguyen et al. 2024, arXiv:2407.01082."""
    floor = jnp.max(logits, axis=-1) + jnp.log(jnp.maximum(p, 1e-38))
    return jnp.where((p > 0)[:, None] & (logits < floor[:, None]), _REMOVED, logits)


def _typical_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The mass p nearest to the distribution's entropy. Meister et al. 2022, arXiv:2202.00666."""
    active = p < 1.0
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(logprobs)
    surprise = jnp.where(probabilities > 0, -logprobs, 0.0)
    entropy = jnp.sum(probabilities * surprise, axis=-1, keepdims=True)
    distance = jnp.where(probabilities > 0, jnp.abs(surprise - entropy), jnp.inf)
    threshold = _bisect(distance, probabilities, p, jnp.any(active))
    return jnp.where(active[:, None] & (distance > threshold), _REMOVED, logits)


def _bisect(keys: jax.Array, weights: jax.Array, target: jax.Array, active: jax.Array) -> jax.Array:
    """f32[B, 1]: the smallest t with sum(weights[keys <= t]) >= target; +inf where there is none.

    Floats order as their bits do, once negative ones are flipped: 32 halvings find t exactly.
    """
    ordered = _ordered_bits(keys)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(ordered <= middle, weights, 0.0), axis=-1, keepdims=True)
        enough = mass >= target[:, None]
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros((keys.shape[0], 1), jnp.uint32)
    top = _ordered_bits(jnp.full_like(low, jnp.inf, jnp.float32))
    # a fixed number of turns, so that a GPU need not ask the host after each
    search = lambda: lax.fori_loop(0, 32, halve, (low, top))[1]  # noqa: E731
    return _from_ordered_bits(lax.cond(active, search, lambda: top))


_SIGN = 0x80000000


def _ordered_bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(_SIGN)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _from_ordered_bits(ordered: jax.Array) -> jax.Array:
    sign = jnp.uint32(_SIGN)
    bits = jnp.where(ordered & sign != 0, ordered ^ sign, ~ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _draw(logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """Inverse CDF in two levels, so that no prefix sum runs over the whole vocabulary."""
    rows, vocab = logits.shape
    probabilities = jax.nn.softmax(logits, axis=-1)
    padded = jnp.pad(probabilities, ((0, 0), (0, -vocab % _LANES))).reshape(rows, -1, _LANES)
    groups = jnp.cumsum(padded.sum(-1), axis=-1)
    point = _uniform(seeds, positions) * groups[:, -1]
    group = _first_above(groups, point)
    before = jnp.where(group > 0, _pick(groups, group - 1), 0.0)
    members = jnp.take_along_axis(padded, group[:, None, None], axis=1)[:, 0]
    inside = jnp.cumsum(members, axis=-1)
    # rounding may leave the point at the group's very end: the last member with any mass is it
    last = _LANES - 1 - jnp.argmax(jnp.flip(members > 0, axis=-1), axis=-1)
    member = jnp.minimum(_first_above(inside, point - before), last)
    return (group * _LANES + member).astype(jnp.int32)


def _first_above(cumulative: jax.Array, point: jax.Array) -> jax.Array:
    """Index of the first entry > point, at most the last with any mass."""
    index = jnp.sum(cumulative <= point[:, None], axis=-1)
    last = jnp.sum(cumulative < cumulative[:, -1:], axis=-1)
    return jnp.minimum(index, last)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def _uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seeds, positions)
