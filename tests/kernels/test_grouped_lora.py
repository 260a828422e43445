"""Every implementation of grouped LoRA against the plain reference, on banks written as in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_lora import pallas_triton, reference, tuning, xla
from pallas_kernels.grouped_lora.cases import (
    SHAPES,
    Built,
    Case,
    Shape,
    build,
    cases,
    empty_group_cases,
)
from pallas_kernels.grouped_lora.operands import RowBlocks, SitePages
from pallas_kernels.grouped_lora.tuning import ExpandTuning, ShrinkTuning, Tuning, TuningKey

CASES = cases()
F32_CASES = [name for name in CASES if name != "head"]  # its logits are f32, its input is bf16
LAYER = 1
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
F32_TOLERANCE = 1e-5  # of the largest: two sums of at most a few thousand terms
BF16_TOLERANCE = 1e-2  # h and y are rounded to 8 bits

# A launch's programs differ by where the work is cut: rows one by one or not, D in splits and
# turns, ranks in lanes and tiles wider than a page pair, columns in tiles with and without a tail
# and those in parts.
BY_ROW = Tuning(
    ShrinkTuning(splits=3, lanes=1, block_r=16, block_k=32, num_warps=2, num_stages=1),
    ExpandTuning(block_n=256, block_r=16, num_warps=4, num_stages=1, wide_r=32),
    single=True,
)
BY_BLOCK = Tuning(
    ShrinkTuning(splits=1, lanes=2, block_r=64, block_k=64, num_warps=4, num_stages=2),
    ExpandTuning(block_n=128, block_r=16, num_warps=1, num_stages=2, wide_r=32),
    single=False,
)
GroupedLora = Callable[..., jax.Array]


def xla_site(
    y: jax.Array, x: jax.Array, site: SitePages, blocks: RowBlocks, layer: int, block_rows: int
) -> jax.Array:
    """xla takes T / NB consecutive rows a block; here every row is one, with or without adapter."""
    row = jnp.arange(x.shape[0])
    inside = (blocks.first[:, None] <= row) & (row < (blocks.first + blocks.count)[:, None])
    block, owned = jnp.argmax(inside, axis=0), inside.any(axis=0)
    by_row = site._replace(
        tables=jnp.where(owned[:, None, None, None], site.tables[block], 0),
        num_pages=jnp.where(owned[:, None], site.num_pages[block], 0),
        scale=site.scale[block],
    )
    ends = np.cumsum([pool.shape[-1] for pool in site.b_pools])
    added = (
        xla.grouped_lora(part, x, by_row.projection(i, layer), layer)
        for i, part in enumerate(jnp.split(y, ends[:-1], axis=1))
    )
    return jnp.concatenate(list(added), axis=1)


def triton_site(how: Tuning, *operands: Any, block_rows: int) -> jax.Array:
    return pallas_triton.grouped_lora(*operands, block_rows=block_rows, interpret=True, tuning=how)


IMPLEMENTATIONS: Mapping[str, GroupedLora] = {
    "xla": xla_site,
    "pallas_triton by row": partial(triton_site, BY_ROW),
    "pallas_triton by block": partial(triton_site, BY_BLOCK),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@partial(jax.jit, static_argnames=("name", "shape"), compiler_options=QUICK)
def run(name: str, shape: Shape, y: jax.Array, x: jax.Array, arrays: dict[str, Any]) -> jax.Array:
    """Compiled once a shape: cases are data."""
    site, blocks = operands(shape, arrays)
    return IMPLEMENTATIONS[name](y, x, site, blocks, LAYER, block_rows=shape.block_rows)


def operands(shape: Shape, arrays: dict[str, Any]) -> tuple[SitePages, RowBlocks]:
    site = SitePages(
        a_pool=arrays["a_pool"],
        b_pools=tuple(arrays["b_pools"][n] for n in shape.widths),
        tables=arrays["tables"],
        num_pages=arrays["num_pages"],
        scale=arrays["scale"],
        rows=tuple(range(len(shape.widths))),
    )
    return site, RowBlocks(arrays["first"], arrays["count"])


def result(name: str, shape: Shape, built: Built) -> np.ndarray:
    return np.asarray(run(name, shape, built.y, built.x, built.arrays()))


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float = F32_TOLERANCE) -> None:
    atol = tolerance * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=atol, rtol=0)


def assert_right(got: np.ndarray, built: Built) -> None:
    """And rows that are in no block have the bits they had."""
    assert_close(got, built.wanted)
    untouched = (built.wanted == built.y).all(axis=1)
    np.testing.assert_array_equal(got[untouched], built.y[untouched])


@pytest.mark.parametrize("case", F32_CASES)
def test_equals_the_reference(name: str, case: str) -> None:
    shape, rows = SHAPES[CASES[case][0]], CASES[case][1]
    built = build(shape, rows)
    assert_right(result(name, shape, built), built)
    site, blocks = operands(shape, built.arrays())
    assert_close(reference.grouped_lora(built.y, built.x, site, blocks, LAYER), built.wanted)


def test_every_pattern_of_empty_groups(name: str) -> None:
    shape = SHAPES["grouped q, k, v"]
    for case in empty_group_cases(4, rows=6, rank=9, width=3):
        built = build(shape, case)
        assert_right(result(name, shape, built), built)


def test_every_rank(name: str) -> None:
    """16 adapters at once, of 16 ranks that are far apart."""
    shape = SHAPES["one projection"]
    for start in range(1, 17):
        ranks = range(start, 257, 16)
        built = build(shape, Case((1, 2) * 8, tuple((rank,) for rank in ranks)))
        assert_right(result(name, shape, built), built)


@pytest.mark.parametrize("case, y_dtype", [("mixed ranks", jnp.bfloat16), ("head", jnp.float32)])
def test_bf16(name: str, case: str, y_dtype: Any) -> None:
    shape = SHAPES[CASES[case][0]]
    built = build(shape, CASES[case][1])
    y, x = jnp.asarray(built.y, y_dtype), jnp.asarray(built.x, jnp.bfloat16)
    arrays = built.arrays(jnp.bfloat16)
    got = run(name, shape, y, x, arrays)
    assert got.dtype == y_dtype
    site, blocks = operands(shape, arrays)
    wanted = reference.grouped_lora(y, x, site, blocks, LAYER)
    assert_close(np.asarray(got, np.float64), wanted, BF16_TOLERANCE)


def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    shape = SHAPES["one projection"]
    built = build(shape, Case((3, 1, 4), ((16,), (200,), (5,))))
    whole = result(name, shape, built)
    for b in range(3):
        count = np.where(np.arange(shape.num_blocks) == b, built.tables.count, 0)
        alone = replace(built, tables=replace(built.tables, count=count.astype(np.int32)))
        rows = slice(built.tables.first[b], built.tables.first[b] + count[b])
        np.testing.assert_array_equal(result(name, shape, alone)[rows], whole[rows])


def test_swapping_a_for_b_shows(name: str) -> None:
    """On square projections nothing but the numbers tells A from B."""
    shape = SHAPES["q, k, v of equal width"]
    built = build(shape, Case((5, 1), ((16, 9, 3), (1, 16, 16))))
    swapped = replace(
        built,
        a_pool=built.b_pools[64],
        b_pools={64: built.a_pool},
        tables=replace(built.tables, tables=built.tables.tables[:, :, ::-1]),
    )
    off = np.abs(result(name, shape, swapped) - built.wanted).max()
    assert off > 0.1 * np.abs(built.wanted).max()


def test_dropping_a_block_shows(name: str) -> None:
    shape = SHAPES["q, k, v of equal width"]
    built = build(shape, Case((5, 1), ((16, 9, 3), (1, 16, 16))))
    built.tables.count[1] = 0
    got = result(name, shape, built)
    assert_close(got[:5], built.wanted[:5])
    np.testing.assert_array_equal(got[5], built.y[5])


@pytest.mark.parametrize("name", ["pallas_triton by row", "pallas_triton by block"])
def test_what_a_block_does_not_have_is_not_read(name: str) -> None:
    """NaN behind every table entry past the rank, in rows of no block, in an empty block's rows."""
    shape = SHAPES["grouped q, k, v"]
    case = Case((9, 0, 1), ((64, 8, 1), (8, 8, 8), (24, 0, 17)), base_rows=2)
    built = build(shape, case)
    t = built.tables
    unowned = shape.num_pages - 1
    for b, i in np.ndindex(*t.num_pages.shape):
        t.tables[b, i, :, t.num_pages[b, i] :] = unowned
    t.first[1] = 23
    t.scale[1] = t.scale[3:] = np.nan
    built.x[:2] = built.x[12:] = np.nan
    assert_right(result(name, shape, built), built)


