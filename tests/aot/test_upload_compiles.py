"""An adapter's insert compiles for an H100 and writes the bank where it lies.

See ``test_compiles_for_h100`` for how: the compiler plugin alone, no driver.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from benchmarks.shapes import SHAPES  # noqa: E402
from jlorax.device.lora_bank import make_insert  # noqa: E402
from jlorax.layout import RANK_PAGE, BankLayout, PoolKey, WriteLayout  # noqa: E402
from jlorax.models.config import parse_config  # noqa: E402
from jlorax.models.lora import Bank  # noqa: E402

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("names", [ATTENTION, ATTENTION + MLP], ids=["attention", "all"])
@pytest.mark.parametrize("num_slots", [64, 256])
def test_the_bank_is_written_in_place_by_one_kernel_a_pool(
    h100: Mesh, names: tuple[str, ...], num_slots: int
) -> None:
    """256 slots: pools beyond 4 GiB, where 32 bits no longer count the bytes."""
    raw = dict(SHAPES["llama-2-7b"])
    layout = BankLayout(parse_config(raw, "test").projections(), "bfloat16", 64)
    need = layout.pages_needed(dict.fromkeys(names, 16))
    pool_pages = {key: 1 + num_slots * need.get(key, 1) for key in layout.pools}
    size = layout.buffer_size(need)

    def on_gpu(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(h100, PartitionSpec()))

    bank = _bank(layout, num_slots, pool_pages, on_gpu)
    buffer = on_gpu((size, layout.unit), jnp.bfloat16)
    packed = on_gpu((WriteLayout(layout, size).size,), jnp.int32)
    with jax.sharding.use_abstract_mesh(h100.abstract_mesh):
        compiled = make_insert(layout, size).lower(bank, buffer, packed).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    bank_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(bank))
    assert (bank_bytes > 8 << 30) == (num_slots == 256)
    assert memory.alias_size_in_bytes == bank_bytes
    assert memory.temp_size_in_bytes < 1 << 20, "pages are gathered before they are scattered"
    assert len(re.findall(r"fusion\(.*kind=kInput, calls=%\w*scatter", text)) == len(layout.pools)
    assert " while(" not in text, "the host would be asked at every turn"
    assert " copy(" not in text


def _bank(layout: BankLayout, num_slots: int, pool_pages: dict[PoolKey, int], on_gpu: Any) -> Bank:
    projections = len(layout.projections)
    return Bank(
        {
            key: on_gpu((pool_pages[key], key.num_layers, RANK_PAGE, key.width), jnp.bfloat16)
            for key in layout.pools
        },
        on_gpu((num_slots + 1, projections, 2, layout.table_width), jnp.int32),
        on_gpu((num_slots + 1, projections), jnp.int32),
        on_gpu((num_slots + 1, projections, layout.max_layers), jnp.float32),
    )
