"""Grouped LoRA at rank 16: ours beside XLA's loop of gathers and two ragged products.

Layers take turns: what one adds to y is the next one's x, so a chain of a square projection is
nothing but our launches. Of a wider site x is the first columns of y, cut out by a small kernel; a
chain of such kernels is the "empty chain". Every layer has adapters of its own, more than L2 holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.kernels.protocol import READ_TB_PER_S, Built, Contestant, KernelCase
from benchmarks.kernels.results import EMPTY, OURS
from pallas_kernels.grouped_lora import pallas_triton, tuning, xla
from pallas_kernels.grouped_lora.cases import Case, Popularity, Shape, rows_of_adapters, tables
from pallas_kernels.grouped_lora.operands import ProjectionPages, RowBlocks, SitePages
from pallas_kernels.grouped_lora.tuning import H100, Tuning, TuningKey

D, RANK, SLOTS = 4096, 16, 64
NUM_LAYERS = 32
LEAST_BYTES = 64 << 20  # of adapters in a chain of ours
L2_BYTES = 50 << 20
MOST_RAGGED_TOKENS = 256  # a ragged product multiplies by every group
OTHER_BLOCK_ROWS = (16, 32, 128)  # of a prefill: how long blocks are is for the host to know
SMALL = 1e-3  # the scale in a chain, which feeds on its own output; 1 where results are compared


@dataclass(frozen=True)
class Work:
    """``num_tokens`` rows, equally many for each adapter; ``num_outputs`` projections, D x D."""

    num_tokens: int
    num_adapters: int
    num_outputs: int = 1
    max_rank: int = RANK  # that the tables have room for
    num_slots: int = SLOTS  # of the bank: a step has room for a block of each, most of them empty
    target_us: float | None = None

    @property
    def name(self) -> str:
        site = "" if self.num_outputs == 1 else f", {self.num_outputs} outputs"
        room = "" if self.max_rank == RANK else f", room for rank {self.max_rank}"
        slots = "" if self.num_slots == SLOTS else f", {self.num_slots} slots"
        return f"{self.num_tokens} on {self.num_adapters}{site}{room}{slots}"

    @property
    def adapter_bytes(self) -> int:
        """Of one layer."""
        return 2 * self.num_adapters * self.num_outputs * RANK * (D + D)

    @property
    def num_layers(self) -> int:
        return max(NUM_LAYERS, -(-LEAST_BYTES // self.adapter_bytes))

    @property
    def floor_us(self) -> float:
        """Adapters once; x read, y read and written, unless these stay in L2."""
        x_bytes, y_bytes = (2 * self.num_tokens * n for n in (D, self.num_outputs * D))
        streamed = x_bytes + 2 * y_bytes if x_bytes + y_bytes > L2_BYTES else 0
        return (self.adapter_bytes + streamed) / READ_TB_PER_S * 1e-6

    def key(self, block_rows: int) -> TuningKey:
        widths = (D,) * self.num_outputs
        return TuningKey(H100, 2, self.num_tokens, block_rows, D, self.max_rank, widths)

    def shape(self, block_rows: int) -> Shape:
        return Shape(
            d_in=D,
            widths=(D,) * self.num_outputs,
            num_tokens=self.num_tokens,
            num_blocks=min(self.num_tokens, self.num_slots + self.num_tokens // block_rows),
            max_rank=self.max_rank,
            num_pages=self.num_adapters * self.num_outputs * RANK // 8 + 2,
            block_rows=block_rows,
        )

    @property
    def case(self) -> Case:
        rows = rows_of_adapters(Popularity.DISTINCT, self.num_tokens, self.num_adapters)
        return Case(rows, ((RANK,) * self.num_outputs,) * self.num_adapters)


_SERVED = 64, 256  # a server's defaults: room for rank 64, 256 slots
WORKS = (
    Work(1, 1),
    Work(8, 8),
    Work(64, 64, target_us=10.0),
    Work(64, 1),
    Work(256, 64, target_us=12.0),
    Work(8192, 1, target_us=110.0),
    Work(8192, 64, target_us=110.0),
    *(Work(n, min(n, 64), num_outputs=3) for n in (1, 64, 8192)),
    *(Work(n, min(n, 64), max_rank=64) for n in (1, 64, 8192)),
    *(Work(256, n, 3, *_SERVED) for n in (64, 128, 256)),
)
# what a step launches: the attention's inputs, and its output
SWEEPS = tuple(
    Work(n, min(n, 64), num_outputs)
    for n in (128, 256, 64, 32, 8, 1, 8192, 2048)
    for num_outputs in (3, 1)
) + tuple(
    Work(n, adapters, num_outputs, *_SERVED)
    for n, adapters in ((256, 256), (256, 64), (128, 64), (8192, 64), (2048, 64))
    for num_outputs in (3, 1)
)


def cases() -> list[KernelCase]:
    return [_case(work, _build) for work in WORKS]


def sweep() -> list[KernelCase]:
    return [_case(work, _build_sweep) for work in SWEEPS]


def _case(work: Work, build: Callable[[Work], Built]) -> KernelCase:
    return KernelCase(
        "grouped_lora", work.name, work.floor_us, work.target_us, partial(build, work)
    )


def _build(work: Work) -> Built:
    bank = _Bank(work)
    key = work.key(tuning.rows_per_block(work.num_tokens))
    how = tuning.choose(key)
    contestants = [_ours(bank, OURS, key, how), _xla(bank)]
    if work.num_outputs == 1:  # what reads y is a kernel of ours
        contestants.append(_ours(bank, f"{OURS}, early", key, how, early=True))
    if work.num_tokens <= MOST_RAGGED_TOKENS:
        contestants.append(_ragged(bank))
    if work.num_outputs > 1:
        contestants.append(_empty(bank))
    return Built(tuple(contestants), bank.wanted())


def _build_sweep(work: Work) -> Built:
    """A candidate's name is its line in tuning.py."""
    bank = _Bank(work)
    usual = tuning.rows_per_block(work.num_tokens)
    others = OTHER_BLOCK_ROWS if usual > min(OTHER_BLOCK_ROWS) else ()
    keyed = [(work.key(usual), how) for how in tuning.candidates(work.key(usual))]
    keyed += [(key, tuning.rule(key)) for key in map(work.key, others)]
    contestants = [_ours(bank, f"{_line(key)}: {how}", key, how) for key, how in keyed]
    return Built(tuple(contestants), bank.wanted())


