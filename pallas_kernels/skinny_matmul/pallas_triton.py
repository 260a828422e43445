"""The skinny matmuls as Pallas-Triton kernels: a split-K product, and a sum that norms.

Programs of the product: (column of tiles, block of rows, split of K). Every weight is read once
per block of rows, 16 bytes a thread. On the tensor cores Triton's pipeliner keeps ``num_stages``
steps of ``block_k`` in flight through shared memory; on the CUDA cores (up to 4 rows) loads go to
registers, and many programs share a multiprocessor.

Sizes that a tile does not divide are masked; a split of K is a whole number of steps, the last
splits may have fewer.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.skinny_matmul.operands import Norm, normalise, precision, swiglu
from pallas_kernels.skinny_matmul.tuning import MIN_DOT_ROWS, WARM_ROWS, Tile
from pallas_kernels.triton_parts import let_the_next_kernel_start, whole

Form = Literal["[K, N]", "[N, K]", "[K, 2 N]"]  # of a weight


def matmul(
    x: jax.Array,
    w: jax.Array,
    tile: Tile,
    *,
    transposed: bool = False,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``api.matmul``. One launch without splits; else XLA sums the partials in a second."""
    form: Form = "[N, K]" if transposed else "[K, N]"
    product = _Product(x.shape[0], x.shape[1], w.shape[0 if transposed else 1], tile, form)
    wanted = jnp.dtype(out_dtype or x.dtype)
    if tile.splits == 1:
        return _multiply(product, (x, w), wanted, interpret)[0]
    partials = _multiply(product, (x, w), jnp.dtype(jnp.float32), interpret)
    return jnp.sum(partials, axis=0).astype(wanted)


