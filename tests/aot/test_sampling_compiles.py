"""Sampling compiles for an H100, and a step that samples asks the host nothing and copies nothing.

A ``conditional`` or ``while`` of XLA's makes the host wait for the device; the books of tokens seen
(a row a sequence, V columns) must be updated where they lie.
"""

from __future__ import annotations

import functools
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

from jlorax.device.device import DeviceSizes, empty_kv_pools  # noqa: E402
from jlorax.device.lora_bank import empty_bank  # noqa: E402
from jlorax.device.step import empty_rows, make_step, step_arguments  # noqa: E402
from jlorax.layout import (  # noqa: E402
    BankLayout,
    StepLayout,
    StepShape,
    decode_shape,
    packed_extend_shape,
)
from jlorax.models.config import parse_config  # noqa: E402
from jlorax.models.weights import outline  # noqa: E402
from pallas_kernels.sampling import api  # noqa: E402
from pallas_kernels.sampling.operands import RowParameters  # noqa: E402

VOCAB_SIZES = (32000, 32001, 128256, 151936)
MAX_BATCH, SLOTS = 256, 8
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
}
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton"'


def compiled(h100: Mesh, function: Callable[..., Any], arguments: Any, *donated: int) -> Any:
    """``arguments``: anything with a shape and a dtype."""
    sharding = NamedSharding(h100, PartitionSpec())
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with jax.sharding.use_abstract_mesh(h100.abstract_mesh):
        return jax.jit(function, donate_argnums=donated).lower(*described).compile()


@pytest.mark.parametrize(
    ("rows", "vocab_size"), [(1, 32000), (256, 32000), *((64, size) for size in VOCAB_SIZES)]
)
def test_the_kernel_is_one_launch_beside_its_parameters(
    h100: Mesh, rows: int, vocab_size: int
) -> None:
    logits = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    parameters = RowParameters(
        is_greedy=jax.ShapeDtypeStruct((rows,), jnp.bool_),
        top_k=integers,
        top_p=numbers,
        min_p=numbers,
        typical_p=numbers,
        points=numbers,
        num_alternatives=integers,
    )
    sample = functools.partial(api.sample, max_alternatives=20, implementation="pallas")
    text = compiled(h100, sample, (logits, logits, parameters)).as_text()
    launches = re.findall(r" (?:fusion|custom-call)\(.*", text[text.index("\nENTRY") :])
    assert [KERNEL in launch for launch in launches] == [False, True]


@pytest.mark.parametrize(
    "shape",
    [
        *(decode_shape(b, packed_slots=SLOTS) for b in (1, 256)),
        packed_extend_shape(512, 8),
    ],
    ids=["decode-1", "decode-256", "extend"],
)
def test_a_step_that_samples_never_asks_the_host(h100: Mesh, shape: StepShape) -> None:
    config = parse_config(LLAMA_2_7B, "test")
    model = outline(config, "bfloat16")
    bank = BankLayout(config.projections(), "bfloat16", 16)
    sizes = DeviceSizes(MAX_BATCH, 33, 16, 16, SLOTS, dict.fromkeys(bank.pools, 9))
    layout = StepLayout(shape, sizes.max_pages_per_sequence)
    made = jax.eval_shape(
        lambda: (
            empty_kv_pools(model, sizes),
            empty_rows(MAX_BATCH, config.shape.vocab_size),
            empty_bank(bank, SLOTS, sizes.pool_pages),
        )
    )
    arguments = step_arguments(model, *made, layout)
    step = compiled(h100, make_step(model, bank, layout, "pallas"), arguments, 1, 2)
    text = step.as_text()
    assert not re.findall(r" (?:while|conditional)\(", text)
    books = rf"\[{MAX_BATCH + 1},{config.shape.vocab_size}\]"
    assert not re.findall(rf"{books}\S* (?:copy|copy-start)\(", text)
    donated = jax.tree.leaves(arguments[1:3])
    donated_bytes = sum(x.size * x.dtype.itemsize for x in donated)
    assert step.memory_analysis().alias_size_in_bytes >= donated_bytes
