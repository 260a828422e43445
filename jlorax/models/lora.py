"""The one place where LoRA enters a model: the step's view of the bank, added to a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jlorax.layout import BankLayout, LoraReach, PoolKey
from pallas_kernels.grouped_lora.api import Implementation, RowBlocks, SitePages, grouped_lora


class Bank(NamedTuple):
    """All resident adapters. S slots and one more, the base's, which names only zero pages."""

    pools: dict[PoolKey, jax.Array]  # [P, L, 8, width] each
    tables: jax.Array  # i32[S + 1, projections, 2, W]: pages of A, of B
    num_pages: jax.Array  # i32[S + 1, projections]
    scaling: jax.Array  # f32[S + 1, projections, L]


class Lora(Protocol):
    """What a site's adapters add to its product: out of the bank, or weights in training."""

    def covers(self, names: tuple[str, ...]) -> bool:
        """Whether anything may be added to these projections."""

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        names: tuple[str, ...],
        layer: int,
        *,
        early: bool = False,
    ) -> jax.Array:
        """y: [T, sum of d_out] with what is added for the projections' input x: [T, d_in].
        ``early``: what reads y next is a kernel of ours."""

    def delta(self, x: jax.Array, names: tuple[str, ...], layer: int) -> jax.Array:
        """What is added, by itself: [T, sum of d_out] in x's dtype."""


class LoraBatch:
    """The bank, as the blocks of one step see it (trace time only)."""

    def __init__(
        self,
        bank: Bank,
        layout: BankLayout,
        slots: jax.Array,
        reach: LoraReach = LoraReach.ALL,
        blocks: RowBlocks | None = None,
        block_rows: int = 1,
        implementation: Implementation = "xla",
    ) -> None:
        """slots: i32[NB], one per block; S names the base model. ``blocks`` None: of equally many
        consecutive rows each. ``reach``: of the step."""
        self._reach = reach
        self._pools = bank.pools
        self._layout = layout
        self._blocks = blocks
        self._block_rows = block_rows
        self._implementation = implementation
        self._tables = bank.tables[slots]
        self._num_pages = bank.num_pages[slots]
        self._scaling = bank.scaling[slots]

    def covers(self, names: tuple[str, ...]) -> bool:
        """Whether any adapter of this step may have weights here."""
        return self._layout.reach(names) <= self._reach

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        names: tuple[str, ...],
        layer: int,
        *,
        early: bool = False,
    ) -> jax.Array:
        """y: [T, sum of d_out] with what the rows' adapters make of the named projections' input
        x: [T, d_in]. ``early``: what reads y next is a kernel of ours."""
        return grouped_lora(
            y,
            x,
            self._site(names),
            self._blocks,
            layer,
            block_rows=self._block_rows,
            early=early,
            implementation=self._implementation,
        )

    def delta(self, x: jax.Array, names: tuple[str, ...], layer: int) -> jax.Array:
        """What the adapters add, [T, sum of d_out] in x's dtype: needs no output of the base, so
        that it can be computed beside it."""
        width = sum(pool.shape[-1] for pool in self._site(names).b_pools)
        # Zeros that wait for x: plain ones XLA makes for all layers at once, before the first one;
        # at 64 rows of Llama-2-7B that is 90 MB of scratch.
        zero = jnp.minimum(jnp.abs(x[:, :1]), 0)
        return self.add(jnp.broadcast_to(zero, (x.shape[0], width)), x, names, layer)

    def _site(self, names: Sequence[str]) -> SitePages:
        rows = tuple(self._layout.index[name] for name in names)
        projections = [self._layout.projections[row] for row in rows]
        return SitePages(
            a_pool=self._pools[self._layout.pool_a(projections[0])],
            b_pools=tuple(self._pools[self._layout.pool_b(p)] for p in projections),
            tables=self._tables,
            num_pages=self._num_pages,
            scale=self._scaling,
            rows=rows,
        )