def matmul_swiglu(
    x: jax.Array,
    w: jax.Array,
    tile: Tile,
    delta: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As ``api.matmul_swiglu``, in one launch: a program has a tile of gate and the same of up.

    Without splits, because the activation needs whole sums.
    """
    assert tile.splits == 1
    product = _Product(x.shape[0], x.shape[1], w.shape[1] // 2, tile, "[K, 2 N]")
    operands = (x, w) if delta is None else (x, w, delta)
    return _multiply(product, operands, x.dtype, interpret)[0]


def split_matmul(
    x: jax.Array,
    w: jax.Array,
    tile: Tile,
    *,
    activated: bool = False,
    early: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """As ``api.split_matmul``. ``activated``: x is gate and up, [T, 2 K].

    ``early``: as ``let_the_next_kernel_start``; its condition is the caller's to keep.
    """
    k, n = w.shape
    product = _Product(x.shape[0], k, n, tile, "[K, N]", activated, early and not interpret)
    return _multiply(product, (x, w), jnp.dtype(jnp.float32), interpret)


def reduce_add_norm(
    partials: jax.Array,
    residual: jax.Array,
    norm: Norm,
    delta: jax.Array | None = None,
    *,
    next_weight: jax.Array | None = None,
    early: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As ``api.reduce_add_norm``; a program a row, and one for each row of ``next_weight`` to warm.

    ``early``: as ``let_the_next_kernel_start``; its condition is the caller's to keep.
    """
    optional = {"bias": norm.bias, "delta": delta, "next_weight": next_weight}
    named = {"partials": partials, "residual": residual, "weight": norm.weight}
    named |= {name: array for name, array in optional.items() if array is not None}
    return _sum(named, norm.kind, norm.eps, early and not interpret, interpret)


# The layers' launches are one function, traced and lowered once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _sum(
    named: dict[str, jax.Array],
    kind: Literal["rms", "layer"],
    eps: float,
    early: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    residual, next_weight = named["residual"], named.get("next_weight")
    rows, width = residual.shape
    warmed = 0 if next_weight is None else min(WARM_ROWS, next_weight.shape[0])
    out = [jax.ShapeDtypeStruct(residual.shape, residual.dtype)] * 2
    if warmed:
        out.append(jax.ShapeDtypeStruct((warmed,), jnp.float32))
    total, normed, *_ = pl.pallas_call(
        functools.partial(_sum_kernel, tuple(named), kind, eps, early),
        grid=(rows + warmed,),
        in_specs=[whole(array.shape) for array in named.values()],
        out_specs=[whole(array.shape) for array in out],
        out_shape=out,
        compiler_params=pltriton.CompilerParams(num_warps=_sum_warps(width), num_stages=1),
        interpret=interpret,
        name="reduce_add_norm",
    )(*named.values())
    return total, normed


@dataclass(frozen=True)
class _Product:
    """What a product kernel knows when it is traced: x [T, K] @ w -> [T, N]."""

    t: int
    k: int
    n: int
    tile: Tile
    form: Form
    activated: bool = False
    early: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        tile = self.tile
        return pl.cdiv(self.n, tile.block_n), pl.cdiv(self.t, tile.block_t), tile.splits


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _multiply(
    product: _Product, operands: tuple[jax.Array, ...], dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """[splits, T, N] of ``dtype``."""
    tile = product.tile
    assert tile.block_t >= min(product.t, MIN_DOT_ROWS), "a vector kernel has all rows at once"
    out = jax.ShapeDtypeStruct((tile.splits, product.t, product.n), dtype)
    kernel = _dot_kernel if tile.block_t >= MIN_DOT_ROWS else _vector_kernel
    return pl.pallas_call(
        functools.partial(kernel, product),
        grid=product.grid,
        in_specs=[whole(array.shape) for array in operands],
        out_specs=whole(out.shape),
        out_shape=out,
        compiler_params=pltriton.CompilerParams(
            num_warps=tile.num_warps, num_stages=tile.num_stages
        ),
        interpret=interpret,
        name="skinny_matmul",
    )(*operands)


def _dot_kernel(p: _Product, x_ref: Any, w_ref: Any, *rest: Any) -> None:
    """A block of rows on the tensor cores."""
    column, block, split = (pl.program_id(axis) for axis in range(3))
    rows = block * p.tile.block_t + jnp.arange(p.tile.block_t)
    columns = column * p.tile.block_n + jnp.arange(p.tile.block_n)
    if p.early:
        split = let_the_next_kernel_start(split)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = i * p.tile.block_k + jnp.arange(p.tile.block_k)
        x = _load_x(p, x_ref, rows[:, None], k[None, :])
        tiles = _load_weights(p, w_ref, k, columns)
        return tuple(total + _dot(p, x, w) for total, w in zip(sums, tiles, strict=True))

    zeros = jnp.zeros((p.tile.block_t, p.tile.block_n), jnp.float32)
    sums = lax.fori_loop(*_steps(p, split), step, (zeros,) * _num_parts(p))
    _store(p, rest, split, rows, columns, sums)


def _vector_kernel(p: _Product, x_ref: Any, w_ref: Any, *rest: Any) -> None:
    """Up to 4 rows on the CUDA cores: sums stay spread over K until the end, a sum per weight."""
    column, _, split = (pl.program_id(axis) for axis in range(3))
    columns = column * p.tile.block_n + jnp.arange(p.tile.block_n)
    if p.early:
        split = let_the_next_kernel_start(split)
    along_k = 1 if p.form == "[N, K]" else 0

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = i * p.tile.block_k + jnp.arange(p.tile.block_k)
        tiles = [w.astype(jnp.float32) for w in _load_weights(p, w_ref, k, columns)]
        xs = [_load_x(p, x_ref, t, k).astype(jnp.float32) for t in range(p.t)]
        terms = (jnp.expand_dims(x, 1 - along_k) * w for x in xs for w in tiles)
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    shape = (p.tile.block_k, p.tile.block_n)
    zeros = jnp.zeros(shape[::-1] if along_k else shape, jnp.float32)
    sums = lax.fori_loop(*_steps(p, split), step, (zeros,) * (p.t * _num_parts(p)))
    for t in range(p.t):
        mine = sums[t * _num_parts(p) : (t + 1) * _num_parts(p)]
        whole = tuple(jnp.sum(total, axis=along_k)[None, :] for total in mine)
        _store(p, rest, split, jnp.full((1,), t, jnp.int32), columns, whole)


def _num_parts(p: _Product) -> int:
    return 2 if p.form == "[K, 2 N]" else 1


def _steps(p: _Product, split: jax.Array) -> tuple[jax.Array, jax.Array]:
    """This split's share of the steps along K: [first, end)."""
    steps = pl.cdiv(p.k, p.tile.block_k)
    share = pl.cdiv(steps, p.tile.splits)
    first = jnp.minimum(split * share, steps)
    return first, jnp.minimum(first + share, steps)


def _load_x(p: _Product, x_ref: Any, rows: jax.Array | int, k: jax.Array) -> jax.Array:
    """x at (rows, k): [block_t, block_k], or [block_k] of one row; 0 outside."""
    shape = jnp.broadcast_shapes(jnp.shape(rows), k.shape)
    mask = _inside(shape, (rows, p.t, jnp.size(rows)), (k, p.k, p.tile.block_k))
    x = _load(x_ref.at[rows, k], mask)
    return swiglu(x, _load(x_ref.at[rows, p.k + k], mask)) if p.activated else x


def _load_weights(p: _Product, w_ref: Any, k: jax.Array, columns: jax.Array) -> list[jax.Array]:
    """The step's tiles: [block_k, block_n], or [block_n, block_k] of a weight [N, K].

    Read once a step of the model, so they are the first that L2 may forget.
    """
    if p.form == "[N, K]":
        k, columns = k[None, :], columns[:, None]
    else:
        k, columns = k[:, None], columns[None, :]
    shape = jnp.broadcast_shapes(k.shape, columns.shape)
    mask = _inside(shape, (k, p.k, p.tile.block_k), (columns, p.n, p.tile.block_n))
    parts = [columns + part * p.n for part in range(_num_parts(p))]
    indices = [(part, k) if p.form == "[N, K]" else (k, part) for part in parts]
    return [_load(w_ref.at[index], mask, eviction_policy="evict_first") for index in indices]


def _dot(p: _Product, x: jax.Array, w: jax.Array) -> jax.Array:
    return pltriton.dot(x, w, trans_b=p.form == "[N, K]", precision=precision(x.dtype))


def _store(
    p: _Product,
    refs: tuple[Any, ...],
    split: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    sums: tuple[jax.Array, ...],
) -> None:
    """Writes [rows, columns] of this split; refs: the delta of gate and up if any, the output."""
    *deltas, out_ref = refs
    rows, columns = rows[:, None], columns[None, :]
    mask = _inside(sums[0].shape, (rows, p.t, rows.size), (columns, p.n, p.tile.block_n))
    values = [total.astype(out_ref.dtype) for total in sums]
    for delta_ref in deltas:
        starts = (columns + part * p.n for part in range(len(values)))
        added = [_load(delta_ref.at[rows, start], mask) for start in starts]
        values = [value + delta for value, delta in zip(values, added, strict=True)]
    value = swiglu(*values) if p.form == "[K, 2 N]" else values[0]
    pltriton.store(out_ref.at[split, rows, columns], value, mask=mask)


def _sum_kernel(
    names: tuple[str, ...], kind: Literal["rms", "layer"], eps: float, early: bool, *refs: Any
) -> None:
    """A row of the sum, or of the next weight."""
    ins, outs = refs[: len(names)], refs[len(names) :]
    given = dict(zip(names, ins, strict=True))
    rows, program = outs[0].shape[0], pl.program_id(0)
    if early:
        program = let_the_next_kernel_start(program)
    if "next_weight" not in given:
        _sum_row(given, kind, eps, program, *outs)
        return
    *sums, warmed_ref = outs
    pl.when(program < rows)(lambda: _sum_row(given, kind, eps, program, *sums))
    pl.when(program >= rows)(lambda: _warm(given["next_weight"], program - rows, warmed_ref))


def _sum_row(
    given: Mapping[str, Any],
    kind: Literal["rms", "layer"],
    eps: float,
    row: jax.Array,
    total_ref: Any,
    normed_ref: Any,
) -> None:
    """The partials' sum, the delta, the residual, the norm."""
    splits, _, width = given["partials"].shape
    columns = jnp.arange(pl.next_power_of_2(width))
    mask = _inside(columns.shape, (columns, width, columns.size))

    def read(name: str, *leading: Any) -> jax.Array:
        return _load(given[name].at[(*leading, columns)], mask)

    parts = [read("partials", split, row) for split in range(splits)]
    added = functools.reduce(operator.add, parts).astype(total_ref.dtype)
    if "delta" in given:
        added += read("delta", row)
    total = read("residual", row) + added
    norm = Norm(kind, read("weight"), eps, read("bias") if "bias" in given else None)
    pltriton.store(total_ref.at[row, columns], total, mask=mask)
    pltriton.store(normed_ref.at[row, columns], normalise(total, norm, width), mask=mask)


def _warm(weight_ref: Any, row: jax.Array, warmed_ref: Any) -> None:
    """Reads a row of a weight, so that it is in L2 when the next product begins with it.

    A sum of few rows leaves memory idle for its 2 to 3 microseconds, worth 6 MB or more. The sum
    of what was read is written, or the compiler would drop the reads.
    """
    total = jnp.zeros((_WARM_COLUMNS,), jnp.float32)
    for start in range(0, weight_ref.shape[1], _WARM_COLUMNS):
        columns = start + jnp.arange(_WARM_COLUMNS)
        mask = _inside(columns.shape, (columns, weight_ref.shape[1], _WARM_COLUMNS))
        total += _load(weight_ref.at[row, columns], mask).astype(jnp.float32)
    pltriton.store(warmed_ref.at[row], jnp.sum(total))


_WARM_COLUMNS = 8192


def _sum_warps(width: int) -> int:
    """Enough for 8 columns a thread: a row is all that its multiprocessor has to wait for."""
    return min(max(pl.next_power_of_2(width) // 256, 1), 16)


def _inside(shape: tuple[int, ...], *bounds: tuple[jax.Array | int, int, int]) -> jax.Array | None:
    """Where every index is under its limit; None if that is sure. bounds: index, limit, block."""
    checks = [index < limit for index, limit, block in bounds if limit % block]
    return jnp.broadcast_to(functools.reduce(operator.and_, checks), shape) if checks else None


def _load(ref: Any, mask: jax.Array | None, eviction_policy: str | None = None) -> jax.Array:
    other = None if mask is None else 0.0
    return pltriton.load(ref, mask=mask, other=other, eviction_policy=eviction_policy)
