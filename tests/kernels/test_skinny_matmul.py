"""Every implementation of the skinny matmuls against the plain reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_matmul import api, pallas_triton, tuning
from pallas_kernels.skinny_matmul.cases import MODELS
from pallas_kernels.skinny_matmul.operands import Norm
from pallas_kernels.skinny_matmul.tuning import Tile

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest; a sum of a few hundred terms
EPS, F32 = 1e-5, jnp.dtype(jnp.float32)


@dataclass(frozen=True)
class Case:
    """Operands [t, k] @ [k, n] and how a kernel cuts them."""

    t: int
    k: int
    n: int
    tile: Tile
    dtype: str = "float32"
    kind: Literal["rms", "layer"] = "rms"
    delta: bool = False


CASES = {
    "one row": Case(1, 128, 64, Tile(1, 32, 32, 2, 4, 1)),
    "one row, bf16": Case(1, 128, 64, Tile(1, 32, 32, 2, 4, 1), dtype="bfloat16", delta=True),
    "three rows of four": Case(3, 72, 48, Tile(4, 32, 16, 2, 4, 1), kind="layer", delta=True),
    "three rows of sixteen": Case(3, 64, 64, Tile(16, 32, 32, 1, 4, 2), delta=True),
    "eight rows": Case(8, 256, 64, Tile(16, 64, 64, 4, 4, 2)),
    "splits that do not divide": Case(8, 224, 64, Tile(16, 64, 32, 3, 4, 2), kind="layer"),
    "more splits than steps": Case(8, 64, 64, Tile(16, 64, 32, 3, 4, 2)),
    "odd widths": Case(8, 71 * 3, 73 * 2, Tile(16, 64, 32, 2, 4, 2), kind="layer", delta=True),
    "bf16": Case(8, 192, 64, Tile(16, 32, 64, 2, 4, 2), dtype="bfloat16", delta=True),
    "bf16, layer": Case(8, 192, 48, Tile(16, 32, 64, 2, 4, 2), dtype="bfloat16", kind="layer"),
    "sixty-four rows": Case(64, 128, 64, Tile(64, 32, 64, 2, 4, 2)),
    "blocks of rows": Case(40, 64, 64, Tile(16, 32, 32, 2, 4, 2), kind="layer", delta=True),
}


class Operands(NamedTuple):
    x: jax.Array  # [T, K]
    gate_up: jax.Array  # [T, 2 K]
    w: jax.Array  # [K, N]
    pair: jax.Array  # [K, 2 N]
    residual: jax.Array  # [T, N]
    weight: jax.Array  # [N], the norm's
    bias: jax.Array | None
    delta: jax.Array | None  # [T, N]
    pair_delta: jax.Array | None  # [T, 2 N]


Results = dict[str, Any]  # by the interface's names


def operands(case: Case) -> Operands:
    random = np.random.default_rng(case.t * case.k * case.n)

    def draw(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray((scale * random.normal(size=shape)).astype(case.dtype))

    return Operands(
        x=draw(case.t, case.k),
        gate_up=draw(case.t, 2 * case.k),
        w=draw(case.k, case.n, scale=case.k**-0.5),
        pair=draw(case.k, 2 * case.n, scale=case.k**-0.5),
        residual=draw(case.t, case.n),
        weight=draw(case.n),
        bias=draw(case.n) if case.kind == "layer" else None,
        delta=draw(case.t, case.n) if case.delta else None,
        pair_delta=draw(case.t, 2 * case.n) if case.delta else None,
    )


def compiled(function: Callable[[Operands], Results], o: Operands) -> Results:
    """Not optimised, which takes half the time: these are small arrays."""
    lowered = jax.jit(function).lower(o)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(o)


def wanted(case: Case) -> Results:
    return compiled(functools.partial(_by_api, case.kind, "reference"), operands(case))


def _by_api(kind: Any, implementation: api.Implementation, o: Operands) -> Results:
    """Every function of the interface, by one implementation."""
    norm = Norm(kind, o.weight, EPS, o.bias)

    def use(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(api, name)(*arguments, implementation=implementation, **options)

    partials = use("split_matmul", o.x, o.w)
    return {
        "matmul": use("matmul", o.x, o.w),
        "matmul, transposed": use("matmul", o.x, o.w.T, transposed=True, out_dtype=F32),
        "matmul_swiglu": use("matmul_swiglu", o.x, o.pair, o.pair_delta),
        "reduce_add_norm": use("reduce_add_norm", partials, o.residual, norm, o.delta),
        "matmul_add_norm": use("matmul_add_norm", o.x, o.w, o.residual, norm, o.delta),
        "swiglu_matmul_add_norm": use(
            "swiglu_matmul_add_norm", o.gate_up, o.w, o.residual, norm, o.delta
        ),
    }


def _by_tile(case: Case, o: Operands) -> Results:
    """The kernels, cut as the case says."""
    tile, norm = case.tile, Norm(case.kind, o.weight, EPS, o.bias)
    whole = replace(tile, splits=1)
    turned = pallas_triton.matmul(o.x, o.w.T, tile, transposed=True, out_dtype=F32, interpret=True)
    partials = pallas_triton.split_matmul(o.x, o.w, tile, interpret=True)
    activated = pallas_triton.split_matmul(o.gate_up, o.w, tile, activated=True, interpret=True)
    add_norm = functools.partial(
        pallas_triton.reduce_add_norm,
        residual=o.residual,
        norm=norm,
        delta=o.delta,
        interpret=True,
    )
    return {
        "matmul": pallas_triton.matmul(o.x, o.w, tile, interpret=True),
        "matmul, transposed": turned,
        "matmul_swiglu": pallas_triton.matmul_swiglu(
            o.x, o.pair, whole, o.pair_delta, interpret=True
        ),
        "matmul_add_norm": add_norm(partials),
        "swiglu_matmul_add_norm": add_norm(activated),
    }


def assert_close(got: Any, wanted: Any, dtype: str) -> None:
    """Arrays, or tuples of arrays."""
    if isinstance(got, tuple):
        for mine, theirs in zip(got, wanted, strict=True):
            assert_close(mine, theirs, dtype)
        return
    assert got.dtype == wanted.dtype
    wide = np.asarray(wanted, np.float32)
    limit = TOLERANCE[dtype] * max(1.0, np.abs(wide).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), wide, atol=limit, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name: str) -> None:
    case = CASES[name]
    got = compiled(functools.partial(_by_tile, case), operands(case))
    for function, reference in wanted(case).items():
        if function in got:
            assert_close(got[function], reference, case.dtype)


# The interface. -----------------------------------------------------------------------------------

WHOLE = Case(8, 256, 128, Tile(16, 64, 64, 2, 4, 2), delta=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_implementations_equal_the_reference(
    implementation: api.Implementation, dtype: str
) -> None:
    case = replace(WHOLE, dtype=dtype)
    got = compiled(functools.partial(_by_api, case.kind, implementation), operands(case))
    for function, reference in wanted(case).items():
        assert_close(got[function], reference, dtype)


def test_rows_beyond_the_tuning_are_xlas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_triton, "_multiply", None)
    case = replace(WHOLE, t=tuning.MAX_ROWS + 1)
    got = compiled(functools.partial(_by_api, case.kind, "pallas_interpret"), operands(case))
    for function, reference in wanted(case).items():
        assert_close(got[function], reference, case.dtype)


def test_what_was_measured_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    key, tile = ("matmul", tuning.H100, 3, 64, 64, 2), Tile(4, 32, 32, 2, 4, 1)
    monkeypatch.setattr(tuning, "MEASURED", {(tuning.H100, "matmul", 4, 64, 64): tile})
    assert tuning.choose(*key) == tile
    monkeypatch.setattr(tuning, "MEASURED", {(tuning.H100, "matmul", 4, 64, 64): tuning.XLA})
    assert tuning.choose(*key) == tuning.XLA


def test_many_rows_are_activated_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the tuning's limit the activation is a launch of its own; the product stays ours."""
    monkeypatch.setattr(tuning, "MAX_SWIGLU_ROWS", WHOLE.t - 1)
    activated = []
    multiply = pallas_triton._multiply
    monkeypatch.setattr(
        pallas_triton,
        "_multiply",
        lambda product, *rest: activated.append(product.activated) or multiply(product, *rest),
    )
    o = operands(WHOLE)
    got = api.swiglu_matmul_add_norm(
        o.gate_up,
        o.w,
        o.residual,
        Norm(WHOLE.kind, o.weight, EPS),
        o.delta,
        implementation="pallas_interpret",
    )
    assert activated == [False]
    assert_close(got, wanted(WHOLE)["swiglu_matmul_add_norm"], WHOLE.dtype)


