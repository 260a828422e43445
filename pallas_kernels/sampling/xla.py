"""Sampling in plain XLA: all rows together, every filter by bisection.

A filter that no row asked for costs no pass over the vocabulary; on a GPU the host is asked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sampling.operands import RowParameters, Sampled

_LANES = 128
_REMOVED = -jnp.inf


def sample(
    logits: jax.Array, warm: jax.Array, parameters: RowParameters, max_alternatives: int
) -> Sampled:
    """As ``api.sample``."""
    greedy = jnp.argmax(warm, axis=-1).astype(jnp.int32)
    kept = top_k(warm, parameters.top_k)
    kept = top_p(kept, parameters.top_p)
    kept = min_p(kept, parameters.min_p)
    kept = typical_p(kept, parameters.typical_p)
    tokens = jnp.where(parameters.is_greedy, greedy, _draw(kept, parameters.points))
    logprobs = _logprobs_of(logits, tokens[:, None])[:, 0]
    best = _alternatives(logits, parameters.num_alternatives, max_alternatives)
    return Sampled(tokens, logprobs, *best)


def _alternatives(
    logits: jax.Array, num_wanted: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """Nothing is computed when no row wants any."""
    dims = logits.shape[0], most

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(dims, jnp.int32), jnp.zeros(dims, jnp.float32)

    def most_probable() -> tuple[jax.Array, jax.Array]:
        _, tokens = lax.top_k(logits, min(most, logits.shape[1]))
        mask = jnp.arange(tokens.shape[1]) < num_wanted[:, None]
        logprobs = jnp.where(mask, _logprobs_of(logits, tokens), 0.0)
        space = (0, 0), (0, most - tokens.shape[1])
        return jnp.pad(jnp.where(mask, tokens, 0), space), jnp.pad(logprobs, space)

    return lax.cond(jnp.any(num_wanted > 0), most_probable, nothing)


def _logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """The k greatest of each row; what is removed becomes -inf, here and below."""
    active = k > 0
    count = jnp.where(active, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    threshold = _bisect(-logits, jnp.ones_like(logits), count.astype(jnp.float32), jnp.any(active))
    return jnp.where(active[:, None] & (-logits > threshold), _REMOVED, logits)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of most probable tokens with mass >= p."""
    active = p < 1.0
    probabilities = jax.nn.softmax(logits, axis=-1)
    threshold = _bisect(-logits, probabilities, p, jnp.any(active))
    return jnp.where(active[:, None] & (-logits > threshold), _REMOVED, logits)


def min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens at least p times as probable as the best."""
    floor = jnp.max(logits, axis=-1) + jnp.log(jnp.maximum(p, 1e-38))
    return jnp.where((p > 0)[:, None] & (logits < floor[:, None]), _REMOVED, logits)


def typical_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The mass p nearest to the distribution's entropy."""
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


def _draw(logits: jax.Array, points: jax.Array) -> jax.Array:
    """Inverse CDF in two levels, so that no prefix sum runs over the whole vocabulary."""
    rows, vocab = logits.shape
    probabilities = jax.nn.softmax(logits, axis=-1)
    padded = jnp.pad(probabilities, ((0, 0), (0, -vocab % _LANES))).reshape(rows, -1, _LANES)
    groups = jnp.cumsum(padded.sum(-1), axis=-1)
    point = points * groups[:, -1]
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
