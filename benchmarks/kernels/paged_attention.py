"""Decode attention over a paged pool: our kernel beside jax's own, cuDNN's and XLA's.

A chain passes a layer's output on as the next layer's queries, each layer over a pool of its own.
Values are larger than keys by the factor that an average over the positions takes away again, so
that scores keep their spread from layer to layer. Our page table has room for more positions than
the sequences have, as a server's has; the others get their best case, a table of the true length.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.protocol import (
    READ_TB_PER_S,
    Built,
    Contestant,
    KernelCase,
    Step,
    layer_by_layer,
)
from benchmarks.kernels.results import OURS
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.decode_triton import paged_decode, paged_decode_fused
from pallas_kernels.paged_attention.tuning import DecodeTuning, decode_candidates

PAGE_SIZE = 64
TABLE_WIDTH = 64  # 4096 positions
JAX_PAGE_SIZE = 16  # what jax's kernel does best with
LEAST_BYTES, FEWEST_LAYERS, MOST_LAYERS = 1 << 30, 4, 32  # of a chain: the L2 cache holds 50 MB
FOUR_GIB = 1 << 32


@dataclass(frozen=True)
class Shape:
    """B sequences of n positions; H query heads over K kv heads of h."""

    num_heads: int
    num_kv: int
    head_dim: int
    batch: int
    length: int
    target_us: float | None = None
    window: int | None = None
    num_pages: int | None = None  # of the pool; the sequences' own, if not said

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv}/{self.head_dim}"
        more = f", window {self.window}" if self.window else ""
        return f"{heads}, {self.batch} x {self.length}{more}"

    @property
    def stored_bytes(self) -> int:
        """Keys and values of a layer."""
        return 4 * self.batch * self.length * self.num_kv * self.head_dim

    @property
    def floor_us(self) -> float:
        """Keys, values, queries and output once through memory."""
        queries = 4 * self.batch * self.num_heads * self.head_dim
        return (self.stored_bytes + queries) / READ_TB_PER_S * 1e-6

    @property
    def num_layers(self) -> int:
        return max(FEWEST_LAYERS, min(-(-LEAST_BYTES // self.stored_bytes), MOST_LAYERS))

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def own_pages(self) -> int:
        return self.batch * -(-self.length // PAGE_SIZE)

    @property
    def pool_dims(self) -> tuple[int, ...]:
        pages = self.num_pages or 1 + self.own_pages
        return (pages, 2, self.num_kv, PAGE_SIZE, self.head_dim)


def shapes() -> list[Shape]:
    """Llama-2-7B's heads, Mistral-7B's and Falcon-7B's."""
    return [
        Shape(32, 32, 128, 1, 256, target_us=6.0),
        Shape(32, 32, 128, 64, 256, target_us=96.0),
        Shape(32, 32, 128, 64, 1024, target_us=385.0),
        Shape(32, 8, 128, 1, 256),
        Shape(32, 8, 128, 64, 256, target_us=34.0),
        Shape(32, 8, 128, 64, 1024, target_us=102.0),
        Shape(32, 8, 128, 64, 1024, target_us=102.0, window=4096),
        Shape(71, 1, 64, 1, 256),
        Shape(71, 1, 64, 64, 1024),
    ]


def cases() -> list[KernelCase]:
    fused = (Shape(32, 32, 128, 1, 256), Shape(32, 32, 128, 64, 256), Shape(32, 8, 128, 64, 256))
    return [*map(_compared, shapes()), *map(_fused, fused), _large_pool()]


def sweep() -> list[KernelCase]:
    """Every kind of heads at several numbers of streams, which are what a tuning row is for."""
    heads = ((32, 32, 128), (32, 8, 128), (71, 1, 64))
    batches = ((1, 512), (8, 512), (64, 256), (64, 1024))
    return [_swept(Shape(*kind, *batch)) for kind in heads for batch in batches]


def _compared(shape: Shape) -> KernelCase:
    def build() -> Built:
        q, pools = _queries(shape), _pools(shape)
        contestants = [
            layer_by_layer(OURS, _paged(shape), q, pools),
            layer_by_layer("xla, page by page", _page_by_page(shape), q, pools),
            *_jax_paged(shape, q, pools),
        ]
        layers = tuple(_contiguous(shape, pool) for pool in pools)
        for name in ("cudnn", "xla"):
            contestants.append(
                layer_by_layer(f"{name}, contiguous", _plain(shape, name), q, layers)
            )
        return Built(tuple(contestants), _wanted(shape, q, pools[0]))

    return KernelCase("paged_decode", str(shape), shape.floor_us, shape.target_us, build)


