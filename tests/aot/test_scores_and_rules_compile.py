"""Rows' rules are written where they lie; a scoring step takes a few rows of logits at a time."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jlorax.device.row_writer import write_bias, write_masks  # noqa: E402
from jlorax.layout import mask_words, packed_extend_shape  # noqa: E402
from jlorax.types import MAX_LOGIT_BIASES  # noqa: E402
from tests.aot.test_compiles_for_h100 import (  # noqa: E402
    LLAMA_2_7B,
    abstract,
    compile_step,
    entry_operations,
)

V, ROWS = 32000, 257


@pytest.mark.parametrize("name", ["masks", "bias"])
def test_a_write_touches_its_rows_alone(h100: Mesh, name: str) -> None:
    def on_gpu(dims: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(h100, PartitionSpec()))

    words = mask_words(V)
    write, book, packed = {
        "masks": (write_masks, on_gpu((ROWS, words), jnp.int32), (32, 1 + words)),
        "bias": (write_bias, on_gpu((ROWS, V), jnp.float32), (1 + 2 * MAX_LOGIT_BIASES,)),
    }[name]
    with abstract(h100):
        compiled = write.lower(book, on_gpu(packed, jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == book.size * 4
    assert memory.temp_size_in_bytes <= V * 4 + 4096
    assert not {"copy", "while", "conditional"} & set(entry_operations(compiled.as_text()))


def test_a_scoring_step_copies_no_pool_and_holds_no_logits_of_all_tokens(h100: Mesh) -> None:
    shape = packed_extend_shape(512, 32)
    small = LLAMA_2_7B | {"num_hidden_layers": 1}
    scoring, arguments = compile_step(h100, small, replace(shape, scores=True))
    memory = scoring.memory_analysis()
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[1:3]))
    assert memory.alias_size_in_bytes >= donated - 1024
    assert memory.temp_size_in_bytes < 512 * V * 4
