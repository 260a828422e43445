"""Paged attention of prompts and chunks of prompts on a GPU, in Pallas' Triton dialect.

Tokens of many sequences lie packed in one array, chunk after chunk, without padding between them:

    rows of q:   | chunk 0: 300 tokens      | chunk 1: 70 | chunk 2: 129        | padding |
    blocks:      | 128     | 128     | 44   | 70          | 128           | 1   |   in none

A *block* is at most BLOCK_QUERIES consecutive rows of one chunk; the host makes them. Its queries,
times the query heads of one kv head, are cut into tiles of ``rows`` (token, head) pairs, token by
token, so that a tile holds few tokens if the group is large: little is wasted on the diagonal, and
71 heads over one need no padding. A program owns one tile and walks the keys from the window's
first page to its own last token (FlashAttention: Dao, 2023, arXiv:2307.08691; online softmax:
Milakov and Gimelshein, 2018, arXiv:1805.02867). Keys that every row sees skip the mask:

    positions:   | window's edge: masked | seen by all: no mask | diagonal: masked |

A position beyond the tile's last token is masked in scores and read as 0 in values: no NaN of a
stranger's page can enter a sum.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.paged_attention.extend_tuning import ExtendTuning, extend_tuning
from pallas_kernels.triton_parts import bf16, cdiv, precision, rotated, whole

BLOCK_QUERIES = 128
Refs = Mapping[str, Any]
_LOWEST = -1e30  # finite, so that a row that has not seen a key yet rescales without NaN


class QueryBlocks(NamedTuple):
    """Runs of consecutive tokens of one sequence, i32[NB] each; on the host or on the device.

    Block b is rows first[b] to first[b] + count[b] - 1 of the packed tokens. They stand at
    positions position[b], position[b] + 1, ... of the sequence whose pages are row chunk[b] of the
    page table. count 0: no block. They start in this order: best are the longest walks first, and
    empty blocks last, where their launches hide behind the last walks.
    """

    first: np.ndarray | jax.Array
    count: np.ndarray | jax.Array  # type: ignore[assignment]  # hides tuple.count
    chunk: np.ndarray | jax.Array
    position: np.ndarray | jax.Array


def query_blocks(
    lengths: Sequence[int], starts: Sequence[int], block_queries: int, max_blocks: int
) -> QueryBlocks:
    """Cuts chunks that lie packed from row 0 on; numpy, padded with empty blocks.

    Chunk c has lengths[c] tokens, the first of them at position starts[c] of its sequence. A
    chunk's last block, the longest walk, comes first; chunks stay together, for the cache's sake.
    """
    chunks = zip(_rows(lengths), lengths, starts, strict=True)
    blocks = [
        (row + done, min(block_queries, length - done), chunk, start + done)
        for chunk, (row, length, start) in enumerate(chunks)
        for done in reversed(range(0, length, block_queries))
    ]
    if len(blocks) > max_blocks:
        raise ValueError(f"{len(blocks)} blocks of queries, room for {max_blocks}")
    table = np.zeros((4, max_blocks), np.int32)
    table[:, : len(blocks)] = np.asarray(blocks, np.int32).reshape(-1, 4).T
    return QueryBlocks(*table)


def _rows(lengths: Sequence[int]) -> Iterator[int]:
    """Where each chunk begins."""
    row = 0
    for length in lengths:
        yield row
        row += length


def max_query_blocks(num_tokens: int, num_chunks: int, block_queries: int) -> int:
    """The most blocks that these many tokens in at most these many chunks can need."""
    chunks = min(num_chunks, num_tokens)
    return chunks + (num_tokens - chunks) // block_queries


def paged_extend(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    blocks: QueryBlocks,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: tuple[float, ...] | None = None,
    interpret: bool = False,
    tuning: ExtendTuning | None = None,
) -> jax.Array:
    """out[t, i] = sum_j softmax_j(scale * (q[t, i] . k_j + alibi_i * j)) v_j, j <= t's position.

    q: [T, H, h]                    packed tokens; h is a multiple of 16
    pool: [P, 2, K, page_size, h]   q's dtype, bf16 or f32; keys at [:, 0], values at [:, 1], those
                                    of this step's own tokens included; page_size a power of two
    page_table: i32[C, W]           position j of chunk c lies in page page_table[c, j // page_size]
    blocks: i32[NB] each            count at most BLOCK_QUERIES
    Returns [T, H, h] in q's dtype, in q's own memory where XLA can give it away; a row in no block
    keeps its q, so it is finite if that was. Window and bias as in ``api``; sums in f32, f32
    products in IEEE precision. Errors against ``reference``: order of summation, and with bf16
    weights rounded to bf16.
    """
    cut = _Cut.of(q, q.shape[1], pool, scale, window, tuning, interpret)
    return _extend(cut, _operands(q, None, pool, page_table, blocks, alibi_slopes))


def paged_extend_fused(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    pool: jax.Array,
    page_table: jax.Array,
    blocks: QueryBlocks,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: tuple[float, ...] | None = None,
    interpret: bool = False,
    tuning: ExtendTuning | None = None,
) -> jax.Array:
    """``paged_extend`` of queries as one product leaves them: rotated as they are read.

    qkv: [T, H + 2 K, h]                 heads of q, then k, then v; k and v are in the pool already
    rotation: (cos, sin), f32[T, h / 2]  as in ``paged_decode_fused``; None: q stays as it is
    Returns [T, H, h]; a row in no block holds anything.
    """
    num_heads = qkv.shape[1] - 2 * pool.shape[2]
    cut = _Cut.of(qkv, num_heads, pool, scale, window, tuning, interpret)
    return _extend(cut, _operands(qkv, rotation, pool, page_table, blocks, alibi_slopes))


def _operands(
    q: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    pool: jax.Array,
    page_table: jax.Array,
    blocks: QueryBlocks,
    alibi_slopes: tuple[float, ...] | None,
) -> dict[str, jax.Array]:
    """The kernel's arrays by name."""
    named = dict(zip(blocks._fields, map(jnp.asarray, blocks), strict=True))
    named |= {"table": page_table, "q": q, "pool": pool}
    if rotation is not None:
        named |= {"cos": rotation[0], "sin": rotation[1]}
    if alibi_slopes is not None:
        named["slopes"] = jnp.asarray(alibi_slopes, jnp.float32)
    return named


# The layers of a model are one function, traced and lowered once.
@partial(jax.jit, static_argnums=0)
def _extend(cut: _Cut, operands: dict[str, jax.Array]) -> jax.Array:
    names, arrays = list(operands), list(operands.values())
    q, pool, tuning = operands["q"], operands["pool"], cut.tuning
    out = jax.ShapeDtypeStruct((q.shape[0], cut.num_heads, cut.head_dim), q.dtype)

    def named(*refs: Any) -> None:
        _extend_kernel(cut, dict(zip([*names, "out"], refs, strict=True)))

    return pl.pallas_call(
        named,
        # heads run fastest: a wave of programs shares few sequences, whose keys stay in the cache
        grid=(
            pl.cdiv(BLOCK_QUERIES * cut.group, tuning.rows),
            pool.shape[2],
            operands["count"].shape[0],
        ),
        in_specs=[whole(x.shape) for x in arrays],
        out_specs=whole(out.shape),
        out_shape=out,
        # a tile is read and written by one program
        input_output_aliases={names.index("q"): 0} if out.shape == q.shape else {},
        compiler_params=pltriton.CompilerParams(
            num_warps=tuning.num_warps, num_stages=tuning.num_stages
        ),
        interpret=cut.interpret,
        name="paged_extend",
    )(*arrays)


@dataclass(frozen=True)
class _Cut:
    """What is fixed at compile time."""

    num_heads: int
    group: int
    head_dim: int
    page_size: int
    scale: float
    window: int | None
    tuning: ExtendTuning
    interpret: bool

    @classmethod
    def of(
        cls,
        q: jax.Array,
        num_heads: int,
        pool: jax.Array,
        scale: float,
        window: int | None,
        tuning: ExtendTuning | None,
        interpret: bool,
    ) -> _Cut:
        head_dim = q.shape[2]
        num_kv, page_size = pool.shape[2:4]
        tuning = tuning or extend_tuning(q.dtype.itemsize, head_dim)
        group = num_heads // num_kv
        return cls(num_heads, group, head_dim, page_size, scale, window, tuning, interpret)

    @property
    def factor(self) -> float:
        """Scores are kept in base 2: the hardware's exponential."""
        return self.scale * math.log2(math.e)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Columns of head_dim as (first, size), sizes powers of two: 80 = 64 + 16.

        Arrays in a kernel have such sizes; padding 80 to 128 would compute 1.6 times as much.
        """
        bits = [1 << b for b in reversed(range(self.head_dim.bit_length()))]
        sizes = [bit for bit in bits if bit & self.head_dim]
        return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))

    def weights(self, scores: jax.Array, top: jax.Array) -> jax.Array:
        """2^(factor * scores - top) for exponents <= 0.

        Two instructions, where XLA's Triton never contracts a multiplication and a subtraction,
        and its exponential spends three more on results under 2^-126, which are 0 here.
        """
        if self.interpret:
            return jnp.exp2(scores * self.factor - top[:, None])
        factor = np.float32(self.factor).view(np.uint32)
        (weights,) = pltriton.elementwise_inline_asm(
            f"fma.rn.f32 $0, $1, 0f{factor:08X}, $2; ex2.approx.ftz.f32 $0, $0;",
            args=[scores, jnp.broadcast_to(-top[:, None], scores.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, scores.dtype)],
        )
        return weights


class _Tile(NamedTuple):
    """One program's queries."""

    kv: jax.Array  # i32[]
    chunk: jax.Array  # i32[]: the row of the page table
    tokens: jax.Array  # i32[rows]: packed row of each pair
    members: jax.Array  # i32[rows]: head within the group
    positions: jax.Array  # i32[rows]
    live: jax.Array  # bool[rows]
    low: jax.Array  # i32[]: the first token's position
    high: jax.Array  # i32[]: the last token's


# top score, sum of weights, weighted sums of values per part: [rows], [rows], [rows, size] each
_State = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


def _extend_kernel(cut: _Cut, refs: Refs) -> None:
    """Program (tile, kv, block)."""
    begin, kv, block = pl.program_id(0) * cut.tuning.rows, pl.program_id(1), pl.program_id(2)
    first, count, chunk, position = (refs[name][block] for name in QueryBlocks._fields)
    # none of them is ever negative: asking makes the four loads wait at once, not in turn
    live = (begin < count * cut.group) & (jnp.minimum(first, jnp.minimum(chunk, position)) >= 0)

    @pl.when(live)
    def _() -> None:
        _attend(cut, _tile(cut, begin, kv, first, count, chunk, position), refs)


def _attend(cut: _Cut, tile: _Tile, refs: Refs) -> None:
    """Reads the tile's queries, walks the keys, writes the output."""
    angles = [refs[name] for name in ("cos", "sin") if name in refs]
    live = tile.live[:, None]
    queries = tuple(
        rotated(refs["q"], where, live, cut.head_dim, angles) for where in _places(cut, tile)
    )
    slopes = _slopes(cut, refs["slopes"], tile) if "slopes" in refs else None
    _, total, acc = _walk(cut, tile, queries, slopes, refs["pool"], refs["table"])
    inverse = 1.0 / total
    for where, sums in zip(_places(cut, tile), acc, strict=True):
        out = (sums * inverse[:, None]).astype(refs["out"].dtype)
        pltriton.store(refs["out"].at[where], out, mask=live)


def _tile(
    cut: _Cut,
    begin: jax.Array,
    kv: jax.Array,
    first: jax.Array,
    count: jax.Array,
    chunk: jax.Array,
    position: jax.Array,
) -> _Tile:
    """Pairs ``begin`` to ``begin + rows - 1`` of a block; padded pairs follow the last token."""
    pairs, group = begin + jnp.arange(cut.tuning.rows), jnp.int32(cut.group)
    nth, members = lax.div(pairs, group), lax.rem(pairs, group)
    last = jnp.minimum(lax.div(begin + cut.tuning.rows - 1, group), count - 1)
    return _Tile(
        kv=kv,
        chunk=chunk,
        tokens=first + nth,
        members=members,
        positions=position + nth,
        live=nth < count,
        low=position + lax.div(begin, group),
        high=position + last,
    )


def _places(cut: _Cut, tile: _Tile) -> Iterator[tuple[jax.Array, ...]]:
    """Where the tile's queries lie, and its outputs, part by part: indices of [rows, size]."""
    heads = tile.kv * cut.group + tile.members
    for part in cut.parts:
        yield tile.tokens[:, None], heads[:, None], _columns(part)[None, :]


def _columns(part: tuple[int, int]) -> jax.Array:
    first, size = part
    return first + jnp.arange(size)


def _slopes(cut: _Cut, slopes_ref: Any, tile: _Tile) -> jax.Array:
    """f32[rows or 1, 1], rounded to bf16."""
    if cut.group == 1:
        return bf16(slopes_ref[tile.kv]).reshape(1, 1)
    return bf16(pltriton.load(slopes_ref.at[tile.kv * cut.group + tile.members]))[:, None]


def _walk(
    cut: _Cut,
    tile: _Tile,
    queries: tuple[jax.Array, ...],
    slopes: jax.Array | None,
    pool_ref: Any,
    table_ref: Any,
) -> _State:
    """The online softmax over all keys that the tile sees, in turns of ``keys`` positions."""
    size = cut.tuning.keys
    origin = _origin(cut, tile)

    def turn(i: jax.Array, state: _State) -> _State:
        begin = origin + i * size
        at = begin + jnp.arange(size)
        keys, values = _read(cut, pool_ref, table_ref, tile, begin, at <= tile.high)
        scores = reduce(operator.add, map(_dot_t, queries, keys))
        if slopes is not None:
            scores += bf16(slopes * bf16(at.astype(jnp.float32))[None, :])
        scores = lax.cond(
            _seen_by_all(cut, tile, begin),
            lambda: scores,
            lambda: jnp.where(_visible(cut, at, tile.positions), scores, -jnp.inf),
        )
        return _accumulate(cut, state, scores, values)

    nothing: _State = (
        jnp.full((cut.tuning.rows,), _LOWEST, jnp.float32),
        jnp.zeros((cut.tuning.rows,), jnp.float32),
        tuple(jnp.zeros((cut.tuning.rows, size), jnp.float32) for _, size in cut.parts),
    )
    return lax.fori_loop(jnp.int32(0), cdiv(tile.high + 1 - origin, size), turn, nothing)


def _origin(cut: _Cut, tile: _Tile) -> jax.Array:
    """The position of turn 0: where the page begins that holds the first token's oldest key."""
    if cut.window is None:
        return jnp.int32(0)
    page_size = jnp.int32(cut.page_size)
    return lax.div(jnp.maximum(tile.low - cut.window + 1, 0), page_size) * page_size


def _seen_by_all(cut: _Cut, tile: _Tile, begin: jax.Array) -> jax.Array:
    """Whether every row of the tile sees every position of the turn: then no score is masked."""
    seen = begin + cut.tuning.keys - 1 <= tile.low
    return seen if cut.window is None else seen & (begin > tile.high - cut.window)


def _read(
    cut: _Cut,
    pool_ref: Any,
    table_ref: Any,
    tile: _Tile,
    begin: jax.Array,
    inside: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """K and V of one turn in their parts, [keys, size] each; values are 0 where not ``inside``.

    Keys need no mask: their scores are selected, not multiplied.
    """
    size, page_size = cut.tuning.keys, jnp.int32(cut.page_size)
    offsets = jnp.arange(size)
    if size <= cut.page_size:
        page = table_ref[tile.chunk, lax.div(begin, page_size)]
        offsets += lax.rem(begin, page_size)
    else:
        nth = lax.div(begin, page_size) + lax.div(offsets, page_size)
        page = pltriton.load(table_ref.at[tile.chunk, nth], mask=inside, other=0)[:, None]
        offsets = lax.rem(offsets, page_size)
    offsets = offsets[:, None]
    columns = [_columns(part)[None, :] for part in cut.parts]
    keys = tuple(pltriton.load(pool_ref.at[page, 0, tile.kv, offsets, c]) for c in columns)
    values = tuple(
        pltriton.load(pool_ref.at[page, 1, tile.kv, offsets, c], mask=inside[:, None], other=0.0)
        for c in columns
    )
    return keys, values


def _visible(cut: _Cut, at: jax.Array, positions: jax.Array) -> jax.Array:
    """bool[rows, keys]: causal, and inside the window."""
    seen = at[None, :] <= positions[:, None]
    return seen if cut.window is None else seen & (at[None, :] > positions[:, None] - cut.window)


def _accumulate(
    cut: _Cut, state: _State, scores: jax.Array, values: tuple[jax.Array, ...]
) -> _State:
    """One turn of the online softmax; the scale is folded into the exponent's multiply-add."""
    top, total, acc = state
    new_top = jnp.maximum(top, scores.max(1) * cut.factor)
    kept = jnp.exp2(top - new_top)
    weights = cut.weights(scores, new_top)
    mixed = tuple(
        sums * kept[:, None] + _dot(weights.astype(v.dtype), v)
        for sums, v in zip(acc, values, strict=True)
    )
    return new_top, total * kept + weights.sum(1), mixed


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in f32."""
    return pltriton.dot(a, b, precision=precision(b))


def _dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in f32."""
    return pltriton.dot(a, b, trans_b=True, precision=precision(b))
