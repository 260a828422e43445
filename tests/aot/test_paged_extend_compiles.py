"""The extend kernel compiles for an H100 at the shapes that are served, and copies no pool."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.paged_attention.api import (  # noqa: E402
    AttentionSpec,
    Chunks,
    Places,
    Rotation,
    fused_attention,
)
from pallas_kernels.paged_attention.extend_triton import (  # noqa: E402
    BLOCK_QUERIES,
    QueryBlocks,
    max_query_blocks,
    paged_extend,
)
from pallas_kernels.paged_attention.extend_tuning import extend_candidates  # noqa: E402

LLAMA_2_7B = {"heads": (32, 32, 128)}
MISTRAL_7B = {"heads": (32, 8, 128), "window": 4096}
FALCON_7B = {"heads": (71, 1, 64)}
OTHERS = {
    "alibi": {"heads": (32, 32, 128), "alibi_slopes": tuple(2.0**-i for i in range(32))},
    "alibi over groups, window": {
        "heads": (32, 8, 128),
        "alibi_slopes": tuple(2.0**-i for i in range(32)),
        "window": 100,
    },
    "head_dim 80": {"heads": (32, 32, 80)},
    "head_dim 96": {"heads": (32, 32, 96)},
    "SmolLM2": {"heads": (9, 3, 64)},
    "SmolLM2, f32": {"heads": (9, 3, 64), "dtype": jnp.float32},
    "head_dim 128, f32": {"heads": (32, 32, 128), "dtype": jnp.float32},
    "page of 16": {"heads": (32, 8, 128), "page_size": 16, "window": 4096},
    "page of 32": {"heads": (71, 1, 64), "page_size": 32},
    "a pool over 4 GiB": {"heads": (32, 32, 128), "num_pages": 5000},
}


def compiled(
    mesh: Mesh,
    num_tokens: int,
    *,
    heads: tuple[int, int, int],
    page_size: int = 64,
    num_pages: int = 1024,
    dtype: Any = jnp.bfloat16,
    **fixed: Any,
) -> Any:
    def on_gpu(dims: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=NamedSharding(mesh, PartitionSpec()))

    num_heads, num_kv, head_dim = heads
    num_blocks = max_query_blocks(num_tokens, 64, BLOCK_QUERIES)

    def run(q: jax.Array, pool: jax.Array, table: jax.Array, blocks: QueryBlocks) -> jax.Array:
        return paged_extend(q, pool, table, blocks, scale=head_dim**-0.5, **fixed)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (
            jax.jit(run, donate_argnums=0)
            .lower(
                on_gpu((num_tokens, num_heads, head_dim), dtype),
                on_gpu((num_pages, 2, num_kv, page_size, head_dim), dtype),
                on_gpu((64, 4096 // page_size), jnp.int32),
                QueryBlocks(*(on_gpu((num_blocks,), jnp.int32) for _ in range(4))),
            )
            .compile()
        )


def assert_in_place(executable: Any, num_tokens: int, heads: tuple[int, int, int]) -> None:
    """The output lies in q's memory, and nothing else is allocated."""
    memory = executable.memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 16, "the pool or the queries are copied"
    assert memory.alias_size_in_bytes >= num_tokens * heads[0] * heads[2] * 2


@pytest.mark.parametrize("num_tokens", [512, 2048, 8192])
@pytest.mark.parametrize(
    "model", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=["llama", "mistral", "falcon"]
)
def test_served_shapes(h100: Mesh, model: dict[str, Any], num_tokens: int) -> None:
    assert_in_place(compiled(h100, num_tokens, **model), num_tokens, model["heads"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes(h100: Mesh, name: str) -> None:
    assert_in_place(compiled(h100, 512, **OTHERS[name]), 512, OTHERS[name]["heads"])


@pytest.mark.parametrize("heads", [(32, 32, 128), (32, 8, 128), (71, 1, 64), (32, 32, 80)], ids=str)
@pytest.mark.parametrize("num_pages", [1024, 5000], ids=["1024 pages", "5000 pages"])
def test_fused_writes_the_pool_in_place(
    h100: Mesh, heads: tuple[int, int, int], num_pages: int
) -> None:
    def on_gpu(dims: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=NamedSharding(h100, PartitionSpec()))

    num_tokens, (num_heads, num_kv, head_dim) = 2048, heads
    blocks = max_query_blocks(num_tokens, 64, BLOCK_QUERIES)
    tokens, angles = on_gpu((num_tokens,), jnp.int32), (num_tokens, head_dim // 2)
    pool = on_gpu((num_pages, 2, num_kv, 64, head_dim), jnp.bfloat16)

    def run(qkv: jax.Array, turn: Rotation, pool: jax.Array, at: Places, chunks: Chunks) -> Any:
        spec = AttentionSpec(head_dim**-0.5)
        return fused_attention(qkv, turn, pool, at, chunks._replace(interpret=False), spec)

    with jax.sharding.use_abstract_mesh(h100.abstract_mesh):
        executable = (
            jax.jit(run, donate_argnums=2)
            .lower(
                on_gpu((num_tokens, num_heads + 2 * num_kv, head_dim), jnp.bfloat16),
                Rotation(on_gpu(angles, jnp.float32), on_gpu(angles, jnp.float32)),
                pool,
                Places(tokens, tokens),
                Chunks(
                    on_gpu((64, 64), jnp.int32),
                    QueryBlocks(*(on_gpu((blocks,), jnp.int32) for _ in range(4))),
                ),
            )
            .compile()
        )
    memory = executable.memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 16, "the pool or the queries are copied"
    assert memory.alias_size_in_bytes == math.prod(pool.shape) * 2


@pytest.mark.parametrize("model", [MISTRAL_7B, FALCON_7B], ids=["mistral", "falcon"])
def test_every_candidate_fits(h100: Mesh, model: dict[str, Any]) -> None:
    for tuning in extend_candidates(model["heads"][2]):
        compiled(h100, 2048, tuning=tuning, **model)
