"""The decode kernel, interpreted on the CPU, against the plain reference: every cut of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import decode_triton, reference, tuning
from pallas_kernels.paged_attention.tuning import (
    H100,
    DecodeTuning,
    decode_candidates,
    decode_rule,
    decode_tuning,
)
from tests.kernels.test_paged_attention import SLOPES_12, TOLERANCE, Case, arguments

BF16_TOLERANCE = 2e-2  # of values of size 1: weights and result rounded to 8 bits


def cut(splits: int = 1, turn: int = 16, *, dot: bool = True) -> DecodeTuning:
    return DecodeTuning(splits, turn, dot, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class Cut:
    """A case and how the launch is cut."""

    case: Case
    tuning: DecodeTuning = field(default_factory=cut)


MHA = Case(num_kv_heads=4, page_size=16, lengths=(1, 16, 17, 70))
GQA = Case(page_size=16, lengths=(1, 16, 17, 70))
CASES = {
    "mha, multiply and sum": Cut(MHA, cut(dot=False)),
    "mha, multiply and sum, splits": Cut(MHA, cut(4, dot=False)),
    "mha, dot, splits": Cut(MHA, cut(4)),
    "gqa, splits": Cut(GQA, cut(2)),
    "gqa of 9 over 3": Cut(Case(num_heads=9, num_kv_heads=3, lengths=(3, 40)), cut(2)),
    "mqa of 71": Cut(
        Case(num_heads=71, num_kv_heads=1, page_size=64, lengths=(1, 64, 65, 130)), cut(2, 64)
    ),
    "head_dim 80": Cut(Case(head_dim=80, page_size=16, lengths=(5, 40)), cut(2)),
    "head_dim 96": Cut(Case(head_dim=96, page_size=16, lengths=(5, 40)), cut()),
    "part of a page": Cut(Case(page_size=64, lengths=(1, 64, 65, 130)), cut(2, 16)),
    "a page of 64": Cut(Case(page_size=64, lengths=(1, 64, 65, 130)), cut(2, 64)),
    "two pages of 64": Cut(Case(page_size=64, lengths=(1, 64, 65, 200)), cut(1, 128)),
    "pages of 32": Cut(Case(page_size=32, lengths=(1, 32, 33, 100)), cut(2, 32)),
    "four pages of 16": Cut(Case(page_size=16, lengths=(1, 15, 49, 100)), cut(2, 64)),
    # at, before and after every boundary of turns and of splits
    "boundaries": Cut(
        Case(page_size=16, lengths=(15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)), cut(4)
    ),
    "more splits than turns": Cut(Case(page_size=16, lengths=(1, 16, 17, 100)), cut(16)),
    "long": Cut(Case(page_size=64, lengths=(1500, 7)), cut(4, 64)),
    "window in a turn": Cut(Case(page_size=16, window=3, lengths=(2, 17, 18, 70)), cut(2)),
    "window of one": Cut(Case(page_size=16, window=1, lengths=(1, 16, 17, 70)), cut(2)),
    "window of a page": Cut(Case(page_size=16, window=16, lengths=(16, 17, 70)), cut(2)),
    "window over pages": Cut(Case(page_size=16, window=40, lengths=(39, 41, 100)), cut(4)),
    "window, two pages a turn": Cut(Case(window=20, lengths=(19, 21, 70)), cut(2)),
    # from 257 on a position is rounded to bf16 before it is multiplied
    "alibi": Cut(
        Case(12, 12, page_size=16, alibi_slopes=SLOPES_12, lengths=(400, 300)), cut(dot=False)
    ),
    "alibi, gqa, window": Cut(
        Case(12, 4, page_size=16, window=90, alibi_slopes=SLOPES_12, lengths=(400, 20)), cut(4)
    ),
}


def decode_arguments(case: Case) -> dict[str, Any]:
    """As the shared suite's, for one query a sequence, in a page table of 64 pages and more."""
    given = arguments(case)
    table = np.asarray(given["page_table"])
    wide = np.zeros((len(table), max(64, table.shape[1])), np.int32)
    wide[:, : table.shape[1]] = table
    return {
        "q": given["q"][:, 0],
        "pool": given["pool"],
        "page_table": jnp.asarray(wide),
        "positions": given["q_positions"][:, 0],
        "scale": given["scale"],
        "window": given["window"],
        "alibi_slopes": given["alibi_slopes"],
    }


def compiled(
    given: dict[str, Any], tuning: DecodeTuning, decode: Callable[..., Any] | None = None
) -> Any:
    decode = decode or decode_triton.paged_decode
    return _jitted(partial(decode, interpret=True, tuning=tuning), given)


