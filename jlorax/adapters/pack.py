"""Packs an adapter into the bank's pages, in one buffer; ``packed_file`` puts it on disk.

y += scaling * (x @ A.T) @ B.T becomes, with pages of 8 rank columns,
    h[r] = scaling[projection, layer] * (x . page_a[r // 8, layer, r % 8])
    y   += sum over r of h[r] * page_b[r // 8, layer, r % 8]
    page_a: dtype[n, L, 8, d_in]   page_b: dtype[n, L, 8, d_out]
The scaling stays float32 beside the pages: folded into a bfloat16 B it would be rounded.
The buffer is what travels to the device: pool after pool, then padding to a size that has an
executable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jlorax.adapters.peft import Adapter, LayerWeights, all_finite
from jlorax.errors import AdapterInvalid
from jlorax.layout import (
    RANK_PAGE,
    BankLayout,
    HostBuffer,
    PoolKey,
    aligned_zeros,
    rank_pages,
)

Blank = Callable[[int], np.ndarray]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Entry:
    """Where one projection's pages begin in its pools' arrays; num_pages each for A and B."""

    num_pages: int
    a_start: int
    b_start: int


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in page layout.

    buffer: dtype[units, unit], the pools' pages one after the other, then padding
    scaling: f32[num_projections, max_layers], 0 where there are no weights
    """

    buffer: HostBuffer
    entries: Mapping[str, Entry]
    scaling: np.ndarray
    ranks: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        return self.buffer.nbytes + self.scaling.nbytes

    def need(self, layout: BankLayout) -> dict[PoolKey, int]:
        """Pages that it takes in each pool."""
        return layout.pages_needed(self.ranks)


def pack(adapter: Adapter, layout: BankLayout, blank: Blank = aligned_zeros) -> PackedAdapter:
    """``blank``: gives so many bytes of zeros, u8[num_bytes], aligned as the device likes it."""
    ranks = adapter.ranks
    need = layout.pages_needed(ranks)
    entries = _entries(ranks, layout)
    buffer = blank_buffer(need, layout, blank)
    pages = page_views(buffer, need, layout)
    scaling = np.zeros((len(layout.projections), layout.max_layers), np.float32)
    with np.errstate(over="ignore"):  # a float32 beyond bfloat16 is found below
        for name, layers in adapter.weights.items():
            _fill(pages, entries[name], layout, name, layers)
            for layer, weights in layers.items():
                scaling[layout.index[name], layer] = weights.scaling
    _check_finite(adapter, buffer, layout)
    return PackedAdapter(buffer, entries, scaling, ranks)


def assemble(
    ranks: Mapping[str, int], scaling: np.ndarray, buffer: HostBuffer, layout: BankLayout
) -> PackedAdapter:
    """Of a filled ``blank_buffer`` of these ranks."""
    return PackedAdapter(buffer, _entries(ranks, layout), scaling, ranks)


def _entries(ranks: Mapping[str, int], layout: BankLayout) -> dict[str, Entry]:
    """Pages are dealt in the layout's order of projections, A before B."""
    following: dict[PoolKey, int] = {}
    entries: dict[str, Entry] = {}
    for projection in layout.projections:
        if projection.name not in ranks:
            continue
        num_pages = rank_pages(ranks[projection.name])
        starts = []
        for pool in (layout.pool_a(projection), layout.pool_b(projection)):
            starts.append(following.get(pool, 0))
            following[pool] = starts[-1] + num_pages
        entries[projection.name] = Entry(num_pages, *starts)
    return entries


def page_views(
    buffer: HostBuffer, need: Mapping[PoolKey, int], layout: BankLayout
) -> dict[PoolKey, np.ndarray]:
    """Each pool's pages in the buffer, dtype[n, L, 8, width]."""
    units = np.asarray(buffer)
    views, start = {}, 0
    for pool in sorted(need):
        end = start + need[pool] * layout.page_units(pool)
        views[pool] = units[start:end].reshape(need[pool], pool.num_layers, RANK_PAGE, pool.width)
        start = end
    return views


def blank_buffer(need: Mapping[PoolKey, int], layout: BankLayout, blank: Blank) -> np.ndarray:
    """Zeros, as large as these pages travel in."""
    num_bytes = layout.buffer_size(need) * layout.unit * DTYPES[layout.dtype].itemsize
    return _as_buffer(blank(num_bytes), layout)


def buffer_of(memory: np.ndarray, ranks: Mapping[str, int], layout: BankLayout) -> np.ndarray:
    """The buffer of an adapter of these ranks that was packed into ``memory``, u8[num_bytes]."""
    units = layout.buffer_size(layout.pages_needed(ranks))
    return _as_buffer(memory[: units * layout.unit * DTYPES[layout.dtype].itemsize], layout)


def _as_buffer(memory: np.ndarray, layout: BankLayout) -> np.ndarray:
    return memory.view(DTYPES[layout.dtype]).reshape(-1, layout.unit)


def page_bytes(need: Mapping[PoolKey, int], layout: BankLayout) -> int:
    """Without padding."""
    return sum(num_pages * layout.page_bytes(pool) for pool, num_pages in need.items())


def _fill(
    pages: Mapping[PoolKey, np.ndarray],
    entry: Entry,
    layout: BankLayout,
    name: str,
    layers: Mapping[int, LayerWeights],
) -> None:
    projection = layout.projections[layout.index[name]]
    pool_a, pool_b = pages[layout.pool_a(projection)], pages[layout.pool_b(projection)]
    own_a = pool_a[entry.a_start : entry.a_start + entry.num_pages]
    own_b = pool_b[entry.b_start : entry.b_start + entry.num_pages]
    for layer, weights in layers.items():
        _fill_layer(own_a[:, layer], weights.a)
        _fill_layer(own_b[:, layer], weights.b.T)


def _fill_layer(pages: np.ndarray, columns: np.ndarray) -> None:
    """pages: dtype[n, 8, width] <- columns: [r, width], the last page only as far as r goes."""
    rank, width = columns.shape
    whole = rank // RANK_PAGE
    pages[:whole] = columns[: whole * RANK_PAGE].reshape(whole, RANK_PAGE, width)
    if rank % RANK_PAGE:
        pages[whole, : rank % RANK_PAGE] = columns[whole * RANK_PAGE :]


def _check_finite(adapter: Adapter, buffer: np.ndarray, layout: BankLayout) -> None:
    narrowed = layout.dtype == "bfloat16" and any(
        weights.a.dtype != DTYPES["bfloat16"] or weights.b.dtype != DTYPES["bfloat16"]
        for layers in adapter.weights.values()
        for weights in layers.values()
    )
    if narrowed and not all_finite(buffer):
        raise AdapterInvalid(
            adapter.adapter_id, "weights", "some values are too large for bfloat16"
        )