@pytest.mark.parametrize("width", [40, 20_000])
def test_xla_takes_blocks_of_many_rows(width: int) -> None:
    shape = Shape(24, (width,), num_tokens=12, num_blocks=3, max_rank=32, block_rows=4)
    built = build(shape, Case((4, 4, 4), ((3,), (0,), (24,))))

    def lora(y: jax.Array, x: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        site, _ = operands(shape, arrays)
        return xla.grouped_lora(y, x, site.projection(0, LAYER), LAYER)

    assert_right(np.asarray(jax.jit(lora)(built.y, built.x, built.arrays())), built)


def test_the_measured_row_with_the_least_room_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(num_tokens: int, max_rank: int, device_kind: str = "card") -> TuningKey:
        return TuningKey(device_kind, 2, num_tokens, 16, 64, max_rank, (64,))

    measured = {key(8, 16): BY_ROW, key(64, 16): BY_BLOCK, key(64, 64): BY_ROW}
    monkeypatch.setattr(tuning, "MEASURED", measured)
    assert tuning.choose(key(9, 16)) is BY_BLOCK
    assert tuning.choose(key(8, 32)) is BY_ROW
    for unknown in (key(65, 16), key(8, 16, "another")):
        assert tuning.choose(unknown) == tuning.rule(unknown)


@pytest.mark.parametrize("num_tokens, max_rank", product((512, 2048), (16, 64)))
def test_few_prompts_are_cut_into_more_programs_than_many(num_tokens: int, max_rank: int) -> None:
    """Llama-2-7B's sites on an H100: 2048 tokens are 32 blocks, and the card has 132 processors."""
    for widths in ((4096,) * 3, (4096,)):
        how = tuning.choose(TuningKey(tuning.H100, 2, num_tokens, 64, 4096, max_rank, widths))
        assert how.shrink.splits >= 4


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("d_in", [64, 4544, 18176])
def test_a_rule_has_sizes_that_a_kernel_can_have(itemsize: int, block_rows: int, d_in: int) -> None:
    for num_tokens, max_rank in product((1, 8, 64, 256, 2048), (8, 16, 64, 256)):
        widths = 4672, 71, 31
        how = tuning.rule(TuningKey("", itemsize, num_tokens, block_rows, d_in, max_rank, widths))
        expand = how.expand.block_r, how.expand.wide_r, how.expand.block_n
        powers = how.shrink.block_r, how.shrink.block_k, *expand
        assert all(n >= 16 and n & (n - 1) == 0 for n in powers)
        turns = -(-d_in // (how.shrink.splits * how.shrink.block_k))
        assert (how.shrink.splits - 1) * turns * how.shrink.block_k < d_in, "a split has no work"
