"""The scratch memory of a CPU's executables: what a step keeps beside weights, pools and bank."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.shapes import SHAPES
from jlorax.assembly import assemble
from jlorax.config import AdapterConfig, EngineConfig, KVConfig, ModelSource, StepConfig
from pallas_kernels.paged_attention.xla import paged_attention

MIB = 1 << 20


def test_the_largest_steps_of_smollm2_take_under_16_mib(tmp_path: Path) -> None:
    """Layers reuse each other's scratch (below), so that two stand for thirty; and the largest
    buckets for the smaller ones."""
    shape = {**SHAPES["smollm2-135m"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = EngineConfig(
        cache_dir=tmp_path,
        model=ModelSource(str(tmp_path), load_format="dummy"),
        steps=StepConfig(decode_buckets=(32,), extend_buckets=(256,)),
        kv=KVConfig(cache_bytes=64 * MIB),
        adapters=AdapterConfig(bank_bytes=64 * MIB),
    )
    temp = assemble(config).device.temp_bytes()
    assert {shape.num_tokens for shape in temp} == {32, 256}
    assert max(temp.values()) < 16 * MIB, temp


def test_layers_share_their_scratch() -> None:
    """Attention's first partial sums were once a constant of all layers: XLA copied it for each of
    them at the step's start, 0.56 MiB a layer."""
    few, many = (_attention_temp_bytes(num_layers) for num_layers in (4, 16))
    assert many < 1.1 * few


def _attention_temp_bytes(num_layers: int) -> int:
    """256 tokens in tiles of 16, through the attention of SmolLM2's layers alone."""
    q = jax.ShapeDtypeStruct((16, 16, 9, 64), jnp.float32)
    pools = [jax.ShapeDtypeStruct((9, 2, 3, 64, 64), jnp.float32)] * num_layers
    table = jax.ShapeDtypeStruct((16, 8), jnp.int32)
    positions = jax.ShapeDtypeStruct((16, 16), jnp.int32)

    def layers(
        q: jax.Array, pools: list[jax.Array], table: jax.Array, positions: jax.Array
    ) -> jax.Array:
        for pool in pools:
            q += paged_attention(
                q, pool, table, positions, scale=0.125, window=None, alibi_slopes=None
            )
        return q

    compiled = jax.jit(layers).lower(q, pools, table, positions).compile()
    stats = compiled.memory_analysis()
    assert stats is not None
    return int(stats.temp_size_in_bytes)
