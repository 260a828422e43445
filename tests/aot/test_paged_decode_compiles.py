"""The decode kernel compiles for an H100 on a machine without a GPU, and copies no pool."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

pytestmark = [pytest.mark.aot]
pytest.importorskip("jax_plugins.xla_cuda13")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.paged_attention.decode_triton import (  # noqa: E402
    paged_decode,
    paged_decode_fused,
)
from pallas_kernels.paged_attention.tuning import (  # noqa: E402
    DecodeTuning,
    decode_candidates,
    decode_rule,
)

PAGE_SIZE, NUM_PAGES = 64, 1025
LLAMA_2_7B, MISTRAL_7B, FALCON_7B = (32, 32, 128), (32, 8, 128), (71, 1, 64)


def compiled(
    mesh: Mesh,
    heads: tuple[int, int, int],
    batch: int,
    tuning: DecodeTuning,
    *,
    width: int = 64,
    fused: bool = False,
    num_pages: int = NUM_PAGES,
    page_size: int = PAGE_SIZE,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> Any:
    num_heads, num_kv, head_dim = heads

    def on_gpu(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    angle = on_gpu((batch, head_dim // 2), jnp.float32)
    arguments = {
        "page_table": on_gpu((batch, width), jnp.int32),
        "positions": on_gpu((batch,), jnp.int32),
    }
    if fused:
        qkv = on_gpu((batch, num_heads + 2 * num_kv, head_dim), dtype)
        arguments |= {"qkv": qkv, "rotation": (angle, angle)}
    else:
        arguments["q"] = on_gpu((batch, num_heads, head_dim), dtype)
    pool = on_gpu((num_pages, 2, num_kv, page_size, head_dim), dtype)

    def decode(pool: jax.Array, arguments: dict[str, Any]) -> Any:
        function = paged_decode_fused if fused else paged_decode
        return function(pool=pool, **arguments, scale=head_dim**-0.5, tuning=tuning, **options)

    step = jax.jit(decode, donate_argnums=(0,) if fused else ())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(pool, arguments).compile()


def assert_on_the_card(executable: Any, kernels: int) -> None:
    """Machine code, as many kernels as there should be, and nothing else: no copy above all."""
    assert b"\x7fELF" in executable.runtime_executable().serialize()
    text = executable.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == kernels
    assert " copy(" not in text


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("heads", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=str)
def test_every_bucket_compiles(
    h100: Mesh, heads: tuple[int, int, int], batch: int, width: int
) -> None:
    num_heads, num_kv, head_dim = heads
    tuning = decode_rule(num_heads // num_kv, batch * num_kv)
    executable = compiled(h100, heads, batch, tuning, width=width)
    assert_on_the_card(executable, kernels=1 if tuning.splits == 1 else 2)
    partial_results = 4 * batch * num_heads * tuning.splits * (head_dim + 1)
    temp = executable.memory_analysis().temp_size_in_bytes
    assert temp <= (partial_results if tuning.splits > 1 else 0) + 4096


@pytest.mark.parametrize("heads", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=str)
def test_the_fused_kernel_writes_the_donated_pool(h100: Mesh, heads: tuple[int, int, int]) -> None:
    num_heads, num_kv, head_dim = heads
    tuning = decode_rule(num_heads // num_kv, 64 * num_kv)
    executable = compiled(h100, heads, 64, tuning, fused=True)
    assert_on_the_card(executable, kernels=1 if tuning.splits == 1 else 2)
    pool_bytes = 2 * NUM_PAGES * 2 * num_kv * PAGE_SIZE * head_dim
    assert executable.memory_analysis().alias_size_in_bytes >= pool_bytes


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((32, 32, 80), {"alibi_slopes": (0.5,) * 32}),
        ((12, 4, 96), {"window": 100}),
        ((9, 3, 64), {"page_size": 16}),
        ((9, 3, 64), {"page_size": 32, "dtype": jnp.float32}),
        (LLAMA_2_7B, {"num_pages": 5000}),  # over 4 GiB: offsets of 64 bits
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_other_shapes_compile(
    h100: Mesh, heads: tuple[int, int, int], options: dict[str, Any], fused: bool
) -> None:
    tuning = decode_rule(heads[0] // heads[1], 8 * heads[1])
    assert_on_the_card(compiled(h100, heads, 8, tuning, fused=fused, **options), kernels=2)


@pytest.mark.parametrize("heads", [LLAMA_2_7B, MISTRAL_7B, FALCON_7B], ids=str)
def test_every_candidate_compiles(h100: Mesh, heads: tuple[int, int, int]) -> None:
    """Shared memory and registers suffice, so that a sweep on the card does not break off."""
    num_heads, num_kv, _ = heads
    candidates = decode_candidates(num_heads // num_kv, 64 * num_kv)
    for tuning in {replace(candidate, splits=2): None for candidate in candidates}:
        executable = compiled(h100, heads, 64, tuning)
        assert_on_the_card(executable, kernels=2)
