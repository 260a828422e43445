"""Packs an adapter into the bank's pages, in one buffer, and that buffer into a file.

y += scaling * (x @ A.T) @ B.T becomes, with pages of 8 rank columns,
    h[r] = scaling[projection, layer] * (x . page_a[r // 8, layer, r % 8])
    y   += sum over r of h[r] * page_b[r // 8, layer, r % 8]
    page_a: dtype[n, L, 8, d_in]   page_b: dtype[n, L, 8, d_out]
The scaling stays float32 beside the pages: folded into a bfloat16 B it would be rounded.
The buffer is what travels to the device: pool after pool, then padding to a size that has an
executable; the file leaves the padding out.

    file: magic 8 | header length u32, crc32 u32 | JSON header, padded to 64 | scaling | pages
The JSON holds one crc32 per MiB of what follows, so that a damaged file is noticed at a read.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jlorax.adapters.peft import Adapter, LayerWeights, all_finite
from jlorax.errors import AdapterInvalid
from jlorax.layout import (
    ALIGN_BYTES,
    RANK_PAGE,
    BankLayout,
    HostBuffer,
    PoolKey,
    aligned_zeros,
    rank_pages,
)

MAGIC = b"JLORAX\x00\x01"  # the last byte is the format's version
CHUNK_BYTES = 2**20
_PREFIX = struct.Struct("<8sII")

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class PackCorrupt(Exception):
    """A packed file is damaged, or was packed for another layout. Load from the source again."""


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


def pack(adapter: Adapter, layout: BankLayout) -> PackedAdapter:
    ranks = adapter.ranks
    need = layout.pages_needed(ranks)
    entries = _entries(ranks, layout)
    buffer = _empty_buffer(need, layout)
    pages = page_views(buffer, need, layout)
    scaling = np.zeros((len(layout.projections), layout.max_layers), np.float32)
    with np.errstate(over="ignore"):  # a float32 beyond bfloat16 is found below
        for name, layers in adapter.weights.items():
            _fill(pages, entries[name], layout, name, layers)
            for layer, weights in layers.items():
                scaling[layout.index[name], layer] = weights.scaling
    _check_finite(adapter, buffer, layout)
    buffer.flags.writeable = False
    return PackedAdapter(buffer, entries, scaling, ranks)


def layout_fingerprint(layout: BankLayout) -> str:
    """Equal for two layouts exactly when a file packed for one fits the other."""
    projections = [[p.name, p.path, p.d_in, p.d_out, p.num_layers] for p in layout.projections]
    parts = [MAGIC.hex(), RANK_PAGE, layout.dtype, layout.max_rank, projections]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def to_bytes(packed: PackedAdapter, layout: BankLayout) -> bytes:
    num_bytes = _page_bytes(packed.need(layout), layout)
    pages = np.asarray(packed.buffer).reshape(-1).view(np.uint8)[:num_bytes]
    body = packed.scaling.tobytes() + pages.tobytes()
    header = {
        "layout": layout_fingerprint(layout),
        "ranks": dict(packed.ranks),
        "scaling": list(packed.scaling.shape),
        "body_bytes": len(body),
        "crc32": [zlib.crc32(chunk) for chunk in _chunks(memoryview(body))],
    }
    text = json.dumps(header).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % ALIGN_BYTES)
    return _PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text + body


def from_bytes(data: bytes | memoryview, layout: BankLayout) -> PackedAdapter:
    """The adapter, every checksum verified. PackCorrupt when anything is off."""
    header, body = _open(memoryview(data))
    if header["layout"] != layout_fingerprint(layout):
        raise PackCorrupt("packed for another base model, dtype or rank limit")
    ranks = {str(name): int(rank) for name, rank in header["ranks"].items()}
    need = layout.pages_needed(ranks)
    shape = tuple(header["scaling"])
    scaling_bytes = 4 * shape[0] * shape[1]
    if len(body) != scaling_bytes + _page_bytes(need, layout):
        raise PackCorrupt("its size does not follow from its ranks")
    scaling = np.frombuffer(body[:scaling_bytes], np.float32).reshape(shape)
    pages = np.frombuffer(body[scaling_bytes:], np.uint8)
    buffer = _empty_buffer(need, layout)
    buffer.reshape(-1).view(np.uint8)[: len(pages)] = pages
    buffer.flags.writeable = False
    return PackedAdapter(buffer, _entries(ranks, layout), scaling, ranks)


def is_intact(data: bytes | memoryview) -> bool:
    """Whether the checksums hold, for whatever layout it is."""
    try:
        _open(memoryview(data))
    except PackCorrupt:
        return False
    return True


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


def _empty_buffer(need: Mapping[PoolKey, int], layout: BankLayout) -> np.ndarray:
    dtype, num_units = DTYPES[layout.dtype], layout.buffer_size(need)
    zeros = aligned_zeros(num_units * layout.unit * dtype.itemsize)
    return zeros.view(dtype).reshape(num_units, layout.unit)


def _page_bytes(need: Mapping[PoolKey, int], layout: BankLayout) -> int:
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
    if layout.dtype == "bfloat16" and not all_finite(buffer):
        raise AdapterInvalid(
            adapter.adapter_id, "weights", "some values are too large for bfloat16"
        )


def _chunks(body: memoryview) -> Iterator[memoryview]:
    return (body[i : i + CHUNK_BYTES] for i in range(0, len(body), CHUNK_BYTES))


def _open(data: memoryview) -> tuple[dict[str, Any], memoryview]:
    """(header, body) with every checksum verified."""
    if len(data) < _PREFIX.size:
        raise PackCorrupt("too short")
    magic, length, crc32 = _PREFIX.unpack(data[: _PREFIX.size])
    if magic != MAGIC:
        raise PackCorrupt("not a packed adapter of this version")
    text = data[_PREFIX.size : _PREFIX.size + length]
    if len(text) != length or zlib.crc32(text) != crc32:
        raise PackCorrupt("its header is damaged")
    header = json.loads(bytes(text))  # as written: its checksum holds
    body = data[_PREFIX.size + length :]
    if len(body) != header["body_bytes"]:
        raise PackCorrupt(f"its body has {len(body)} bytes, not {header['body_bytes']}")
    for number, (chunk, expected) in enumerate(zip(_chunks(body), header["crc32"], strict=True)):
        if zlib.crc32(chunk) != expected:
            raise PackCorrupt(f"MiB {number} of its body is damaged")
    return header, body