def _line(key: TuningKey) -> str:
    numbers = key.itemsize, key.num_tokens, key.block_rows, key.d_in, key.max_rank, key.widths
    return f"TuningKey(H100, {', '.join(map(str, numbers))})"


class _Bank:
    """The arrays of one case: x, a bank of random adapters, and who has which pages."""

    def __init__(self, work: Work) -> None:
        self.work = work
        keys = jax.random.split(jax.random.key(0), 4)
        num_pages = work.shape(16).num_pages
        pool = num_pages, work.num_layers, 8, D
        self.x = _normal(keys[0], (work.num_tokens, D), 1.0)
        self.y = _normal(keys[1], (work.num_tokens, work.num_outputs * D), 1.0)
        self.a_pool = _normal(keys[2], pool, D**-0.5)
        self.b_pool = _normal(keys[3], pool, RANK**-0.5)

    @cached_property
    def page_ids(self) -> np.ndarray:
        """i32[outputs, 2, adapters, 2]: of A, of B; two pages are rank 16."""
        pages = tables(self.work.shape(16), self.work.case).pages
        return np.asarray(pages, np.int32).transpose(1, 2, 0, 3)

    def wanted(self) -> jax.Array:
        """f32[T, outputs * D]: what the first layer's adapters add, at scale 1."""
        first = self.a_pool[:, 0], self.b_pool[:, 0]
        added: jax.Array = _reference(self.x, *first, self.page_ids)
        return added


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    drawn: jax.Array = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation)
    return drawn


@jax.jit
def _reference(x: jax.Array, a: jax.Array, b: jax.Array, page_ids: jax.Array) -> jax.Array:
    """a, b: [P, 8, D] of one layer."""

    def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        wide = left.astype(jnp.float32), right.astype(jnp.float32)
        return jnp.einsum(equation, *wide, precision=lax.Precision.HIGHEST)

    num_adapters = page_ids.shape[2]
    groups = x.reshape(num_adapters, -1, D)
    added = []
    for a_ids, b_ids in page_ids:
        inner = product("gtd,grd->gtr", groups, a[a_ids].reshape(num_adapters, RANK, D))
        outer = product("gtr,grn->gtn", inner, b[b_ids].reshape(num_adapters, RANK, D))
        added.append(outer.reshape(x.shape[0], D))
    return jnp.concatenate(added, axis=1)


