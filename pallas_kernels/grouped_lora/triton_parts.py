"""What shrink and expand share: how a site is cut, their launch, and small pieces of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.grouped_lora.tuning import ExpandTuning, ShrinkTuning, Tuning
from pallas_kernels.triton_parts import whole

PAGE = 8  # rank columns of a page
_THREAD_A = 128  # numbers of A that a thread holds at most
_WARP_COLUMNS = 64  # of the sums of a block's rows: what more takes in registers, loads lack


@dataclass(frozen=True)
class Cut:
    """What is fixed at compile time."""

    block_rows: int
    d_in: int
    widths: tuple[int, ...]  # of the site's outputs
    pool_of: tuple[int, ...]  # which of the distinct pools of B each output has
    site_rows: tuple[int, ...]
    table_width: int
    tuning: Tuning
    early: bool
    interpret: bool

    @property
    def inner(self) -> int:
        """Columns of h: every output has room for every page, most of it never touched."""
        return len(self.widths) * self.table_width * PAGE

    @property
    def split_k(self) -> int:
        """How much of D a split is: whole turns of ``block_k``."""
        shrink = self.tuning.shrink
        return pl.cdiv(self.d_in, shrink.block_k * shrink.splits) * shrink.block_k

    @property
    def row_k(self) -> int:
        """How much of D a block of one row reads at once: its split, or what registers hold."""
        shrink = self.tuning.shrink
        most = _THREAD_A * 32 * shrink.num_warps // shrink.block_r
        return max(shrink.block_k, min(pl.next_power_of_2(self.split_k), most))

    @property
    def part_n(self) -> int:
        """Columns whose sums several rows hold at once."""
        expand = self.tuning.expand
        return min(expand.block_n, _WARP_COLUMNS * expand.num_warps)

    @property
    def column_parts(self) -> int:
        return self.tuning.expand.block_n // self.part_n

    @property
    def loops_over_ranks(self) -> bool:
        """Whether an adapter may have more rank than expand takes at once."""
        return self.table_width * PAGE > self.tuning.expand.block_r

    @property
    def column_tiles(self) -> tuple[int, ...]:
        """Programs of expand for each output, per block."""
        return tuple(pl.cdiv(n, self.tuning.expand.block_n) for n in self.widths)


def launch(
    kernel: Callable[..., None],
    name: str,
    cut: Cut,
    tuning: ShrinkTuning | ExpandTuning,
    grid: tuple[int, ...],
    operands: list[jax.Array],
    out: jax.ShapeDtypeStruct,
    aliases: dict[int, int] | None = None,
) -> jax.Array:
    """Every operand whole: a pointer, which programs index by themselves."""
    return pl.pallas_call(
        partial(kernel, cut),
        grid=grid,
        in_specs=[whole(operand.shape) for operand in operands],
        out_specs=whole(out.shape),
        out_shape=out,
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(
            num_warps=tuning.num_warps, num_stages=tuning.num_stages
        ),
        interpret=cut.interpret,
        name=name,
    )(*operands)


class Ranks(NamedTuple):
    """A tile of rank columns: each one's page and row in it, its column of h, whether it is one."""

    page: jax.Array
    in_page: jax.Array
    column: jax.Array
    live: jax.Array


Scalars = list[jax.Array]


def by_count(cut: Cut, count: jax.Array, one: Callable[[], None], many: Callable[[], None]) -> None:
    if not cut.tuning.single:
        return many()
    pl.when(count == 1)(one)
    pl.when(count > 1)(many)
    return None


class Rows(NamedTuple):
    """The rows of a block's tile, and which of them are its own: [block_rows, 1]."""

    ids: jax.Array
    own: jax.Array


def rows_of_block(cut: Cut, first: jax.Array, count: jax.Array) -> Rows:
    offsets = jnp.arange(cut.block_rows)[:, None]
    return Rows(first + offsets, offsets < count)


def locate(page: jax.Array, ends: Sequence[jax.Array | int]) -> tuple[jax.Array, jax.Array]:
    """Which output the site's page belongs to, and which of its pages it is."""
    output, j = jnp.int32(0), page
    for i, end in enumerate(ends[:-1], 1):
        beyond = page >= end
        output = lax.select(beyond, jnp.int32(i), output)
        j = lax.select(beyond, page - end, j)
    return output, j


def pick(index: jax.Array, values: Sequence[int]) -> jax.Array:
    """values[index]: of few constants, by selection."""
    picked = jnp.int32(values[0])
    for i, value in enumerate(values[1:], 1):
        picked = lax.select(index == i, jnp.int32(value), picked)
    return picked


def is_one_of(index: jax.Array, values: Sequence[int]) -> jax.Array:
    return reduce(or_, (index == value for value in values))


def spread(pages: Sequence[jax.Array], lane: jax.Array) -> jax.Array:
    """The scalar of the page that each rank column is in."""
    spread = jnp.broadcast_to(pages[0], lane.shape)
    for i, page in enumerate(pages[1:], 1):
        spread = jnp.where(lane >= i * PAGE, page, spread)
    return spread


def fetch(ref: Any, *where: jax.Array | int) -> jax.Array:
    """ref[where], a scalar, asked for here and now.

    A compiler moves a plain load behind the branch that decides whether its value is needed, and
    with that lets one latency wait for another: a third of a microsecond of a two-microsecond
    kernel.
    """
    zero = where[0] * 0  # interpret mode takes no literal for the index of a volatile load
    return pltriton.load(ref.at[tuple(index + zero for index in where)], volatile=True)


def load(ref: Any, where: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """ref[where], 0 outside of the mask."""
    if mask is None:
        return pltriton.load(ref.at[where])
    shape = jnp.broadcast_shapes(*(jnp.shape(index) for index in where))
    return pltriton.load(ref.at[where], mask=jnp.broadcast_to(mask, shape), other=0.0)


def as_row(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask[None, :]


def both(mask: jax.Array, other: jax.Array | None) -> jax.Array:
    return mask if other is None else mask & other
