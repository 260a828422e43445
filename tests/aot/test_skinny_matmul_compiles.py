"""The skinny matmuls compile for an H100 at served shapes, in as few launches as promised."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.skinny_matmul import api, tuning  # noqa: E402
from pallas_kernels.skinny_matmul.cases import MODELS, Model  # noqa: E402
from pallas_kernels.skinny_matmul.operands import Norm  # noqa: E402

ROWS = (1, 8, 64, tuning.MAX_ROWS)
WHOLE_ROWS = (1, 8, 64, tuning.MAX_WHOLE_ROWS)  # products without splits
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton"'


class Compiler:
    """Compiles functions of arrays, given by their dims and dtype, for one H100."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def kernels(self, function: Callable[..., Any], *operands: jax.ShapeDtypeStruct) -> list[str]:
        """What the entry computation launches: "ours", or what XLA calls its own."""
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            text = jax.jit(function).lower(*operands).compile().as_text()
        entry = text[text.index("\nENTRY") :]
        lines = [line for line in entry.splitlines() if re.search(r" (fusion|custom-call)\(", line)]
        return ["ours" if KERNEL in line else line.strip() for line in lines]

    def array(self, *dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            dims, dtype, sharding=NamedSharding(self._mesh, PartitionSpec())
        )


@pytest.fixture(scope="module")
def compiler(h100: Mesh) -> Compiler:
    return Compiler(h100)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture(params=[name for name, model in MODELS.items() if model.gated])
def gated(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


def norm_of(model: Model, weight: jax.Array) -> Norm:
    return Norm("rms", weight, 1e-5) if model.gated else Norm("layer", weight, 1e-5, weight)


@pytest.mark.parametrize("rows", WHOLE_ROWS)
def test_a_product_is_one_launch_and_at_most_one_sum(
    compiler: Compiler, model: Model, rows: int
) -> None:
    for weight in (model.qkv, model.out, model.up):
        x, w = compiler.array(rows, weight.k), compiler.array(*weight)
        got = compiler.kernels(lambda x, w: api.matmul(x, w, implementation="pallas"), x, w)
        assert got[0] == "ours"
        assert len(got) <= 2


@pytest.mark.parametrize("rows", WHOLE_ROWS)
def test_the_head_gives_f32_in_one_launch(compiler: Compiler, model: Model, rows: int) -> None:
    def head(x: jax.Array, w: jax.Array) -> jax.Array:
        return api.matmul(
            x, w, implementation="pallas", transposed=True, out_dtype=jnp.dtype(jnp.float32)
        )

    x, w = compiler.array(rows, model.head.k), compiler.array(*model.head[::-1])
    assert compiler.kernels(head, x, w) == ["ours"]


@pytest.mark.parametrize("rows", WHOLE_ROWS)
def test_gate_and_up_with_their_activation_are_one_launch(
    compiler: Compiler, gated: Model, rows: int
) -> None:
    x, w = compiler.array(rows, gated.up.k), compiler.array(*gated.up)
    delta = compiler.array(rows, gated.up.n)

    def gate_up(x: jax.Array, w: jax.Array, delta: jax.Array | None = None) -> jax.Array:
        return api.matmul_swiglu(x, w, delta, implementation="pallas")

    assert compiler.kernels(gate_up, x, w) == ["ours"]
    assert compiler.kernels(gate_up, x, w, delta) == ["ours"]


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_with_sum_and_norm_is_two_launches(
    compiler: Compiler, model: Model, rows: int
) -> None:
    def add_norm(
        x: Any, w: Any, residual: Any, weight: Any, delta: Any = None, next_weight: Any = None
    ) -> Any:
        norm = norm_of(model, weight)
        return api.matmul_add_norm(
            x, w, residual, norm, delta, implementation="pallas", next_weight=next_weight
        )

    residual, weight = compiler.array(rows, model.out.n), compiler.array(model.out.n)
    for k, n in (model.out, model.down):
        operands = compiler.array(rows, k), compiler.array(k, n), residual, weight
        assert compiler.kernels(add_norm, *operands) == ["ours", "ours"]
    next_weight = compiler.array(*model.qkv)
    assert compiler.kernels(add_norm, *operands, residual, next_weight) == ["ours", "ours"]


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_an_activated_product_with_sum_and_norm_is_two_launches(
    compiler: Compiler, gated: Model, rows: int
) -> None:
    def activated(gate_up: Any, w: Any, residual: Any, weight: Any) -> Any:
        norm = norm_of(gated, weight)
        return api.swiglu_matmul_add_norm(gate_up, w, residual, norm, implementation="pallas")

    got = compiler.kernels(
        activated,
        compiler.array(rows, 2 * gated.down.k),
        compiler.array(*gated.down),
        compiler.array(rows, gated.down.n),
        compiler.array(gated.down.n),
    )
    assert got == ["ours", "ours"]


@pytest.mark.parametrize("rows", [1, 64])
def test_f32_compiles(compiler: Compiler, rows: int) -> None:
    """SmolLM2 in f32, where the greedy tokens must be the CPU's."""

    def network(x: Any, pair: Any, down: Any, weight: Any) -> Any:
        hidden = api.matmul_swiglu(x, pair, implementation="pallas")
        norm = Norm("rms", weight, 1e-5)
        return api.matmul_add_norm(hidden, down, x, norm, implementation="pallas")

    f32 = jnp.float32
    got = compiler.kernels(
        network,
        compiler.array(rows, 576, dtype=f32),
        compiler.array(576, 2 * 1536, dtype=f32),
        compiler.array(1536, 576, dtype=f32),
        compiler.array(576, dtype=f32),
    )
    assert got == ["ours"] * 3


def test_more_rows_are_left_to_xla(compiler: Compiler) -> None:
    rows = tuning.MAX_WHOLE_ROWS + 1
    x, w = compiler.array(rows, 4096), compiler.array(4096, 4096)
    got = compiler.kernels(lambda x, w: api.matmul(x, w, implementation="pallas"), x, w)
    assert "ours" not in got