def _ours(
    bank: _Bank, name: str, key: TuningKey, how: Tuning, *, early: bool = False
) -> Contestant:
    work, rows = bank.work, key.block_rows
    interpret = jax.default_backend() == "cpu"  # to try the benchmark, not the kernels
    host = tables(work.shape(rows), work.case)
    scale = np.ones((*host.num_pages.shape, work.num_layers), np.float32)
    blocks = RowBlocks(jnp.asarray(host.first), jnp.asarray(host.count))
    arrays = bank.a_pool, bank.b_pool, jnp.asarray(host.tables), jnp.asarray(host.num_pages)

    def lora(y: jax.Array, x: jax.Array, operands: Any, layer: int) -> jax.Array:
        (a_pool, b_pool, tables, num_pages), scale, blocks = operands
        n = work.num_outputs
        site = SitePages(a_pool, (b_pool,) * n, tables, num_pages, scale, tuple(range(n)))
        return pallas_triton.grouped_lora(
            y, x, site, blocks, layer,
            block_rows=rows, early=early, interpret=interpret, tuning=how,
        )  # fmt: skip

    return _contestant(
        name, bank, lora, (arrays, jnp.asarray(SMALL * scale), blocks), work.num_layers,
        (arrays, jnp.asarray(scale), blocks),
    )  # fmt: skip


def _xla(bank: _Bank) -> Contestant:
    """Blocks of equally many rows, an adapter each."""
    work = bank.work
    ids = jnp.asarray(bank.page_ids)
    ones = jnp.ones((work.num_adapters,), jnp.float32)

    def lora(y: jax.Array, x: jax.Array, operands: Any, layer: int) -> jax.Array:
        a_pool, b_pool, ids, scale = operands
        num_pages = jnp.int32(ids.shape[-1])
        parts = jnp.split(y, work.num_outputs, axis=1)
        pages = (ProjectionPages(a_pool, b_pool, a, b, num_pages, scale) for a, b in ids)
        added = [xla.grouped_lora(part, x, p, layer) for part, p in zip(parts, pages, strict=True)]
        return jnp.concatenate(added, axis=1)

    pools = bank.a_pool, bank.b_pool, ids
    return _contestant(
        "xla", bank, lora, (*pools, SMALL * ones), min(work.num_layers, NUM_LAYERS), (*pools, ones)
    )


def _ragged(bank: _Bank) -> Contestant:
    """``lax.ragged_dot`` twice an output, on whole matrices."""
    work = bank.work
    num_layers = min(work.num_layers, NUM_LAYERS)
    layers = [_whole_matrices(bank, layer) for layer in range(num_layers)]
    sizes = jnp.full((work.num_adapters,), work.num_tokens // work.num_adapters, jnp.int32)

    def lora(y: jax.Array, x: jax.Array, operands: Any, layer: int) -> jax.Array:
        layers, sizes, scale = operands
        added = []
        for a, b in layers[layer]:
            inner = lax.ragged_dot(x, a, sizes) * scale
            added.append(lax.ragged_dot(inner.astype(x.dtype), b, sizes))
        return y + jnp.concatenate(added, axis=1)

    return _contestant(
        "ragged_dot", bank, lora, (layers, sizes, jnp.bfloat16(SMALL)), num_layers,
        (layers[:1], sizes, jnp.bfloat16(1.0)),
    )  # fmt: skip


def _whole_matrices(bank: _Bank, layer: int) -> list[tuple[jax.Array, jax.Array]]:
    """A: [adapters, D, RANK], B: [adapters, RANK, D] of every output."""
    groups = bank.work.num_adapters, RANK, D
    return [
        (
            bank.a_pool[a_ids, layer].reshape(groups).swapaxes(1, 2),
            bank.b_pool[b_ids, layer].reshape(groups),
        )
        for a_ids, b_ids in bank.page_ids
    ]


def _empty(bank: _Bank) -> Contestant:
    """What a chain of wider sites has beside the sites: x cut out of y."""
    barrier: Callable[[Any], Any] = lax.optimization_barrier

    def chain(y: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        for _ in range(NUM_LAYERS):
            y, x = barrier((y, x))
            x = y[:, :D] + x[:1]
        return x

    return Contestant(f"{EMPTY} chain", NUM_LAYERS, chain, (bank.y, bank.x, ()))


def _contestant(
    name: str,
    bank: _Bank,
    lora: Callable[[jax.Array, jax.Array, Any, int], jax.Array],
    operands: Any,
    num_layers: int,
    operands_once: Any,
) -> Contestant:
    """``lora``: (y, x, operands, layer) -> y + what the layer adds."""
    square = bank.work.num_outputs == 1

    def chain(y: jax.Array, x: jax.Array, operands: Any) -> tuple[jax.Array, ...]:
        for layer in range(num_layers):
            y = lora(y, x, operands, layer)
            y, x = (x, y) if square else (y, y[:, :D])
        return (y, x) if square else (y,)

    @jax.jit
    def first(y: jax.Array, x: jax.Array, operands: Any) -> jax.Array:
        return lora(y, x, operands, 0)

    def once() -> jax.Array:
        added: jax.Array = first(jnp.zeros_like(bank.y), bank.x, operands_once)
        return added

    donate = (0, 1) if square else (0,)
    return Contestant(name, num_layers, chain, (bank.y, bank.x, operands), donate, once)
