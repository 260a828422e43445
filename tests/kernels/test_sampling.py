"""Every implementation of sampling against the plain reference: filters, draws, alternatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sampling import api, pallas_triton, reference, tuning
from pallas_kernels.sampling.operands import RowParameters, Sampled
from pallas_kernels.sampling.tuning import Tuning

MOST = 20  # alternatives
BATCH = 160
Row = dict[str, float]
Kind = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Sample = Callable[[jax.Array, jax.Array, RowParameters], Sampled]


def _cut(*numbers: int) -> Sample:
    return functools.partial(
        pallas_triton.sample, max_alternatives=MOST, tuning=Tuning(*numbers), interpret=True
    )


def _whole(implementation: api.Implementation) -> Sample:
    return functools.partial(api.sample, max_alternatives=MOST, implementation=implementation)


IMPLEMENTATIONS: dict[str, Sample] = {
    "xla": _whole("xla"),
    "pallas": _whole("pallas_interpret"),
    "pallas, 128 at once, 2 ways": _cut(128, 2, 4),
    "pallas, 256 at once, 8 ways": _cut(256, 8, 4),
}
OFF: Row = {
    "is_greedy": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "points": 0.5,
    "num_alternatives": 0,
}
ASKED: list[Row] = [
    {},
    {"is_greedy": 1},
    {"is_greedy": 1, "top_k": 3, "top_p": 0.2, "typical_p": 0.2, "num_alternatives": MOST},
    {"top_k": 1},
    {"top_k": 2, "num_alternatives": 3},
    {"top_k": 40},
    {"top_k": 2**31 - 1},
    {"top_p": 1e-9},
    {"top_p": 0.3, "num_alternatives": 1},
    {"top_p": 0.95},
    {"top_p": 0.99999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-30},
    {"typical_p": 1e-9},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"top_k": 30, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 30, "typical_p": 0.6},
    {"top_k": 50, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.8, "num_alternatives": MOST},
]
VOCAB_SIZES = (47, 1000, 1024)
LEAST_MASS = 1e-5  # of a token whose place in the distribution f32 tells for certain


def normal(random: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=dims) * 3


def ties(random: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    """Nine values, both zeros among them."""
    found = random.integers(-4, 5, dims).astype(np.float32)
    return np.where((found == 0) & (random.random(dims) < 0.5), -0.0, found)


def removed(random: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    """Most tokens are impossible, the first and last ones too."""
    found = np.where(random.random(dims) < 0.3, normal(random, dims), -np.inf)
    found[..., [0, -1]] = -np.inf
    return found


def cold(random: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    """As divided by a temperature of 1e-4; all below zero."""
    return random.normal(size=dims) * 3e4 - 1e6


def flat(random: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    return np.full(dims, -1.25)


KINDS = (normal, ties, removed, cold, flat)


def parameters_of(rows: list[Row]) -> RowParameters:
    dtypes = {"is_greedy": bool, "top_k": np.int32, "num_alternatives": np.int32}
    return RowParameters(
        *(
            jnp.asarray([row[name] for row in rows], dtypes.get(name, np.float32))
            for name in RowParameters._fields
        )
    )


@functools.cache
def compiled(name: str) -> Sample:
    return jax.jit(IMPLEMENTATIONS[name])


def run(name: str, logits: np.ndarray, warm: np.ndarray, rows: list[Row]) -> Sampled:
    got = compiled(name)(jnp.asarray(logits), jnp.asarray(warm), parameters_of(rows))
    return Sampled(*(np.asarray(x) for x in got))


def middles(p: np.ndarray, most: int = 6) -> list[float]:
    """Points in the middle of what some tokens own of [0, 1): of the first, the last, the most."""
    cumulative = np.cumsum(p)
    certain = np.flatnonzero(p >= LEAST_MASS)
    chosen = {certain[0], certain[-1], p.argmax()}
    chosen |= set(certain[:: -(-len(certain) // most)])
    return [(cumulative[i] - p[i] / 2) / cumulative[-1] for i in sorted(chosen)]


@functools.cache
def batch(kind: Kind, vocab_size: int) -> tuple[np.ndarray, list[Row]]:
    """Every wish with logits of its own, at several points: (warm, rows), as many of each."""
    random = np.random.default_rng((vocab_size, KINDS.index(kind)))
    logits = kind(random, (len(ASKED), vocab_size)).astype(np.float32)
    rows, warm = [], []
    for line, asked in zip(logits, ASKED, strict=True):
        row = OFF | asked
        points = [0.5] if row["is_greedy"] else middles(reference.filtered(line, row))
        rows += [row | {"points": point} for point in points]
        warm += [line] * len(points)
    order = random.permutation(len(rows))
    return np.array(_filled([warm[i] for i in order])), _filled([rows[i] for i in order])


def _filled(items: Any, size: int = BATCH) -> Any:
    """Batches of one size: they are compiled once."""
    assert len(items) <= size
    return [*items, *[items[-1]] * (size - len(items))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_equal_the_reference(name: str, vocab_size: int, kind: Kind) -> None:
    """Filters alone and together, in one batch, beside greedy rows."""
    warm, rows = batch(kind, vocab_size)
    logits = normal(np.random.default_rng(vocab_size), warm.shape).astype(np.float32)
    got = run(name, logits, warm, rows)
    for i, row in enumerate(rows):
        token, logprob = reference.sample(logits[i], warm[i], row)
        assert got.tokens[i] == token, row
        assert got.logprobs[i] == pytest.approx(logprob, abs=2e-5), row
        best, logprobs = reference.alternatives(logits[i], int(row["num_alternatives"]), MOST)
        np.testing.assert_array_equal(got.top_tokens[i], best, err_msg=str(row))
        np.testing.assert_allclose(got.top_logprobs[i], logprobs, atol=2e-5, err_msg=str(row))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_alternatives_that_are_equal_come_by_their_id(name: str) -> None:
    logits = ties(np.random.default_rng(3), (3, 1000)).astype(np.float32)
    wanted = 1, 7, MOST
    got = run(name, logits, logits, [OFF | {"num_alternatives": n} for n in wanted])
    for line, tokens, count in zip(logits, got.top_tokens, wanted, strict=True):
        np.testing.assert_array_equal(tokens, reference.alternatives(line, count, MOST)[0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    """Evenly spread points: a token gets its share, but for one at either end."""
    many = 10 * BATCH
    line = normal(np.random.default_rng(4), (47,)).astype(np.float32) / 2
    row, warm = OFF | {"top_p": 0.8}, np.repeat(line[None], BATCH, 0)
    rows = [row | {"points": (i + 0.5) / many} for i in range(many)]
    parts = [run(name, warm, warm, rows[i : i + BATCH]) for i in range(0, many, BATCH)]
    tokens = np.concatenate([part.tokens for part in parts])
    wanted = many * reference.filtered(line, row)
    counts = np.bincount(tokens, minlength=47)
    assert np.abs(counts - wanted).max() <= 1.01
    assert (counts[wanted == 0] == 0).all()
    assert (np.diff(tokens) >= 0).all()


@pytest.mark.parametrize("asked", [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.9}])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_ends_of_the_interval_fall_on_tokens_with_mass(name: str, asked: Row) -> None:
    """Rounding must never carry a draw beyond the last of them."""
    warm = removed(np.random.default_rng(5), (BATCH, 1000)).astype(np.float32)
    row, logits = OFF | asked, np.zeros_like(warm)
    p = np.array([reference.filtered(line, row) for line in warm])
    first = run(name, logits, warm, [row | {"points": 0.0}] * BATCH)
    last = run(name, logits, warm, [row | {"points": 1 - 2**-24}] * BATCH)
    np.testing.assert_array_equal(first.tokens, (p > 0).argmax(-1))
    assert (p[np.arange(BATCH), last.tokens] > 0).all()
    behind = np.arange(1000) > last.tokens[:, None]
    assert np.where(behind, p, 0.0).sum(-1).max() < 1e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_is_the_same_at_any_place_in_any_batch(name: str) -> None:
    """To the last bit."""
    warm, rows = batch(normal, 1000)
    together = run(name, warm, warm, rows)
    order = np.random.default_rng(6).permutation(len(rows))
    moved = run(name, warm[order], warm[order], [rows[i] for i in order])
    for got, wanted in zip(moved, together, strict=True):
        np.testing.assert_array_equal(got, wanted[order])
    few = run(name, warm[:3], warm[:3], rows[:3])
    for got, wanted in zip(few, together, strict=True):
        np.testing.assert_array_equal(got, wanted[:3])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_logits_that_are_no_numbers_give_a_token_that_exists(name: str) -> None:
    """A broken row is no reason to read or write beyond it, nor to spoil its neighbours."""
    warm = np.full((3, 1000), np.nan, np.float32)
    warm[1] = normal(np.random.default_rng(7), (1000,))
    rows = [OFF | ASKED[-1], OFF | {"top_k": 1}, OFF]
    got = run(name, warm, warm, rows)
    assert ((got.tokens >= 0) & (got.tokens < 1000)).all()
    assert got.tokens[1] == warm[1].argmax()


def test_the_tuning_heeds_the_vocabulary_alone() -> None:
    for vocab_size in (320, 32000, 32001, 65024, 128256, 151936):
        chosen = tuning.choose(tuning.H100, vocab_size)
        assert chosen in tuning.candidates(vocab_size)
        for size in (chosen.chunk, chosen.ways, chosen.num_warps):
            assert size & (size - 1) == 0