@pytest.mark.parametrize("shape", [(3, 40), (tuning.WARM_ROWS + 8, 9000)])
def test_warming_the_next_weight_changes_nothing(shape: tuple[int, int]) -> None:
    o = operands(WHOLE)
    arguments = o.w[None, :8, :], o.residual, Norm(WHOLE.kind, o.weight, EPS), o.delta
    sum_alone = pallas_triton.reduce_add_norm(*arguments, interpret=True)
    next_weight = jnp.ones(shape, jnp.bfloat16)
    warming = pallas_triton.reduce_add_norm(*arguments, next_weight=next_weight, interpret=True)
    for mine, theirs in zip(warming, sum_alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# What must not pass. ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one row", "odd widths"])
def test_every_weight_counts(name: str) -> None:
    """The last row and column too: a dropped tail of K or N is the classic error of odd widths."""
    case = CASES[name]
    ones = jnp.ones((case.t, case.k)), jnp.ones((case.k, case.n))
    got = pallas_triton.matmul(*ones, case.tile, interpret=True)
    np.testing.assert_array_equal(got, np.full((case.t, case.n), case.k))


def test_broken_operands_show() -> None:
    """A dropped split, gate for up, a residual of another row, a forgotten delta."""
    case = CASES["bf16"]
    good = operands(case)
    gate, up = jnp.split(good.pair, 2, axis=1)
    first, second = jnp.split(good.gate_up, 2, axis=1)
    half = case.k // case.tile.splits
    broken = good._replace(
        w=good.w.at[half:].set(0),
        pair=jnp.concatenate([up, gate], axis=1),
        gate_up=jnp.concatenate([second, first], axis=1),
        residual=jnp.roll(good.residual, 1, axis=0),
        delta=None,
    )
    got = compiled(functools.partial(_by_tile, case), broken)
    for function, reference in wanted(case).items():
        if function in got:
            with pytest.raises(AssertionError):
                assert_close(got[function], reference, case.dtype)


# The tuning. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("op", ["matmul", "split_matmul", "swiglu_split_matmul"])
def test_the_default_rule_fills_the_card(op: tuning.Op, rows: int) -> None:
    for k, n in (weight for model in MODELS.values() for weight in model[:-1]):
        tile = tuning.default_tile(op, rows, k, n, 2)
        programs = -(-n // tile.block_n) * -(-rows // tile.block_t) * tile.splits
        assert programs >= 120, (k, n, tile)
        assert tile in tuning.candidates(op, rows, k, n)
