"""Every implementation of grouped LoRA against the plain reference, on banks written as in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_lora import reference, xla
from pallas_kernels.grouped_lora.api import ProjectionPages

GroupedLora = Callable[[jax.Array, jax.Array, ProjectionPages, int], jax.Array]
IMPLEMENTATIONS: Mapping[str, GroupedLora] = {"xla": xla.grouped_lora}
RANK_PAGE = 8
LAYER, NUM_LAYERS = 1, 2
TOLERANCE = 1e-5  # of the largest: f32, two sums of at most a few thousand terms


@dataclass(frozen=True)
class Case:
    ranks: tuple[int, ...]  # one a block; 0 is the base model
    d_in: int = 24
    d_out: int = 40
    rows: int = 1  # of a block


CASES = {
    "rank 1": Case((1,)),
    "rank 8": Case((8,)),
    "rank 9": Case((9,)),
    "rank 256": Case((256,)),
    "mixed ranks": Case((1, 256, 16, 0, 64, 7, 128, 33)),
    "chunks": Case((16, 0, 40), rows=16),
    "only the base": Case((0, 0, 0)),
    "falcon 7b's width": Case((16, 3), d_in=4544, d_out=4672),
    "odd widths": Case((5, 24), d_in=31, d_out=71),
    "wide, one by one": Case((16, 0, 3, 200), d_out=20_000),
    "wide, only the base": Case((0, 0, 0, 0), d_out=20_000),
    "wide chunks": Case((3, 0, 24, 9), d_out=20_000, rows=4),
}


@dataclass(frozen=True)
class Built:
    x: jax.Array
    pages: ProjectionPages
    wanted: np.ndarray  # f64, from the whole matrices, before they were cut into pages


def build(case: Case, seed: int = 0) -> Built:
    """Pages are shuffled, page 0 is zeros, layers but one hold noise."""
    random = np.random.default_rng(seed)
    counts = [-(-rank // RANK_PAGE) for rank in case.ranks]
    width = -(-max(*counts, 2) // 2) * 2
    num_pages = sum(counts) + 3
    pools = [
        random.normal(size=(num_pages, NUM_LAYERS, RANK_PAGE, d)).astype(np.float32)
        for d in (case.d_in, case.d_out)
    ]
    for pool in pools:
        pool[0] = 0.0
    tables = np.zeros((2, len(counts), width), np.int32)
    orders = [iter(random.permutation(np.arange(1, num_pages)).tolist()) for _ in pools]
    x = random.normal(size=(len(counts) * case.rows, case.d_in)).astype(np.float32)
    scale = random.uniform(0.5, 3.0, len(counts)).astype(np.float32)
    wanted = np.zeros((x.shape[0], case.d_out))
    for b, (rank, count) in enumerate(zip(case.ranks, counts, strict=True)):
        sides = []
        for side, (pool, order) in enumerate(zip(pools, orders, strict=True)):
            matrix = random.normal(size=(rank, pool.shape[-1])).astype(np.float32)
            padded = np.zeros((count * RANK_PAGE, pool.shape[-1]), np.float32)
            padded[:rank] = matrix
            ids = [next(order) for _ in range(count)]
            pool[ids, LAYER] = padded.reshape(count, RANK_PAGE, pool.shape[-1])
            tables[side, b, :count] = ids
            sides.append(matrix.astype(np.float64))
        block = slice(b * case.rows, (b + 1) * case.rows)
        wanted[block] = x[block] @ sides[0].T @ sides[1] * scale[b]
    pages = ProjectionPages(
        a_pool=jnp.asarray(pools[0]),
        b_pool=jnp.asarray(pools[1]),
        a_pages=jnp.asarray(tables[0]),
        b_pages=jnp.asarray(tables[1]),
        num_pages=jnp.int32(max(counts)),
        scale=jnp.asarray(scale),
    )
    return Built(jnp.asarray(x), pages, wanted)


def compiled(lora: GroupedLora, built: Built) -> np.ndarray:
    """What it adds to zeros; ``test_it_adds_to_what_is_there`` covers the rest."""
    zeros = jnp.zeros(built.wanted.shape, jnp.float32)
    step = jax.jit(lambda y, x, pages: lora(y, x, pages, LAYER))
    return np.asarray(step(zeros, built.x, built.pages))


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * max(1.0, np.abs(wanted).max()), rtol=0)


@pytest.fixture(params=IMPLEMENTATIONS)
def lora(request: pytest.FixtureRequest) -> GroupedLora:
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(lora: GroupedLora, name: str) -> None:
    built = build(CASES[name])
    got = compiled(lora, built)
    assert_close(
        got, np.asarray(reference.grouped_lora(jnp.zeros_like(got), built.x, built.pages, LAYER))
    )
    assert_close(got, built.wanted)


def test_it_adds_to_what_is_there(lora: GroupedLora) -> None:
    built = build(Case((16, 0, 3)))
    y = np.random.default_rng(1).normal(size=built.wanted.shape).astype(np.float32)
    got = np.asarray(lora(jnp.asarray(y), built.x, built.pages, LAYER))
    assert_close(got, y + built.wanted)
    np.testing.assert_array_equal(got[1], y[1])


def test_a_base_row_is_untouched(lora: GroupedLora) -> None:
    """Exactly zero: a base row in a mixed batch gets the bits it gets alone."""
    got = compiled(lora, build(Case((16, 0, 256, 0))))
    assert not got[1].any()
    assert not got[3].any()
    assert got[0].any()
    assert got[2].any()


def test_a_row_does_not_depend_on_its_neighbours(lora: GroupedLora) -> None:
    built = build(Case((16, 8, 200, 3)))
    whole = compiled(lora, built)
    for b in range(4):
        pages = built.pages
        one = slice(b, b + 1)
        alone = pages._replace(
            a_pages=pages.a_pages[one], b_pages=pages.b_pages[one], scale=pages.scale[one]
        )
        assert_close(compiled(lora, Built(built.x[one], alone, built.wanted[one])), whole[one])


def test_swapping_a_for_b_shows(lora: GroupedLora) -> None:
    """On square projections nothing but the numbers tells A from B."""
    built = build(Case((16, 4), d_in=32, d_out=32))
    p = built.pages
    swapped = p._replace(a_pool=p.b_pool, b_pool=p.a_pool, a_pages=p.b_pages, b_pages=p.a_pages)
    got = compiled(lora, Built(built.x, swapped, built.wanted))
    assert np.abs(got - built.wanted).max() > 0.1 * np.abs(built.wanted).max()
