"""Attention of prompts over a paged pool: our kernel beside cuDNN's and XLA's.

A chain passes a layer's output on as the next layer's queries, each layer over a pool of its own.
Values are larger than keys by a factor that an average over a prompt takes away again, so that
scores keep their spread from layer to layer and the matrix units see numbers as they are served.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.protocol import (
    BF16_TFLOP_PER_S,
    READ_TB_PER_S,
    Built,
    Contestant,
    KernelCase,
    Step,
    layer_by_layer,
)
from benchmarks.kernels.results import OURS
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.extend_triton import (
    BLOCK_QUERIES,
    QueryBlocks,
    max_query_blocks,
    paged_extend,
    query_blocks,
)
from pallas_kernels.paged_attention.extend_tuning import ExtendTuning, extend_candidates

PAGE_SIZE = 64
MAX_CHUNKS = 64  # of a step: what an executable has room for
VALUE_SCALE = 8.0
NUM_LAYERS, FEW_LAYERS = 8, 2  # the plain walk over pages takes milliseconds
FOUR_GIB = 1 << 32


@dataclass(frozen=True)
class Heads:
    """H query heads, K kv heads, head_dim."""

    num_heads: int
    num_kv: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv}/{self.head_dim}"


@dataclass(frozen=True)
class Shape:
    """``chunks`` sequences with ``past`` tokens in the pool and ``length`` more in this step."""

    name: str
    heads: Heads
    chunks: int
    length: int
    past: int = 0
    target_us: float | None = None
    num_pages: int | None = None  # of the pool; the sequences' own, if not said

    @property
    def num_tokens(self) -> int:
        return self.chunks * self.length

    @property
    def pages_each(self) -> int:
        return -(-(self.past + self.length) // PAGE_SIZE)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.heads.head_dim)

    @property
    def pool_dims(self) -> tuple[int, ...]:
        pages = self.num_pages or 1 + self.chunks * self.pages_each
        return (pages, 2, self.heads.num_kv, PAGE_SIZE, self.heads.head_dim)

    @property
    def floor_us(self) -> float:
        """Visible scores and their weights times values; or q, output, keys and values once."""
        pairs = self.chunks * self.length * (self.past + (self.length + 1) / 2)
        flop = 4 * self.heads.num_heads * self.heads.head_dim * pairs
        stored = self.chunks * (self.past + self.length) * self.heads.num_kv
        moved = 4 * self.heads.head_dim * (self.num_tokens * self.heads.num_heads + stored)
        return max(flop / BF16_TFLOP_PER_S * 1e-6, moved / READ_TB_PER_S * 1e-6)


MHA, GQA, MQA = Heads(32, 32, 128), Heads(32, 8, 128), Heads(71, 1, 64)


def shapes() -> list[Shape]:
    return [
        shape
        for heads in (MHA, GQA)
        for shape in (
            # 1.40 s for 64 x 1024 tokens, 1.31 s of it in products: 8 steps of 32 layers
            Shape("8 x 1024", heads, 8, 1024, target_us=350.0 if heads == MHA else None),
            Shape("64 x 128", heads, 64, 128),
            Shape("1 x 8192", heads, 1, 8192),
            Shape("4 x 512 after 2048", heads, 4, 512, 2048),
        )
    ] + [Shape("8 x 1024", MQA, 8, 1024)]


def cases() -> list[KernelCase]:
    return [*map(_compared, shapes()), _large_pool()]


def sweep() -> list[KernelCase]:
    chosen = (
        Shape("8 x 1024", MHA, 8, 1024),
        Shape("8 x 1024", GQA, 8, 1024),
        Shape("8 x 1024", MQA, 8, 1024),
        Shape("64 x 128", MHA, 64, 128),
        Shape("4 x 512 after 2048", MHA, 4, 512, 2048),
    )
    return [_swept(shape) for shape in chosen]


def _compared(shape: Shape) -> KernelCase:
    def build() -> Built:
        q, pools = _queries(shape), tuple(_pool(shape, layer) for layer in range(NUM_LAYERS))
        tiles = layer_by_layer("xla, page by page", _tiled(shape), q, pools[:FEW_LAYERS])
        contestants = [*_ours(shape, q, pools), tiles]
        if shape.past == 0:
            layers = tuple(_contiguous(shape, pool) for pool in pools)
            contestants.append(layer_by_layer("cuDNN", _cudnn(shape), q, layers))
        return Built(tuple(contestants), _wanted(shape, q, pools[0]))

    return _case(shape, build)


def _large_pool() -> KernelCase:
    """Offsets of 64 bits: the sequences lie at the end of more than 4 GiB."""
    page_bytes = 2 * MHA.num_kv * PAGE_SIZE * MHA.head_dim * 2
    shape = Shape(
        "8 x 1024, pool of 5 GiB", MHA, 8, 1024, num_pages=5 * FOUR_GIB // 4 // page_bytes
    )

    def build() -> Built:
        q, pool = _queries(shape), _pool(shape, 0)
        ours = layer_by_layer(OURS, _packed(shape, MAX_CHUNKS), q, (pool,))
        return Built((ours,), _wanted(shape, q, pool))

    return _case(shape, build)


def _swept(shape: Shape) -> KernelCase:
    """Every candidate; its name is its line in extend_tuning.py."""

    def build() -> Built:
        q, pools = _queries(shape), tuple(_pool(shape, layer) for layer in range(NUM_LAYERS // 2))
        return Built(
            tuple(
                layer_by_layer(
                    f"{shape.heads.head_dim}: {_code(tuning)}",
                    _packed(shape, shape.chunks, tuning),
                    q,
                    pools,
                )
                for tuning in extend_candidates(shape.heads.head_dim)
            ),
            _wanted(shape, q, pools[0]),
        )

    return _case(shape, build)


def _case(shape: Shape, build: Callable[[], Built]) -> KernelCase:
    name = f"{shape.heads}, {shape.name}"
    return KernelCase("paged_extend", name, shape.floor_us, shape.target_us, build)


# Contestants. -------------------------------------------------------------------------------------


def _ours(shape: Shape, q: jax.Array, pools: tuple[jax.Array, ...]) -> list[Contestant]:
    """As a step calls it, with room for more chunks than there are, and without empty blocks."""
    return [
        layer_by_layer(OURS, _packed(shape, MAX_CHUNKS), q, pools),
        layer_by_layer(f"{OURS}, no empty blocks", _packed(shape, shape.chunks), q, pools),
    ]


def _packed(shape: Shape, room: int, tuning: ExtendTuning | None = None) -> Step:
    """Over a pool; ``room``: chunks that the blocks have room for."""
    lengths, starts = [shape.length] * shape.chunks, [shape.past] * shape.chunks
    most = max_query_blocks(shape.num_tokens, room, BLOCK_QUERIES)
    made = query_blocks(lengths, starts, BLOCK_QUERIES, most)
    table, blocks = _page_table(shape), QueryBlocks(*map(jnp.asarray, made))

    return lambda q, pool: paged_extend(q, pool, table, blocks, scale=shape.scale, tuning=tuning)


def _tiled(shape: Shape) -> Step:
    """Over a pool, in tiles of consecutive queries."""
    tile = min(BLOCK_QUERIES, shape.length)
    tiles_each = shape.length // tile
    table = jnp.repeat(_page_table(shape), tiles_each, axis=0)
    each = shape.past + np.arange(shape.length, dtype=np.int32)
    positions = jnp.asarray(np.tile(each, shape.chunks).reshape(-1, tile))

    def step(q: jax.Array, pool: jax.Array) -> jax.Array:
        tiles = q.reshape(-1, tile, *q.shape[1:])
        out = xla.paged_attention(
            tiles, pool, table, positions, scale=shape.scale, window=None, alibi_slopes=None
        )
        return out.reshape(q.shape)

    return step


def _cudnn(shape: Shape) -> Step:
    """Over contiguous keys and values, [B, n, K, h] both; fresh prompts only."""

    def step(q: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        prompts = q.reshape(shape.chunks, shape.length, *q.shape[1:])
        out = jax.nn.dot_product_attention(
            prompts, *layer, scale=shape.scale, is_causal=True, implementation="cudnn"
        )
        return out.reshape(q.shape)

    return step


def _wanted(shape: Shape, q: jax.Array, pool: jax.Array) -> jax.Array:
    """By the plain walk in f32, over the sequences' own pages alone."""
    own = dataclasses.replace(shape, num_pages=None)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(_tiled(own))
        out: jax.Array = run(q.astype(jnp.float32), pool[-own.pool_dims[0] :].astype(jnp.float32))
    return out