def wanted(given: dict[str, Any]) -> np.ndarray:
    names = ("pool", "page_table", "scale", "window", "alibi_slopes")
    tiles = {"q": given["q"][:, None], "q_positions": given["positions"][:, None]}
    tiles |= {name: given[name] for name in names}
    if given["alibi_slopes"] is None:
        return np.asarray(_jitted(reference.paged_attention, tiles))[:, 0]
    # op by op: XLA is free to leave out its roundings to bf16
    return np.asarray(reference.paged_attention(**tiles))[:, 0]


def _jitted(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Whole, as the step runs it; its machine code unoptimised, which compiles in half the time."""
    fixed = {name: given[name] for name in ("scale", "window", "alibi_slopes")}
    arrays = {name: value for name, value in given.items() if name not in fixed}
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(partial(function, **fixed), compiler_options=quick)(**arrays)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    given = decode_arguments(CASES[name].case)
    want = wanted(given)
    assert np.abs(want).max() > 0.1
    got = np.asarray(compiled(given, CASES[name].tuning))
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dot", [False, True])
def test_bf16(dot: bool) -> None:
    """The reference computes in f32 on the same rounded numbers."""
    given = decode_arguments(Case(num_kv_heads=4, page_size=16, lengths=(9, 200)))
    rounded = given | {k: given[k].astype(jnp.bfloat16) for k in ("q", "pool")}
    wide = rounded | {k: rounded[k].astype(jnp.float32) for k in ("q", "pool")}
    got = compiled(rounded, cut(2, dot=dot))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float32), wanted(wide), atol=BF16_TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_gives_zero(splits: int) -> None:
    given = decode_arguments(Case(page_size=16, window=40, lengths=(9, 30, 70)))
    positions = np.array([8, -1, 69], np.int32)
    got = np.asarray(compiled(given | {"positions": jnp.asarray(positions)}, cut(splits)))
    assert not got[1].any()
    want = wanted(given)
    np.testing.assert_allclose(got[[0, 2]], want[[0, 2]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("window", "tuning"),
    [
        (None, cut(2)),
        (None, cut(2, 32)),
        (20, cut(2)),
        (20, cut(1, 32)),
        (20, cut(2, 8, dot=False)),
    ],
)
def test_reads_nothing_that_the_query_does_not_see(
    window: int | None, tuning: DecodeTuning
) -> None:
    """NaN there: on other pages, on page 0, at the last page's end, before the window."""
    kv_heads = 2 if tuning.dot else 4
    case = Case(num_kv_heads=kv_heads, page_size=16, window=window, lengths=(5, 16, 50))
    given = decode_arguments(case)
    pool = np.full(given["pool"].shape, np.nan, np.float32)
    for row, length in zip(np.asarray(given["page_table"]), case.lengths, strict=True):
        for j in range(max(0, length - (window or length)), length):
            page, offset = row[j // 16], j % 16
            pool[page, :, :, offset] = np.asarray(given["pool"])[page, :, :, offset]
    got = np.asarray(compiled(given | {"pool": jnp.asarray(pool)}, tuning))
    np.testing.assert_allclose(got, wanted(given), atol=TOLERANCE, rtol=0)


def _first_split_only(self: Any, position: jax.Array, split: jax.Array) -> jax.Array:
    return (split == 0) & (position >= 0)


def _one_too_few(self: Any, at: jax.Array, position: jax.Array) -> jax.Array:
    return at < position


BREAKS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a split is lost": (decode_triton._Cut, "live", _first_split_only),
    "the newest key is lost": (decode_triton._Cut, "seen", _one_too_few),
    "alibi is not rounded": (decode_triton, "bf16", lambda x: x),
}


@pytest.mark.parametrize("name", BREAKS)
def test_breaking_it_shows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = Case(12, 4, page_size=16, alibi_slopes=SLOPES_12, lengths=(400, 300))
    given = decode_arguments(case)
    owner, function, broken = BREAKS[name]
    monkeypatch.setattr(owner, function, broken)
    error = np.abs(np.asarray(compiled(given, cut(4))) - wanted(given))
    assert error.max() > 20 * TOLERANCE


@dataclass(frozen=True)
class Fused:
    """What a fused launch gets, and what rotate, write and the reference make of it."""

    given: dict[str, Any]
    out: np.ndarray
    pool: np.ndarray


def fused(case: Case, rotate: bool) -> Fused:
    given = decode_arguments(case)
    random = np.random.default_rng(7)
    shape = (len(case.lengths), case.num_kv_heads, case.head_dim)
    k, v = (random.normal(size=shape).astype(np.float32) for _ in "kv")
    angles = random.uniform(0, 6.3, (len(shape), case.head_dim // 2)).astype(np.float32)
    angles = np.resize(angles, (shape[0], case.head_dim // 2))
    cos, sin = np.cos(angles), np.sin(angles)
    pool, q, key = np.array(given["pool"]), np.asarray(given["q"]), k
    if rotate:
        q, key = _turn(q, cos, sin), _turn(k, cos, sin)
    for row, table in enumerate(np.asarray(given["page_table"])):
        position = case.lengths[row] - 1
        page, offset = table[position // case.page_size], position % case.page_size
        pool[page, 0, :, offset], pool[page, 1, :, offset] = key[row], v[row]
    want = wanted(given | {"q": jnp.asarray(q), "pool": jnp.asarray(pool)})
    rotation = (jnp.asarray(cos), jnp.asarray(sin)) if rotate else None
    qkv = jnp.concatenate([given["q"], jnp.asarray(k), jnp.asarray(v)], axis=1)
    rest = {name: array for name, array in given.items() if name != "q"}
    return Fused(rest | {"qkv": qkv, "rotation": rotation}, want, pool)


def _turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    left, right = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([left * c - right * s, right * c + left * s], axis=-1)


FUSED_CASES = {
    "mha": (Cut(MHA, cut(dot=False)), True),
    "gqa, splits": (Cut(GQA, cut(4)), True),
    "mqa of 71": (
        Cut(Case(num_heads=71, num_kv_heads=1, page_size=64, lengths=(1, 65)), cut(2, 64)),
        True,
    ),
    "head_dim 80": (Cut(Case(head_dim=80, page_size=16, lengths=(1, 17, 48)), cut(1)), True),
    "window": (Cut(Case(page_size=16, window=20, lengths=(1, 20, 21, 49)), cut(2)), True),
    "window of one": (Cut(Case(page_size=16, window=1, lengths=(1, 16, 17, 49)), cut(2)), True),
    "two pages a turn": (Cut(Case(page_size=8, lengths=(1, 8, 9, 33)), cut(2)), True),
    "alibi": (Cut(Case(12, 4, page_size=16, alibi_slopes=SLOPES_12, lengths=(300, 1))), False),
}


@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_equals_rotate_write_attend(name: str) -> None:
    (how, rotate) = FUSED_CASES[name]
    case = fused(how.case, rotate)
    out, pool = compiled(case.given, how.tuning, decode_triton.paged_decode_fused)
    np.testing.assert_allclose(np.asarray(out), case.out, atol=TOLERANCE, rtol=0)
    changed = (np.asarray(pool) != np.asarray(case.given["pool"])).any(-1)
    assert changed.sum() == 2 * how.case.num_kv_heads * len(how.case.lengths)
    np.testing.assert_allclose(np.asarray(pool), case.pool, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("splits", [1, 4])
def test_fused_padding_writes_nothing(splits: int) -> None:
    case = fused(Case(page_size=16, lengths=(9, 70)), rotate=True)
    given = case.given | {"positions": jnp.asarray([8, -1], jnp.int32)}
    out, pool = compiled(given, cut(splits), decode_triton.paged_decode_fused)
    assert not np.asarray(out)[1].any()
    changed = (np.asarray(pool) != np.asarray(given["pool"])).any((1, 2, 4))
    page = int(np.asarray(given["page_table"])[0, 0])
    assert np.argwhere(changed).tolist() == [[page, 8]]


def test_tuning_takes_the_row_with_the_most_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = cut(8), cut(1)
    rows = {(H100, 5, 64, 32): few, (H100, 5, 64, 512): many, (H100, 5, 80, 8): cut(2)}
    monkeypatch.setattr(tuning, "DECODE", rows)
    assert decode_tuning(H100, 5, 64, 511) is few
    assert decode_tuning(H100, 5, 64, 4096) is many
    assert decode_tuning(H100, 5, 64, 31) == decode_rule(5, 31)
    assert decode_tuning("another card", 5, 64, 512) == decode_rule(5, 512)
    assert decode_tuning(H100, 5, 64, 512, itemsize=4) is not many


@pytest.mark.parametrize("group", [1, 4, 71])
@pytest.mark.parametrize("streams", [1, 8, 100, 4096])
def test_candidates_are_powers_of_two(group: int, streams: int) -> None:
    candidates = list(decode_candidates(group, streams))
    assert len(set(candidates)) == len(candidates)
    for one in [*candidates, decode_rule(group, streams), decode_tuning("", group, 64, streams, 4)]:
        assert all(n & (n - 1) == 0 for n in (one.splits, one.turn, one.num_warps))
        assert one.dot or group == 1
