"""Paged attention of one query a sequence on a GPU: split-K, in Pallas' Triton dialect.

Decode reads every key and value of a sequence once and computes next to nothing with them, so the
kernel is a stream from memory. A program owns one (sequence, kv head, split) and all query heads
of that kv head: K and V are read once whatever the grouping. It walks its positions in *turns*
(part of a page, a page or several) with an online softmax.

    [ window start ............................. position ]    cut at whole turns, evenly
      split 0      | split 1      | ...     | a split without a turn exits at once

The grid is fixed at compile time, the boundaries are not: they follow a sequence's true length, so
that a short one in a wide page table still spreads over all splits. With more than one split each
leaves its normalised output and log-sum-exp, both f32, and a second kernel joins them
(Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023).

A position that the query does not see is masked when it is read: no NaN on a stranger's page
enters a sum. Index arithmetic on pools over 4 GiB is 64-bit (Pallas chooses by the array's size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.paged_attention.tuning import DecodeTuning, decode_tuning
from pallas_kernels.triton_parts import bf16, cdiv, precision, rotated, whole

_MASKED = -1e30  # finite, so that rescaling by a first turn is free of NaN
_LOG2_E = math.log2(math.e)  # scores are kept in base 2, the hardware's exponential
_MIN_DOT_ROWS = 16

Refs = Mapping[str, Any]


def paged_decode(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: tuple[float, ...] | None = None,
    interpret: bool = False,
    tuning: DecodeTuning | None = None,
) -> jax.Array:
    """out[b, i] = sum_j softmax_j(scale * (q[b, i] . k_j + alibi_i * j)) v_j
                   over max(0, p - window + 1) <= j <= p = positions[b].

    q: [B, H, h]                    one query a sequence
    pool: [P, 2, K, page_size, h]   q's dtype, bf16 or f32; keys at [:, 0], values at [:, 1]
    page_table: i32[B, W]           position j lies in page page_table[b, j // page_size]
    positions: i32[B]               the query's own key is in the pool; < 0: padding, output 0
    Returns [B, H, h] in q's dtype. Bias as in ``api``. Sums in f32, f32 products in IEEE
    precision; against ``reference`` the order of summation differs, and with bf16 and
    ``tuning.dot`` softmax weights are rounded to bf16.
    """
    cut = _Cut.of(q, pool, scale, window, tuning)
    operands = {"q": q, "pool": pool, "table": page_table, "positions": positions}
    return _decode(cut, operands, alibi_slopes, interpret)["out"]


def paged_decode_fused(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    pool: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: tuple[float, ...] | None = None,
    interpret: bool = False,
    tuning: DecodeTuning | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotates q and k, writes k and v to their page, and attends: one launch for all three.

    qkv: [B, H + 2 K, h]                 heads of q, then k, then v, as one product leaves them: cut
                                         apart they would be copied. k and v are of the query's own
                                         position, not yet in the pool
    rotation: (cos, sin), f32[B, h / 2]  half-split form, [x1 cos - x2 sin, x2 cos + x1 sin];
                                         rounded to q's dtype; None: q and k stay as they are
    Returns (out, pool), the pool written in place when donated; the rest as ``paged_decode``.
    """
    cut = _Cut.of(qkv, pool, scale, window, tuning, fused=True)
    operands = {"q": qkv, "pool": pool, "table": page_table, "positions": positions}
    if rotation is not None:
        operands |= {"cos": rotation[0], "sin": rotation[1]}
    results = _decode(cut, operands, alibi_slopes, interpret)
    return results["out"], results["pool"]


# The layers of a model are one function, traced and lowered once.
@partial(jax.jit, static_argnums=(0, 2, 3))
def _decode(
    cut: _Cut,
    operands: dict[str, jax.Array],
    alibi_slopes: tuple[float, ...] | None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """One launch, or one and the join of its splits."""
    if alibi_slopes is not None:
        operands = operands | {"slopes": jnp.asarray(alibi_slopes, jnp.float32)}
    q, pool, splits = operands["q"], operands["pool"], cut.tuning.splits
    heads = q.shape[0], cut.num_heads
    out = {"out": jax.ShapeDtypeStruct((*heads, cut.head_dim), q.dtype)}
    parts = {
        "parts": jax.ShapeDtypeStruct((*heads, splits, cut.head_dim), jnp.float32),
        "sums": jax.ShapeDtypeStruct((*heads, splits), jnp.float32),
    }
    written = {"pool": jax.ShapeDtypeStruct(pool.shape, pool.dtype)} if cut.fused else {}
    results = _launch(
        partial(_attend_kernel, cut),
        (q.shape[0], pool.shape[2], splits),
        operands,
        (out if splits == 1 else parts) | written,
        pltriton.CompilerParams(num_warps=cut.tuning.num_warps, num_stages=cut.tuning.num_stages),
        interpret,
    )
    if splits == 1:
        return results
    joined = _launch(
        partial(_join_kernel, cut),
        heads,
        {name: results[name] for name in parts} | {"positions": operands["positions"]},
        out,
        pltriton.CompilerParams(num_warps=1, num_stages=1),
        interpret,
    )
    return results | joined


@dataclass(frozen=True)
class _Cut:
    """What is fixed at compile time."""

    num_heads: int
    group: int
    head_dim: int
    page_size: int
    scale: float
    window: int | None
    fused: bool
    tuning: DecodeTuning

    @classmethod
    def of(
        cls,
        q: jax.Array,
        pool: jax.Array,
        scale: float,
        window: int | None,
        tuning: DecodeTuning | None,
        fused: bool = False,
    ) -> _Cut:
        num_seqs, num_heads, head_dim = q.shape
        num_kv, page_size = pool.shape[2:4]
        num_heads -= 2 * num_kv * fused
        group = num_heads // num_kv
        if tuning is None:
            device_kind, streams = jax.devices()[0].device_kind, num_seqs * num_kv
            tuning = decode_tuning(device_kind, group, head_dim, streams, pool.dtype.itemsize)
        return cls(num_heads, group, head_dim, page_size, scale, window, fused, tuning)

    @property
    def rows(self) -> tuple[int, ...]:
        """Query heads of a program, padded for the matrix units; () for a head by itself."""
        if not self.tuning.dot:
            return ()
        return (max(_MIN_DOT_ROWS, pl.next_power_of_2(self.group)),)

    @property
    def columns(self) -> int:
        """head_dim padded: every array in a kernel has a power of two for its size."""
        return pl.next_power_of_2(self.head_dim)

    def turns(self, position: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[first, last) turns of a split: empty beyond the true length and for padding."""
        oldest = jnp.int32(0)
        if self.window is not None:
            oldest = jnp.maximum(position + 1 - self.window, 0)
        begin = lax.div(oldest, jnp.int32(self.tuning.turn))
        end = cdiv(jnp.maximum(self.stored(position), 0), self.tuning.turn)
        share = cdiv(end - begin, self.tuning.splits)
        first = begin + split * share
        return first, jnp.minimum(first + share, end)

    def stored(self, position: jax.Array) -> jax.Array:
        """Positions whose keys the pool holds before the launch."""
        return position if self.fused else position + 1

    def live(self, position: jax.Array, split: jax.Array) -> jax.Array:
        """Whether a split has anything to add; the new key of a fused launch is split 0's."""
        first, last = self.turns(position, split)
        return (first < last) | ((split == 0) & (position >= 0))

    def seen(self, at: jax.Array, position: jax.Array) -> jax.Array:
        seen = at < self.stored(position)
        return seen if self.window is None else seen & (at > position - self.window)


class _State(NamedTuple):
    """The online softmax: top score, sum of weights, weighted sum of values."""

    top: jax.Array  # [*rows]
    total: jax.Array  # [*rows]
    acc: jax.Array  # [*rows, columns]


@dataclass(frozen=True)
class _Program:
    """One program's place, and how it reads what lies there."""

    cut: _Cut
    refs: Refs
    seq: jax.Array
    kv: jax.Array
    split: jax.Array
    position: jax.Array

    @property
    def angles(self) -> list[Any]:
        """cos and sin; none where nothing is rotated."""
        return [self.refs[name] for name in ("cos", "sin") if name in self.refs]

    @property
    def owns_new(self) -> jax.Array:
        """Whether the new key and value are this program's to add and to write."""
        return (self.split == 0) & (self.position >= 0)

    def heads(self) -> tuple[jax.Array, jax.Array]:
        """i32[*rows] query heads, and which of them are no padding."""
        if not self.cut.tuning.dot:
            return self.kv, self.kv >= 0
        rows = jnp.arange(self.cut.rows[0])
        return self.kv * self.cut.group + rows, rows < self.cut.group

    def own_block(self) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Index of the group's heads in a [B, H, h] array, and its mask: [*rows, columns]."""
        heads, own = self.heads()
        columns = jnp.arange(self.cut.columns)
        heads, columns = jnp.broadcast_arrays(heads[..., None], columns)
        return (self.seq, heads, columns), own[..., None] & (columns < self.cut.head_dim)

    def pages(self, turn: jax.Array) -> jax.Array:
        """The page of every position of a turn, or the one page that the turn is part of."""
        size, page_size = self.cut.tuning.turn, jnp.int32(self.cut.page_size)
        table, newest = self.refs["table"], jnp.maximum(self.position, 0)
        if size <= self.cut.page_size:
            return table[self.seq, lax.div(jnp.minimum(turn * size, newest), page_size)]
        at = jnp.minimum(turn * size + jnp.arange(size), newest)
        return pltriton.load(table.at[self.seq, lax.div(at, page_size)])

    def read(self, at: jax.Array, seen: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V of one turn, [turn, columns] each; 0 where the query does not look."""
        offsets = lax.rem(at, jnp.int32(self.cut.page_size))[:, None]
        columns = jnp.arange(self.cut.columns)[None, :]
        mask = seen[:, None] & (columns < self.cut.head_dim)
        page = pages[:, None] if pages.ndim else pages
        keys, values = (
            pltriton.load(
                self.refs["pool"].at[page, side, self.kv, offsets, columns], mask=mask, other=0.0
            )
            for side in (0, 1)
        )
        return keys, values


def _attend_kernel(cut: _Cut, refs: Refs) -> None:
    """Program (b, kv, split): softmax(q k) v over the split's turns, for the kv head's group."""
    seq, kv, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    position = refs["positions"][seq]
    program = _Program(cut, refs, seq, kv, split, position)
    if cut.tuning.splits == 1:
        _attend(program)  # for padding too: without a turn its output is 0
    else:
        pl.when(cut.live(position, split))(partial(_attend, program))


def _attend(program: _Program) -> None:
    cut, refs = program.cut, program.refs
    index, mask = program.own_block()
    q = rotated(refs["q"], index, mask, cut.head_dim, program.angles)
    state = _add_new(program, q) if cut.fused else _empty(cut)
    top, total, acc = _walk(program, q, state)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    if cut.tuning.splits == 1:
        pltriton.store(refs["out"].at[index], out.astype(refs["out"].dtype), mask=mask)
        return
    seq, heads, columns = index
    pltriton.store(refs["parts"].at[seq, heads, program.split, columns], out, mask=mask)
    heads, own = program.heads()
    sums = top + jnp.log(total) * _LOG2_E
    pltriton.store(refs["sums"].at[seq, heads, program.split], sums, mask=own)


def _walk(program: _Program, q: jax.Array, state: _State) -> _State:
    """The split's turns, in order.

    Pages are read a turn ahead and carried: with an address that waits for a load of the same turn
    the compiler keeps no second turn in flight.
    """
    cut = program.cut
    first, last = cut.turns(program.position, program.split)
    slopes = _slopes(program)

    def visit(turn: jax.Array, carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        pages, state = carry
        at = turn * cut.tuning.turn + jnp.arange(cut.tuning.turn)
        seen = cut.seen(at, program.position)
        keys, values = program.read(at, seen, pages)
        scores = _scores(cut, q, keys)
        if slopes is not None:
            scores += bf16(slopes[..., None] * bf16(at.astype(jnp.float32)))
        scores = jnp.where(seen, scores * (cut.scale * _LOG2_E), _MASKED)
        return program.pages(turn + 1), _accumulate(cut, state, scores, values)

    return lax.fori_loop(first, last, visit, (program.pages(first), state))[1]


def _scores(cut: _Cut, q: jax.Array, keys: jax.Array) -> jax.Array:
    """q k^T: f32[*rows, turn]."""
    if cut.tuning.dot:
        return pltriton.dot(q, keys, trans_b=True, precision=precision(keys))
    return jnp.sum(q.astype(jnp.float32)[None, :] * keys.astype(jnp.float32), axis=1)


def _accumulate(cut: _Cut, state: _State, scores: jax.Array, values: jax.Array) -> _State:
    """One turn of the online softmax. Milakov and Gimelshein, 2018, arXiv:1805.02867."""
    top = jnp.maximum(state.top, scores.max(-1))
    kept = jnp.exp2(state.top - top)
    weights = jnp.exp2(scores - top[..., None])
    if cut.tuning.dot:
        rounded = weights.astype(values.dtype)
        mixed = pltriton.dot(rounded, values, precision=precision(values))
    else:
        mixed = jnp.sum(weights[:, None] * values.astype(jnp.float32), axis=0)
    total = state.total * kept + weights.sum(-1)
    return _State(top, total, state.acc * kept[..., None] + mixed)


def _empty(cut: _Cut) -> _State:
    return _State(
        jnp.full(cut.rows, _MASKED, jnp.float32),
        jnp.zeros(cut.rows, jnp.float32),
        jnp.zeros((*cut.rows, cut.columns), jnp.float32),
    )


def _add_new(program: _Program, q: jax.Array) -> _State:
    """Writes the new key and value to their page; the softmax of that position alone.

    Taken from registers, not read back: no other program waits for the write, and no turn sees the
    position. It is split 0's; the others begin empty.
    """
    cut, refs, owns = program.cut, program.refs, program.owns_new
    columns = jnp.arange(cut.columns)
    mask = columns < cut.head_dim
    pool, qkv = refs["pool"], refs["q"]
    k_head = cut.num_heads + program.kv
    k_index, v_index = (
        (program.seq, jnp.broadcast_to(head, columns.shape), columns)
        for head in (k_head, k_head + pool.shape[2])
    )
    key = rotated(qkv, k_index, mask, cut.head_dim, program.angles).astype(pool.dtype)
    value = pltriton.load(qkv.at[v_index], mask=mask, other=0.0).astype(pool.dtype)
    page_size = jnp.int32(cut.page_size)
    newest = jnp.maximum(program.position, 0)
    page = refs["table"][program.seq, lax.div(newest, page_size)]
    offset = lax.rem(newest, page_size)
    for side, new in enumerate((key, value)):
        where = pool.at[page, side, program.kv, offset, columns]
        pltriton.store(where, new, mask=mask & owns)
    scores = jnp.sum(q.astype(jnp.float32) * key.astype(jnp.float32), axis=-1)
    slopes = _slopes(program)
    if slopes is not None:
        scores += bf16(slopes * bf16(program.position.astype(jnp.float32)))
    acc = jnp.broadcast_to(value.astype(jnp.float32), (*cut.rows, cut.columns))
    return _State(
        jnp.where(owns, scores * (cut.scale * _LOG2_E), _MASKED),
        jnp.where(owns, jnp.ones(cut.rows, jnp.float32), 0.0),
        jnp.where(owns, acc, 0.0),
    )


def _slopes(program: _Program) -> jax.Array | None:
    """ALiBi slopes of the group, f32[*rows] of bf16's precision."""
    if "slopes" not in program.refs:
        return None
    heads, own = program.heads()
    return bf16(pltriton.load(program.refs["slopes"].at[heads], mask=own, other=0.0))


def _join_kernel(cut: _Cut, refs: Refs) -> None:
    """Program (b, head): out = sum_s w_s part_s / sum_s w_s, w_s = 2^sums_s, over live splits."""
    seq, head = pl.program_id(0), pl.program_id(1)
    splits, columns = jnp.arange(cut.tuning.splits), jnp.arange(cut.columns)
    live = cut.live(refs["positions"][seq], splits)
    sums = pltriton.load(refs["sums"].at[seq, head, splits], mask=live, other=_MASKED)
    weights = jnp.where(live, jnp.exp2(sums - sums.max(0)), 0.0)
    inside = columns < cut.head_dim
    parts = pltriton.load(
        refs["parts"].at[seq, head, splits[:, None], columns[None, :]],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )
    out = jnp.sum(weights[:, None] * parts, axis=0) / jnp.maximum(weights.sum(0), 1e-30)
    pltriton.store(refs["out"].at[seq, head, columns], out.astype(refs["out"].dtype), mask=inside)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
    params: pltriton.CompilerParams,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Every array whole: a pointer that programs index by themselves.

    A name among operands and results is one array, updated in place; the kernel gets the result's
    reference, which reads what the operand held.
    """
    names = [*operands, *results]

    def named(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)))

    inputs, outputs = list(operands), list(results)
    out = pl.pallas_call(
        named,
        grid=grid,
        in_specs=[whole(x.shape) for x in operands.values()],
        out_specs=[whole(x.shape) for x in results.values()],
        out_shape=list(results.values()),
        input_output_aliases={
            inputs.index(name): outputs.index(name) for name in results if name in operands
        },
        compiler_params=params,
        interpret=interpret,
        name=f"paged_decode{kernel.func.__name__.removesuffix('_kernel')}",
    )(*operands.values())
    return dict(zip(outputs, out, strict=True))
