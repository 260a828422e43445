"""Every implementation of paged attention against the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import reference, xla

Attention = Callable[..., jax.Array]
IMPLEMENTATIONS: Mapping[str, Attention] = {"xla": xla.paged_attention}
TOLERANCE = 2e-5  # f32: sums of up to 400 terms of size 1, in another order


@dataclass(frozen=True)
class Case:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 8
    tile: int = 1
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    lengths: tuple[int, ...] = (1, 8, 9, 37)  # tokens a tile's sequence has, its queries included


SLOPES_12 = tuple(2.0 ** -(0.5 * i) for i in range(1, 13))  # most have no short binary form
CASES = {
    "mha": Case(num_kv_heads=4),
    "gqa": Case(),
    "mqa": Case(num_heads=6, num_kv_heads=1),
    "head_dim 80": Case(head_dim=80),
    "gqa of 9 over 3": Case(num_heads=9, num_kv_heads=3),
    "tiles": Case(tile=4, lengths=(4, 8, 13, 37)),
    "tiles, mqa": Case(tile=8, num_heads=3, num_kv_heads=1, lengths=(8, 16, 33)),
    "window in a page": Case(window=3),
    "window of a page": Case(window=8),
    "window over pages": Case(window=20),
    "window, tiles": Case(window=5, tile=4, lengths=(5, 12, 30)),
    "window beyond": Case(window=100),
    "alibi": Case(num_heads=12, num_kv_heads=12, alibi_slopes=SLOPES_12, lengths=(2, 40)),
    # from 257 on a position is rounded to bf16 before it is multiplied
    "alibi, long": Case(num_heads=12, num_kv_heads=12, alibi_slopes=SLOPES_12, lengths=(400, 300)),
    "alibi, gqa, tiles": Case(alibi_slopes=(0.5, 0.25, 0.125, 0.3), tile=4, lengths=(9, 30)),
    "page of 64": Case(page_size=64, lengths=(1, 64, 65, 130)),
}


def arguments(case: Case, seed: int = 0) -> dict[str, Any]:
    """Sequences on shuffled pages; all other pages, and the ends of last ones, hold noise."""
    random = np.random.default_rng(seed)
    pages = [-(-n // case.page_size) for n in case.lengths]
    num_pages = sum(pages) + 3
    free = iter(random.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(pages), max(pages) + 2), np.int32)
    for row, count in zip(table, pages, strict=True):
        row[:count] = [next(free) for _ in range(count)]
    positions = [np.arange(n - case.tile, n) for n in case.lengths]
    pool = (num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim)
    return {
        "q": _normal(random, (len(pages), case.tile, case.num_heads, case.head_dim)),
        "pool": _normal(random, pool),
        "page_table": jnp.asarray(table),
        "q_positions": jnp.asarray(np.stack(positions), jnp.int32),
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "alibi_slopes": case.alibi_slopes,
    }


def _normal(random: np.random.Generator, dims: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(random.normal(size=dims), jnp.float32)


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request: pytest.FixtureRequest) -> Attention:
    return IMPLEMENTATIONS[request.param]


def compiled(attention: Attention, given: dict[str, Any]) -> np.ndarray:
    """As the step runs it: whole, under jit, where XLA may fuse and drop roundings."""
    fixed = {k: given[k] for k in ("scale", "window", "alibi_slopes")}
    arrays = {k: v for k, v in given.items() if k not in fixed}
    return np.asarray(jax.jit(partial(attention, **fixed))(**arrays))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(attention: Attention, name: str) -> None:
    given = arguments(CASES[name])
    want = np.asarray(reference.paged_attention(**given))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(compiled(attention, given), want, atol=TOLERANCE, rtol=0)


def test_reference_is_softmax_over_the_sequence() -> None:
    """The oracle itself, for one query, in plain numpy."""
    case = Case(num_heads=4, num_kv_heads=2, lengths=(13,), window=6)
    given = arguments(case)
    pages, pool = np.asarray(given["page_table"])[0], np.asarray(given["pool"])
    keys, values = (
        np.stack([pool[pages[j // 8], side, :, j % 8] for j in range(7, 13)]) for side in (0, 1)
    )
    got = np.asarray(reference.paged_attention(**given))[0, 0]
    for head, query in enumerate(np.asarray(given["q"])[0, 0]):
        scores = keys[:, head // 2] @ query * given["scale"]
        weights = np.exp(scores - scores.max())
        want = weights / weights.sum() @ values[:, head // 2]
        np.testing.assert_allclose(got[head], want, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 5])
def test_padded_queries_give_zero(attention: Attention, window: int | None) -> None:
    given = arguments(Case(tile=4, window=window, lengths=(9, 30, 17)))
    whole = compiled(attention, given)
    positions = np.array(given["q_positions"])
    positions[0, 2:] = -1
    positions[2] = -1  # a tile of nothing else
    padded = compiled(attention, given | {"q_positions": jnp.asarray(positions)})
    assert not padded[positions < 0].any()
    np.testing.assert_allclose(padded[positions >= 0], whole[positions >= 0], atol=TOLERANCE)


def test_only_padding_gives_zero(attention: Attention) -> None:
    given = arguments(Case())
    nobody = jnp.full_like(given["q_positions"], -1)
    assert not compiled(attention, given | {"q_positions": nobody}).any()


def test_reads_nothing_beyond_the_sequence(attention: Attention) -> None:
    """Other numbers wherever no query may see: another page, page 0, the last page's end."""
    case = Case(tile=2, lengths=(5, 12))
    given = arguments(case)
    pool = np.array(given["pool"])
    mine = np.zeros((pool.shape[0], case.page_size), bool)
    for row, length in zip(np.asarray(given["page_table"]), case.lengths, strict=True):
        for j in range(length):
            mine[row[j // case.page_size], j % case.page_size] = True
    finite = np.where(mine[:, None, None, :, None], pool, 0.0)
    huge = np.where(mine[:, None, None, :, None], pool, 1e4)
    got = [compiled(attention, given | {"pool": jnp.asarray(p)}) for p in (finite, huge)]
    np.testing.assert_array_equal(got[0], got[1])
