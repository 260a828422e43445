"""The one place where LoRA enters a model: the step's view of the bank, added to a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlorax.layout import BankLayout, PoolKey
from pallas_kernels.grouped_lora.api import ProjectionPages, grouped_lora


class Bank(NamedTuple):
    """All resident adapters. S slots and one more, the base's, which names only zero pages."""

    pools: dict[PoolKey, jax.Array]  # [P, L, 8, width] each
    tables: jax.Array  # i32[S + 1, projections, 2, W]: pages of A, of B
    num_pages: jax.Array  # i32[S + 1, projections]
    scaling: jax.Array  # f32[S + 1, projections, L]


class LoraBatch:
    """The bank, as the blocks of one step see it (trace time only)."""

    def __init__(self, bank: Bank, layout: BankLayout, slots: jax.Array) -> None:
        """slots: i32[NB], one per block of consecutive rows; S names the base model."""
        self._pools = bank.pools
        self._layout = layout
        self._tables = bank.tables[slots]
        self._num_pages = jnp.max(bank.num_pages[slots], axis=0)
        self._scaling = bank.scaling[slots]

    def add(
        self, ys: Sequence[jax.Array], x: jax.Array, names: tuple[str, ...], layer: int
    ) -> tuple[jax.Array, ...]:
        """Each named projection's output y: [T, d_out] of x: [T, d_in], with its adapters."""
        return grouped_lora(ys, x, [self._pages(name, layer) for name in names], layer)

    def _pages(self, name: str, layer: int) -> ProjectionPages:
        i = self._layout.index[name]
        projection = self._layout.projections[i]
        return ProjectionPages(
            a_pool=self._pools[self._layout.pool_a(projection)],
            b_pool=self._pools[self._layout.pool_b(projection)],
            a_pages=self._tables[:, i, 0],
            b_pages=self._tables[:, i, 1],
            num_pages=self._num_pages[i],
            scale=self._scaling[:, i, layer],
        )
