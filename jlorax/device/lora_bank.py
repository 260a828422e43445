"""The LoRA bank on the device: pools of rank pages, the tables that name them, and its writers.

An adapter arrives as one contiguous buffer and one small vector that says where its pages go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from jlorax.device.executables import ExecutableStore
from jlorax.device.step import unpack
from jlorax.errors import ConfigError
from jlorax.layout import (
    RANK_PAGE,
    BankLayout,
    HostBuffer,
    HostMemory,
    PlainMemory,
    PoolKey,
    Scratch,
    SlotWrite,
    WriteLayout,
    pages_field,
)
from jlorax.models.lora import Bank
from pallas_kernels.grouped_lora.api import Implementation


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


def host_memory() -> HostMemory:
    """Where adapters wait for the device of this process."""
    device = jax.devices()[0]
    return PlainMemory() if device.platform == "cpu" else LockedMemory(device)


_RESERVED_AT_ONCE = 1 << 28
_KEPT_SHARE = 0.75  # of page-locked memory; see kept_bytes


class LockedMemory:
    """Page-locked, so that the device copies from it without the host's help."""

    def __init__(self, device: jax.Device) -> None:
        self._locked = SingleDeviceSharding(device, memory_kind="pinned_host")
        self._scratch = Scratch()

    def reserve(self, num_bytes: int) -> None:
        """Has so much page-locked now: the pool grows by doubling, and while it locks gigabytes the
        driver launches nothing. ConfigError when the machine has not got it."""
        part = np.zeros(min(num_bytes, _RESERVED_AT_ONCE), np.uint8)
        try:
            held = [self.copy(part) for _ in range(num_bytes // max(1, len(part)))]
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"{num_bytes} bytes cannot be page-locked: {error}") from None
        del held  # to the pool, which keeps them

    def kept_bytes(self, num_bytes: int) -> int:
        """With gaps between buffers, too, the pool must never have to grow under load."""
        return int(_KEPT_SHARE * num_bytes)

    def blank(self, num_bytes: int) -> np.ndarray:
        room = self._scratch.room(num_bytes)
        room[:] = 0
        return room

    def keep(self, buffer: np.ndarray) -> HostBuffer:
        return self.copy(buffer)

    def copy(self, buffer: np.ndarray) -> HostBuffer:
        copy = jax.device_put(buffer, self._locked, may_alias=False)
        return copy.block_until_ready()


class BankWriter(Protocol):
    """Puts adapters into a bank, whose arrays are donated. Nothing is compiled by a write."""

    def write(self, bank: Bank, write: SlotWrite) -> Bank:
        """The bank with the adapter in it; the old bank must not be used again."""

    def warm_up(self, bank: Bank) -> Bank:
        """The bank as it is, when a first write takes no longer than the next."""


def make_writer(
    bank: Bank, layout: BankLayout, store: ExecutableStore, implementation: Implementation
) -> BankWriter:
    """``implementation``: who computes the steps; with Pallas the CPU stands in for a GPU."""
    if jax.default_backend() == "cpu" and implementation == "xla":
        return PageWriter(bank, layout)
    return BufferWriter(bank, layout, store)


class BufferWriter:
    """A transfer and a launch for an adapter: an executable, one for each size that buffers come
    in, copies the pages to their places in all pools and writes the slot's rows."""

    def __init__(self, bank: Bank, layout: BankLayout, store: ExecutableStore) -> None:
        self._layout = layout
        self._base_slot = len(bank.tables) - 1
        self._memory = SingleDeviceSharding(jax.devices()[0])
        names = {f"insert {size}": size for size in layout.buffer_sizes}
        ready = store.get_all((name, _lowering(bank, layout, size)) for name, size in names.items())
        self._inserts = {size: ready[name] for name, size in names.items()}

    def write(self, bank: Bank, write: SlotWrite) -> Bank:
        buffer = jax.device_put(write.buffer, self._memory)
        updated: Bank = self._inserts[len(write.buffer)](bank, buffer, write.packed)
        return updated

    def warm_up(self, bank: Bank) -> Bank:
        """Gives the base's slot the nothing that it has, once in every size."""
        layout, largest = self._layout, self._layout.buffer_sizes[-1]
        buffer = np.zeros((largest, layout.unit), jnp.dtype(layout.dtype))
        for size in layout.buffer_sizes:
            packed, _ = WriteLayout(layout, size).blank(self._base_slot)
            bank = self.write(bank, SlotWrite(self._base_slot, buffer[:size], packed))
        return bank


def _lowering(bank: Bank, layout: BankLayout, num_units: int) -> Callable[[], Any]:
    insert = make_insert(layout, num_units)
    buffer = jax.ShapeDtypeStruct((num_units, layout.unit), layout.dtype)
    packed = jax.ShapeDtypeStruct((WriteLayout(layout, num_units).size,), jnp.int32)
    return lambda: insert.lower(bank, buffer, packed)


def make_insert(layout: BankLayout, num_units: int) -> Any:
    """Jitted: (bank, buffer dtype[num_units, unit], packed i32 as WriteLayout lays it out) -> bank

    The bank is donated: nothing but the named pages and the slot's rows is touched.
    """
    write_layout = WriteLayout(layout, num_units)

    @partial(jax.jit, donate_argnums=0)
    def insert(bank: Bank, buffer: jax.Array, packed: jax.Array) -> Bank:
        write = unpack(packed, write_layout)
        pools = {
            key: _copy_pages(bank.pools[key], buffer, write["first"][i], write[pages_field(key)])
            for i, key in enumerate(layout.pools)
        }
        rows = (write["table"], write["num_pages"], write["scaling"])
        tables = (
            lax.dynamic_update_index_in_dim(table, row, write["slot"], 0)
            for table, row in zip(bank[1:], rows, strict=True)
        )
        return Bank(pools, *tables)

    return insert


def _copy_pages(
    pool: jax.Array, buffer: jax.Array, first: jax.Array, pages: jax.Array
) -> jax.Array:
    """pool [P, L, 8, width] with pages[i] taken from the buffer, the i-th from unit ``first`` on.

    One kernel, which drops ids beyond the pool. A loop over as many pages as there are would have a
    GPU wait for the host at every turn.
    """
    units = math.prod(pool.shape[1:]) // buffer.shape[1]
    starts = first + jnp.arange(len(pages), dtype=jnp.int32) * units
    read = jax.vmap(lambda start: lax.dynamic_slice_in_dim(buffer, start, units))
    data = read(starts).reshape(len(pages), *pool.shape[1:])
    return pool.at[pages].set(data, mode="drop", unique_indices=True)


class PageWriter:
    """A launch a page, from where the adapter waits: for a CPU, where nothing has to be transferred
    and one small executable a pool is compiled ten times faster."""

    def __init__(self, bank: Bank, layout: BankLayout) -> None:
        self._layout = layout
        self._insert_page = {key: _compiled_insert(pool) for key, pool in bank.pools.items()}
        self._insert_row = [_compiled_insert(table) for table in bank[1:]]

    def write(self, bank: Bank, write: SlotWrite) -> Bank:
        units = np.asarray(write.buffer)
        fields = WriteLayout(self._layout, len(units)).views(write.packed)
        pools = dict(bank.pools)
        for i, key in enumerate(self._layout.pools):
            size, first = self._layout.page_units(key), fields["first"][i]
            for j, page in enumerate(fields[pages_field(key)][: fields["count"][i]]):
                content = units[first + j * size :][:size].reshape(pools[key].shape[1:])
                pools[key] = self._insert_page[key](pools[key], page, content)
        tables = (
            insert(table, fields["slot"], fields[name])
            for insert, table, name in zip(
                self._insert_row, bank[1:], ("table", "num_pages", "scaling"), strict=True
            )
        )
        return Bank(pools, *tables)

    def warm_up(self, bank: Bank) -> Bank:
        return bank


def _compiled_insert(array: jax.Array) -> Any:
    row = jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
    return _insert.lower(array, np.int32(0), row).compile()


@partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, row, index, 0)