def _large_pool() -> KernelCase:
    """Offsets of 64 bits: the sequences lie at the end of more than 4 GiB."""
    shape = Shape(32, 32, 128, 64, 256)
    page_bytes = 2 * math.prod(shape.pool_dims[1:])
    shape = dataclasses.replace(shape, num_pages=5 * FOUR_GIB // 4 // page_bytes)

    def build() -> Built:
        q, pool = _queries(shape), _pool(shape, 0)
        ours = layer_by_layer(OURS, _paged(shape), q, (pool,))
        return Built((ours,), _wanted(shape, q, pool))

    name = f"{shape}, pool of 5 GiB"
    return KernelCase("paged_decode", name, shape.floor_us, None, build)


def _swept(shape: Shape) -> KernelCase:
    """Every candidate; its name is its line in tuning.py."""
    group, streams = shape.num_heads // shape.num_kv, shape.batch * shape.num_kv

    def build() -> Built:
        q, pools = _queries(shape), _pools(shape)
        return Built(
            tuple(
                layer_by_layer(
                    f"(H100, {group}, {shape.head_dim}, {streams}): {_code(tuning)}",
                    _paged(shape, tuning),
                    q,
                    pools,
                )
                for tuning in decode_candidates(group, streams)
            ),
            _wanted(shape, q, pools[0]),
        )

    return KernelCase("paged_decode", str(shape), shape.floor_us, shape.target_us, build)


# Contestants. -------------------------------------------------------------------------------------


def _paged(shape: Shape, tuning: DecodeTuning | None = None) -> Step:
    table, positions = _page_table(shape), _positions(shape)
    return lambda q, pool: paged_decode(
        q, pool, table, positions, scale=shape.scale, window=shape.window, tuning=tuning
    )


def _page_by_page(shape: Shape) -> Step:
    table, positions = _page_table(shape), _positions(shape)[:, None]

    def step(q: jax.Array, pool: jax.Array) -> jax.Array:
        return xla.paged_attention(
            q[:, None],
            pool,
            table,
            positions,
            scale=shape.scale,
            window=shape.window,
            alibi_slopes=None,
        )[:, 0]

    return step


def _jax_paged(shape: Shape, q: jax.Array, pools: tuple[jax.Array, ...]) -> list[Contestant]:
    """jax's own Triton kernel; it has no window, and later versions of jax may not have it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    except ImportError:
        return []
    width = shape.length // JAX_PAGE_SIZE
    table = jnp.arange(shape.batch * width, dtype=jnp.int32).reshape(shape.batch, width)
    lengths = jnp.full((shape.batch,), shape.length, jnp.int32)
    splits = max(1, width // 8) if shape.batch > 1 else 16

    def step(q: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        scaled = (q * shape.scale).astype(q.dtype)
        out: jax.Array = module.paged_attention(scaled, *layer, table, lengths, k_splits=splits)
        return out

    layers = tuple(_by_head(shape, pool) for pool in pools)
    return [layer_by_layer("jax paged_attention", step, q, layers)]


def _plain(shape: Shape, implementation: Any) -> Step:
    """Over contiguous keys and values, [B, n, K, h] both."""
    lengths = jnp.full((shape.batch,), shape.length, jnp.int32)

    def step(q: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.nn.dot_product_attention(
            q[:, None],
            *layer,
            scale=shape.scale,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )[:, 0]

    return step


def _wanted(shape: Shape, q: jax.Array, pool: jax.Array) -> jax.Array:
    """By the plain walk in f32, over the sequences' own pages alone."""
    own = dataclasses.replace(shape, num_pages=None)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(_page_by_page(own))
        out: jax.Array = run(q.astype(jnp.float32), pool[-own.pool_dims[0] :].astype(jnp.float32))
    return out


# With rotary embedding and the write of the new key and value. ------------------------------------


@dataclass(frozen=True)
class New:
    """What a layer of a step makes: k and v [B, K, h], and the angles' cos and sin [B, h / 2]."""

    k: jax.Array
    v: jax.Array
    cos: jax.Array
    sin: jax.Array


jax.tree_util.register_dataclass(New, ["k", "v", "cos", "sin"], [])
Write = Callable[[jax.Array, jax.Array, New], tuple[jax.Array, jax.Array]]  # (q, pool, new)


def _fused(shape: Shape) -> KernelCase:
    def build() -> Built:
        q, pools = _queries(shape), _pools(shape)
        new = New(
            _draw(1001, shape.batch, shape.num_kv, shape.head_dim),
            _draw(1002, shape.batch, shape.num_kv, shape.head_dim),
            *(
                f(_draw(1003, shape.batch, shape.head_dim // 2, 1)[..., 0].astype(jnp.float32))
                for f in (jnp.cos, jnp.sin)
            ),
        )
        contestants = (
            _writing(f"{OURS}, one launch", _in_one(shape), q, pools, new),
            _writing("by XLA, then ours", _apart(shape), q, pools, new),
        )
        return Built(contestants, _apart(shape)(q, pools[0], new)[0])

    name = f"{shape}, rope and write"
    return KernelCase("paged_decode", name, shape.floor_us, None, build)


def _in_one(shape: Shape) -> Write:
    table, positions = _page_table(shape), _positions(shape)

    def step(q: jax.Array, pool: jax.Array, new: New) -> tuple[jax.Array, jax.Array]:
        qkv = jnp.concatenate([q, new.k, new.v], axis=1)  # a launch that a model does not have
        rotation = new.cos, new.sin
        return paged_decode_fused(qkv, rotation, pool, table, positions, scale=shape.scale)

    return step


def _apart(shape: Shape) -> Write:
    table, positions = _page_table(shape), _positions(shape)
    pages = jnp.take_along_axis(table, positions[:, None] // PAGE_SIZE, axis=1)[:, 0]

    def step(q: jax.Array, pool: jax.Array, new: New) -> tuple[jax.Array, jax.Array]:
        made = jnp.stack([_rotate(new.k, new), new.v], axis=1)
        pool = pool.at[pages, :, :, positions % PAGE_SIZE].set(made)
        out = paged_decode(_rotate(q, new), pool, table, positions, scale=shape.scale)
        return out, pool

    return step


def _rotate(x: jax.Array, new: New) -> jax.Array:
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = new.cos[:, None], new.sin[:, None]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _writing(
    name: str, step: Write, q: jax.Array, pools: tuple[jax.Array, ...], new: New
) -> Contestant:
    one = jax.jit(step)

    def chain(
        q: jax.Array, pools: tuple[jax.Array, ...], new: New
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        written = []
        for pool in pools:
            q, pool = one(q, pool, new)
            written.append(pool)
        return q, tuple(written)

    return Contestant(
        name,
        len(pools),
        chain,
        (q, pools, new),
        donate=(0, 1),
        once=lambda: one(q, pools[0], new)[0],
    )


# Operands. ----------------------------------------------------------------------------------------


def _page_table(shape: Shape) -> jax.Array:
    """i32[B, W]: the pool's last pages, shuffled; entries beyond a sequence name page 0."""
    order = np.random.default_rng(0).permutation(shape.own_pages).astype(np.int32)
    own = shape.pool_dims[0] - shape.own_pages + order.reshape(shape.batch, -1)
    table = np.zeros((shape.batch, max(TABLE_WIDTH, own.shape[1])), np.int32)
    table[:, : own.shape[1]] = own
    return jnp.asarray(table)


def _positions(shape: Shape) -> jax.Array:
    return jnp.full((shape.batch,), shape.length - 1, jnp.int32)


def _queries(shape: Shape) -> jax.Array:
    return _draw(0, shape.batch, shape.num_heads, shape.head_dim)


def _pools(shape: Shape) -> tuple[jax.Array, ...]:
    return tuple(_pool(shape, layer) for layer in range(shape.num_layers))


def _pool(shape: Shape, layer: int) -> jax.Array:
    """NaN wherever no sequence is. Scores of spread 1 leave n / e positions' worth of noise."""
    values = math.sqrt(shape.length / math.e)
    scale = jnp.asarray([1.0, values], jnp.bfloat16)[:, None, None, None]
    own = _draw(1 + layer, shape.own_pages, *shape.pool_dims[1:]) * scale
    others = ((shape.pool_dims[0] - shape.own_pages, 0), *[(0, 0)] * 4)
    return jnp.pad(own, others, constant_values=jnp.nan)


def _contiguous(shape: Shape, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values, [B, n, K, h]."""
    width = -(-shape.length // PAGE_SIZE)
    pages = pool[_page_table(shape)[:, :width]]  # [B, W, 2, K, page_size, h]
    flat = pages.transpose(2, 0, 1, 4, 3, 5).reshape(
        2, shape.batch, -1, shape.num_kv, shape.head_dim
    )
    return flat[0, :, : shape.length], flat[1, :, : shape.length]


def _by_head(shape: Shape, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values in jax's pages, [K, P, 16, h], one sequence after the other."""
    keys, values = (
        x.reshape(-1, JAX_PAGE_SIZE, shape.num_kv, shape.head_dim).transpose(2, 0, 1, 3)
        for x in _contiguous(shape, pool)
    )
    return keys, values


def _draw(seed: int, *dims: int) -> jax.Array:
    drawn: jax.Array = _draw_bf16(dims, jnp.uint32(seed))
    return drawn


@functools.partial(jax.jit, static_argnums=0)
def _draw_bf16(dims: tuple[int, ...], seed: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), dims, jnp.bfloat16)


def _code(tuning: DecodeTuning) -> str:
    numbers = ", ".join(str(number) for number in dataclasses.astuple(tuning))
    return f"DecodeTuning({numbers})"
