"""What every implementation of sampling takes and gives."""

from __future__ import annotations

from typing import NamedTuple

import jax


class RowParameters(NamedTuple):
    """What each of B rows asks for. The filters of a greedy row, and its point, count for nothing.

    A draw inverts the distribution function at ``points``, uniform in [0, 1).
    """

    is_greedy: jax.Array  # bool[B]
    top_k: jax.Array  # i32[B], 0 = off
    top_p: jax.Array  # f32[B], over 0, 1 = off
    min_p: jax.Array  # f32[B], 0 = off
    typical_p: jax.Array  # f32[B], over 0, 1 = off
    points: jax.Array  # f32[B]
    num_alternatives: jax.Array  # i32[B], A at most


class Sampled(NamedTuple):
    """Per row: the token, its raw log-probability, and the alternatives it asked for, then zeros.

    Alternatives are the most probable raw tokens, of equals the lower id first.
    """

    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B]
    top_tokens: jax.Array  # i32[B, A]
    top_logprobs: jax.Array  # f32[B, A]
