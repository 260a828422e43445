"""What a scoring step says of given tokens, part by part, against log softmax in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlorax.device import sampling
from jlorax.device.scores import StepScores, score
from jlorax.layout import NO_TARGET
from pallas_kernels.sampling.api import Implementation

T, C, D, V = 24, 3, 16, 333
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "pallas_interpret")
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.normal(size=(T, D)).astype(np.float32)
HEADS = RANDOM.normal(size=(2, D, V)).astype(np.float32)  # by slot
SLOTS = np.arange(T, dtype=np.int32) % 2


def head(hidden: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.einsum("nd,ndv->nv", hidden, jnp.asarray(HEADS)[slots])


def scored(
    implementation: Implementation, hidden: np.ndarray = HIDDEN, **inputs: np.ndarray
) -> StepScores:
    given = {
        "score_targets": np.full(T, NO_TARGET),
        "score_alternatives": np.zeros(T),
        "score_chunks": np.full(T, C),
        **inputs,
    }
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in given.items()}
    found = jax.jit(lambda h, s, i: score(h, s, i, C, head, implementation))(hidden, SLOTS, arrays)
    return StepScores(*map(np.asarray, found))


@pytest.fixture(scope="module")
def logprobs() -> np.ndarray:
    logits = np.einsum("nd,ndv->nv", HIDDEN, HEADS[SLOTS])
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_and_alternatives_of_every_token(
    implementation: Implementation, logprobs: np.ndarray
) -> None:
    targets = RANDOM.integers(0, V, T)
    wanted = np.arange(T) % (sampling.NUM_ALTERNATIVES + 1)
    got = scored(implementation, score_targets=targets, score_alternatives=wanted)
    np.testing.assert_allclose(got.logprobs, logprobs[np.arange(T), targets], atol=1e-4)
    for i, count in enumerate(wanted):
        best = np.argsort(-logprobs[i])[:count]
        np.testing.assert_array_equal(got.top_tokens[i, :count], best)
        np.testing.assert_allclose(got.top_logprobs[i, :count], logprobs[i, best], atol=1e-4)
        assert not got.top_tokens[i, count:].any()


def test_a_part_that_nobody_asks_about_is_not_computed(logprobs: np.ndarray) -> None:
    """A CPU's head takes a fifth of a step's time."""
    targets = np.full(T, NO_TARGET)
    targets[9] = 7
    got = scored("xla", score_targets=targets)
    assert got.logprobs[9] == pytest.approx(logprobs[9, 7], abs=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(got.logprobs), range(8, 16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_states_are_summed_by_chunk(implementation: Implementation) -> None:
    chunks = np.array([0] * 5 + [C] * 3 + [2] * 9 + [C] * 7)
    padded = np.where((chunks == C)[:, None], np.nan, HIDDEN)  # as a kernel leaves it
    got = scored(implementation, padded, score_chunks=chunks).hidden_sums
    for chunk in range(C):
        np.testing.assert_allclose(got[chunk], HIDDEN[chunks == chunk].sum(0), atol=1e-5)
    assert not got[1].any()