# Operands. ----------------------------------------------------------------------------------------


def _page_table(shape: Shape) -> jax.Array:
    """i32[C, W]: the pool's last pages, shuffled."""
    count = shape.chunks * shape.pages_each
    order = np.random.default_rng(0).permutation(count).astype(np.int32)
    return jnp.asarray(shape.pool_dims[0] - count + order.reshape(shape.chunks, -1))


def _queries(shape: Shape) -> jax.Array:
    return _draw(0, shape.num_tokens, shape.heads.num_heads, shape.heads.head_dim)


def _pool(shape: Shape, layer: int) -> jax.Array:
    """NaN wherever no sequence is."""
    count = shape.chunks * shape.pages_each
    scale = jnp.asarray([1.0, VALUE_SCALE], jnp.bfloat16)[:, None, None, None]
    own = _draw(1 + layer, count, *shape.pool_dims[1:]) * scale
    others = ((shape.pool_dims[0] - count, 0), *[(0, 0)] * 4)
    return jnp.pad(own, others, constant_values=jnp.nan)


def _contiguous(shape: Shape, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of fresh prompts, [B, n, K, h]."""
    pages = pool[_page_table(shape)]  # [B, W, 2, K, page_size, h]
    flat = pages.transpose(2, 0, 1, 4, 3, 5).reshape(
        2, shape.chunks, -1, shape.heads.num_kv, shape.heads.head_dim
    )
    return flat[0, :, : shape.length], flat[1, :, : shape.length]


def _draw(seed: int, *dims: int) -> jax.Array:
    drawn: jax.Array = _draw_bf16(dims, jnp.uint32(seed))
    return drawn


@functools.partial(jax.jit, static_argnums=0)
def _draw_bf16(dims: tuple[int, ...], seed: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), dims, jnp.bfloat16)


def _code(tuning: ExtendTuning) -> str:
    numbers = ", ".join(str(number) for number in dataclasses.astuple(tuning))
    return f"ExtendTuning({numbers})"
