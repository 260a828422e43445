"""The whole step compiles for an H100 on a machine without a GPU, and copies no pool.

Needs the extra ``aot``: the compiler plugin alone, no driver. ``h100.txtpb`` describes the target;
it follows openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jlorax.device.step import make_step  # noqa: E402
from jlorax.layout import (  # noqa: E402
    RANK_PAGE,
    BankLayout,
    LoraReach,
    StepLayout,
    StepShape,
    decode_shape,
    mask_words,
    packed_extend_shape,
)
from jlorax.models.config import parse_config  # noqa: E402
from jlorax.models.weights import outline  # noqa: E402

NUM_LAYERS = 4  # of 32: the layers are alike, and this keeps the test short
NUM_PAGES, PAGE_SIZE, MAX_PAGES, MAX_BATCH, SLOTS, BANK_PAGES = 513, 16, 64, 64, 8, 65

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": 32000,
}
MISTRAL_7B = LLAMA_2_7B | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": 65024,
}


@contextmanager
def abstract(mesh: Mesh) -> Iterator[None]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


@pytest.mark.parametrize(
    "raw", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=lambda raw: raw["model_type"]
)
@pytest.mark.parametrize(
    "shape",
    [
        decode_shape(8, lora=LoraReach.NONE, packed_slots=SLOTS),
        packed_extend_shape(512, 8),
    ],
    ids=["decode-base", "extend"],
)
def test_step_compiles_and_updates_the_pool_in_place(
    h100: Mesh, raw: dict[str, Any], shape: StepShape
) -> None:
    compiled, arguments = compile_step(h100, raw, shape)
    memory = compiled.memory_analysis()
    pools_bytes = sum(pool.size * 2 for pool in arguments[1])
    assert memory.alias_size_in_bytes >= pools_bytes, "the donated KV pool is copied"
    if shape.is_decode:
        assert memory.temp_size_in_bytes < 64 << 20


@pytest.mark.parametrize(
    "raw", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=lambda raw: raw["model_type"]
)
def test_the_whole_decode_step_is_one_stream_of_kernels(h100: Mesh, raw: dict[str, Any]) -> None:
    """All 32 layers at 64 rows: little scratch, and nothing that would end a command buffer, which
    records kernels: no branch, no loop, no copy between host and device."""
    rows, whole = 64, raw | {"num_hidden_layers": 32}
    shape = decode_shape(rows, packed_slots=SLOTS)
    compiled, arguments = compile_step(h100, whole, shape)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < (64 << 20) + 16 * rows * raw["vocab_size"]
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[1:3]))
    assert memory.alias_size_in_bytes >= donated - MAX_BATCH * 8, "a donated array is copied"
    kinds = entry_operations(compiled.as_text())
    assert kinds["custom-call"] > 32 * 8  # ours, and cuBLAS' for the head
    assert set(kinds) <= {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"} | {
        "fusion",
        "custom-call",
    }


def entry_operations(hlo: str) -> Counter[str]:
    """How many of each kind the entry computation of optimized HLO has."""
    entry = hlo[hlo.index("\nENTRY ") :]
    lines = (line for line in entry.splitlines() if " = " in line)
    found = (re.search(r"[\])}] ([a-z][a-z-]*)\(", line) for line in lines)
    return Counter(match[1] for match in found if match is not None)


def compile_step(mesh: Mesh, raw: dict[str, Any], shape: StepShape) -> tuple[Any, tuple[Any, ...]]:
    """The executable, and what describes its arguments."""
    config = parse_config(raw, "test")
    model = outline(config, "bfloat16")
    bank = BankLayout(config.projections(), "bfloat16", 64)
    layout = StepLayout(shape, MAX_PAGES)

    def on_gpu(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    arguments = _arguments(model, bank, layout, on_gpu)
    step = jax.jit(make_step(model, bank, layout, "pallas"), donate_argnums=(1, 2))
    with abstract(mesh):
        return step.lower(*arguments).compile(), arguments


def _arguments(model: Any, bank: BankLayout, layout: StepLayout, on_gpu: Any) -> tuple[Any, ...]:
    from jlorax.device.step import RowState
    from jlorax.models.lora import Bank

    s, projections = model.config.shape, len(bank.projections)
    pool = (NUM_PAGES, 2, s.num_kv_heads, PAGE_SIZE, s.head_dim)
    return (
        [on_gpu(leaf.shape, leaf.dtype) for leaf in model.leaves],
        [on_gpu(pool, jnp.bfloat16) for _ in range(s.num_layers)],
        RowState(
            on_gpu((MAX_BATCH + 1,), jnp.int32),
            on_gpu((MAX_BATCH + 1, s.vocab_size), jnp.bool_),
            on_gpu((MAX_BATCH + 1, s.vocab_size), jnp.int32),
            on_gpu((MAX_BATCH + 1, mask_words(s.vocab_size)), jnp.int32),
            on_gpu((MAX_BATCH + 1, s.vocab_size), jnp.float32),
        ),
        Bank(
            {
                key: on_gpu((BANK_PAGES, key.num_layers, RANK_PAGE, key.width), jnp.bfloat16)
                for key in bank.pools
            },
            on_gpu((SLOTS + 1, projections, 2, bank.table_width), jnp.int32),
            on_gpu((SLOTS + 1, projections), jnp.int32),
            on_gpu((SLOTS + 1, projections, bank.max_layers), jnp.float32),
        ),
        on_gpu((layout.size,), jnp.int32),
    )
