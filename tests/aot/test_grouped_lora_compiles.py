"""The grouped LoRA kernels compile for an H100 at models' widths, and copy neither y nor a pool."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.grouped_lora.operands import RowBlocks, SitePages  # noqa: E402
from pallas_kernels.grouped_lora.pallas_triton import grouped_lora  # noqa: E402
from pallas_kernels.grouped_lora.tuning import rows_per_block  # noqa: E402
from tests.aot.test_compiles_for_h100 import abstract  # noqa: E402

NUM_LAYERS, NUM_PROJECTIONS, SLOTS = 32, 7, 64
POOL_PAGES = 2100  # 4.4 GB at a width of 4096: offsets of 64 bits
SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "llama qkv": (4096, (4096, 4096, 4096)),
    "llama o": (4096, (4096,)),
    "llama gate up": (4096, (11008, 11008)),
    "llama down": (11008, (4096,)),
    "mistral qkv": (4096, (4096, 1024, 1024)),
    "mistral gate up": (4096, (14336, 14336)),
    "mistral down": (14336, (4096,)),
    "falcon qkv": (4544, (4672,)),
    "falcon dense": (4544, (4544,)),
    "falcon up": (4544, (18176,)),
    "falcon down": (18176, (4544,)),
}


@pytest.mark.parametrize("site", SITES)
def test_every_site_compiles(h100: Mesh, site: str) -> None:
    compile_site(h100, *SITES[site], num_tokens=64)


@pytest.mark.parametrize("num_tokens", [1, 8, 256, 2048])
@pytest.mark.parametrize("site", ["llama qkv", "mistral qkv", "falcon down"])
def test_every_bucket_compiles(h100: Mesh, site: str, num_tokens: int) -> None:
    compile_site(h100, *SITES[site], num_tokens=num_tokens)


@pytest.mark.parametrize("d_in, vocab_size", [(4096, 32_000), (4544, 65_024)])
def test_the_head_compiles(h100: Mesh, d_in: int, vocab_size: int) -> None:
    compile_site(h100, d_in, (vocab_size,), num_tokens=64, num_layers=1, y_dtype=jnp.float32)


@pytest.mark.parametrize("max_rank", [16, 256])
def test_other_limits_compile(h100: Mesh, max_rank: int) -> None:
    compile_site(h100, 4096, (4096, 1024, 1024), num_tokens=64, max_rank=max_rank)


@pytest.mark.parametrize("num_tokens, block_rows", [(64, 64), (2048, 16), (2048, 32), (2048, 128)])
def test_other_blocks_compile(h100: Mesh, num_tokens: int, block_rows: int) -> None:
    compile_site(h100, 4096, (4096,) * 3, num_tokens=num_tokens, block_rows=block_rows)


@pytest.mark.parametrize("num_tokens", [1, 256, 2048])
def test_f32_compiles(h100: Mesh, num_tokens: int) -> None:
    compile_site(h100, 576, (576, 192, 192), num_tokens=num_tokens, dtype=jnp.float32)


def compile_site(
    mesh: Mesh,
    d_in: int,
    widths: tuple[int, ...],
    *,
    num_tokens: int,
    block_rows: int | None = None,
    max_rank: int = 64,
    num_layers: int = NUM_LAYERS,
    dtype: Any = jnp.bfloat16,
    y_dtype: Any = None,
) -> None:
    """With y donated, and pools of their own for every width."""

    def on_gpu(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    block_rows = block_rows or rows_per_block(num_tokens)
    num_blocks = min(num_tokens, SLOTS + num_tokens // block_rows)
    pools = {n: on_gpu(POOL_PAGES, num_layers, 8, n, dtype=dtype) for n in sorted({d_in, *widths})}
    y = on_gpu(num_tokens, sum(widths), dtype=y_dtype or dtype)
    tables = (
        on_gpu(num_blocks, NUM_PROJECTIONS, 2, -(-max_rank // 16) * 2),
        on_gpu(num_blocks, NUM_PROJECTIONS),
        on_gpu(num_blocks, NUM_PROJECTIONS, num_layers, dtype=jnp.float32),
    )

    def lora(y: Any, x: Any, pools: Any, tables: Any, blocks: RowBlocks) -> jax.Array:
        rows = tuple(range(len(widths)))
        site = SitePages(pools[d_in], tuple(pools[n] for n in widths), *tables, rows)
        return grouped_lora(y, x, site, blocks, num_layers - 1, block_rows=block_rows)

    blocks = RowBlocks(on_gpu(num_blocks), on_gpu(num_blocks))
    x = on_gpu(num_tokens, d_in, dtype=dtype)
    with abstract(mesh):
        compiled = jax.jit(lora, donate_argnums=0).lower(y, x, pools, tables, blocks).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes == y.size * y.dtype.itemsize, "y is copied"
    assert memory.temp_size_in_bytes < 64 << 20, "a pool is copied"
    assert " copy(" not in text
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert b"\x7fELF" in compiled.runtime_executable().serialize()
