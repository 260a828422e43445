"""The LoRA bank on the device: pools of rank pages, and the tables that name them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlorax.layout import RANK_PAGE, BankLayout, PoolKey, SlotWrite
from jlorax.models.lora import Bank


def empty_bank(layout: BankLayout, num_slots: int, pool_pages: Mapping[PoolKey, int]) -> Bank:
    """A bank of zeros: page 0 of every pool is the zero page, slot ``num_slots`` is the base's."""
    projections = len(layout.projections)
    return Bank(
        pools={
            key: jnp.zeros((pool_pages[key], key.num_layers, RANK_PAGE, key.width), layout.dtype)
            for key in layout.pools
        },
        tables=jnp.zeros((num_slots + 1, projections, 2, layout.table_width), jnp.int32),
        num_pages=jnp.zeros((num_slots + 1, projections), jnp.int32),
        scaling=jnp.zeros((num_slots + 1, projections, layout.max_layers), jnp.float32),
    )


class BankWriter:
    """Puts adapters into a bank. Compiled once per pool; the bank's arrays are donated."""

    def __init__(self, bank: Bank) -> None:
        self._insert_page = {
            key: _insert.lower(pool, np.int32(0), _zeros_like_page(pool)).compile()
            for key, pool in bank.pools.items()
        }
        self._insert_row = [
            _insert.lower(table, np.int32(0), np.zeros(table.shape[1:], table.dtype)).compile()
            for table in bank[1:]
        ]

    def write(self, bank: Bank, write: SlotWrite) -> Bank:
        """The bank with ``write.slot`` holding the adapter; the old bank must not be used again."""
        pools = dict(bank.pools)
        for key, (pages, data) in write.pages.items():
            for page, content in zip(pages, data, strict=True):
                pools[key] = self._insert_page[key](pools[key], np.int32(page), content)
        rows = (write.table, write.num_pages, write.scaling)
        tables = (
            insert(table, np.int32(write.slot), row)
            for insert, table, row in zip(self._insert_row, bank[1:], rows, strict=True)
        )
        return Bank(pools, *tables)


@partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, row, index, 0)


def _zeros_like_page(pool: jax.Array) -> np.ndarray:
    return np.zeros(pool.shape[1:], pool.dtype)
