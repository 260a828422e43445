"""What is minimised: a loss is a function of the target tokens' log-probabilities.

So another objective (preference, distillation) is another function here, and the model's part,
``target_logprobs``, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jlorax.models.lora import Lora

T = TypeVar("T")

CHUNK_TOKENS = 2048  # logits that exist at once: 512 MB in f32 at a vocabulary of 64 Ki

Head = Callable[[jax.Array], jax.Array]
"""Hidden states [N, D] -> logits f32[N, V]."""


class Summed(NamedTuple):
    """A loss as a sum over ``weight`` tokens, so that parts of a batch can be added up."""

    total: jax.Array  # f32[]
    weight: jax.Array  # f32[]


Objective = Callable[[jax.Array, jax.Array], Summed]
"""(log-probabilities f32[M], is a target bool[M]) -> the loss to be minimised."""


def cross_entropy(logprobs: jax.Array, is_target: jax.Array) -> Summed:
    """-sum log p(target): supervised fine-tuning, and continued pretraining on whole texts."""
    kept = is_target.astype(jnp.float32)
    return Summed(-jnp.sum(logprobs * kept), jnp.sum(kept))


OBJECTIVES: Mapping[str, Objective] = {"sft": cross_entropy}


def target_logprobs(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array, lora: Lora | None, head: Head
) -> jax.Array:
    """log p(target) of each hidden state: [M, D], i32[M] (-1: none, gives 0) -> f32[M].

    ``weight`` [V, D] is the head's. Where no adapter changes the head, a log-probability's gradient
    for its own hidden state,  W[target] - softmax(logits) @ W,  is computed on the way there: the
    logits need not be kept, nor computed twice. Chunk by chunk.
    """
    if lora is not None and lora.covers(("lm_head",)):
        again = jax.checkpoint(lambda h, t: _logprobs(head(h), t))
        return _by_chunks(again, hidden, targets)
    return _frozen_head_logprobs(hidden, targets, weight)


@jax.custom_vjp
def _frozen_head_logprobs(hidden: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    return _by_chunks(lambda h, t: _logprobs(_logits(h, weight), t), hidden, targets)


def _forward(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def chunk(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(h, weight)
        probable = jax.nn.softmax(logits).astype(weight.dtype)
        slope = weight[jnp.maximum(t, 0)] - probable @ weight
        return _logprobs(logits, t), jnp.where((t >= 0)[:, None], slope, 0).astype(h.dtype)

    return _by_chunks(chunk, hidden, targets)


def _backward(slope: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    return (cotangent[:, None] * slope).astype(slope.dtype), None, None


_frozen_head_logprobs.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("bd,vd->bv", hidden, weight, preferred_element_type=jnp.float32)


def _logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(targets >= 0, at_target - jax.nn.logsumexp(logits, axis=-1), 0)


def _by_chunks(of: Callable[[jax.Array, jax.Array], T], hidden: jax.Array, targets: jax.Array) -> T:
    """``of`` for the whole, a part at a time; one after the other, or their logits would all be
    alive at once."""
    num_tokens = targets.shape[0]
    num_chunks = -(-num_tokens // CHUNK_TOKENS)
    if num_chunks == 1:
        return of(hidden, targets)
    size = -(-num_tokens // num_chunks)
    short = num_chunks * size - num_tokens
    hidden = jnp.pad(hidden, ((0, short), (0, 0))).reshape(num_chunks, size, -1)
    targets = jnp.pad(targets, (0, short), constant_values=-1).reshape(num_chunks, size)
    parts = jax.lax.map(lambda part: of(*part), (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], parts)
