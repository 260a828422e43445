"""A packed adapter in a file: what was checked and transposed once is only read from then on.

    magic 8 | header length u32, crc32 u32 | JSON header, padded to 64 | scaling | pages
The JSON holds one crc32 per MiB of what follows, so that a damaged or half-written file is noticed
at a read. The buffer's padding is left out.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import BufferedIOBase, RawIOBase
from typing import Any

import numpy as np

from jlorax.adapters.pack import (
    Blank,
    PackedAdapter,
    assemble,
    blank_buffer,
    page_bytes,
)
from jlorax.layout import ALIGN_BYTES, RANK_PAGE, BankLayout, aligned_zeros

MAGIC = b"JLORAX\x00\x02"  # the last byte is the format's version
CHUNK_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
_PREFIX = struct.Struct("<8sII")


BinaryFile = RawIOBase | BufferedIOBase


class PackCorrupt(Exception):
    """A packed file is damaged, or was packed for another layout. Load from the source again."""


@lru_cache(maxsize=8)
def layout_fingerprint(layout: BankLayout) -> str:
    """Equal for two layouts exactly when a file packed for one fits the other."""
    projections = [[p.name, p.path, p.d_in, p.d_out, p.num_layers] for p in layout.projections]
    parts = [MAGIC.hex(), RANK_PAGE, layout.dtype, layout.max_rank, projections]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_of(packed: PackedAdapter, layout: BankLayout) -> str:
    """sha256, in hex, of the content: equal adapters packed for an equal layout."""
    content = hashlib.sha256(layout_fingerprint(layout).encode())
    content.update(json.dumps(dict(packed.ranks), sort_keys=True).encode())
    for part in _parts(packed, layout):
        content.update(part)
    return content.hexdigest()


def write_packed(file: BinaryFile, packed: PackedAdapter, layout: BankLayout) -> int:
    """How many bytes were written. ``packed.buffer`` must be a numpy array."""
    parts = _parts(packed, layout)
    header = {
        "layout": layout_fingerprint(layout),
        "ranks": dict(packed.ranks),
        "scaling": list(packed.scaling.shape),
        "crc32": [[zlib.crc32(chunk) for chunk in _chunks(part)] for part in parts],
    }
    text = json.dumps(header).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % ALIGN_BYTES)
    pieces = (_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)), text, *parts)
    for piece in pieces:
        _write_all(file, memoryview(piece))
    return sum(map(len, pieces))


def read_packed(
    file: BinaryFile, layout: BankLayout, blank: Blank = aligned_zeros
) -> PackedAdapter:
    """The adapter, every checksum verified. PackCorrupt when anything is off.

    Read, not mapped: a file that is cut short under a mapping would kill the process.
    """
    header = _read_header(file)
    if header["layout"] != layout_fingerprint(layout):
        raise PackCorrupt("packed for another base model, dtype or rank limit")
    ranks = {str(name): int(rank) for name, rank in header["ranks"].items()}
    scaling = np.empty(header["scaling"], np.float32)
    need = layout.pages_needed(ranks)
    buffer = blank_buffer(need, layout, blank)
    pages = buffer.reshape(-1).view(np.uint8)[: page_bytes(need, layout)]
    for part, checksums in zip((_bytes(scaling), _bytes(pages)), header["crc32"], strict=True):
        _read_all(file, part)
        _check(part, checksums)
    if file.read(1):
        raise PackCorrupt("its size does not follow from its ranks")
    return assemble(ranks, scaling, buffer, layout)


def _parts(packed: PackedAdapter, layout: BankLayout) -> tuple[memoryview, memoryview]:
    """(scaling, pages), without padding."""
    num_bytes = page_bytes(packed.need(layout), layout)
    pages = np.asarray(packed.buffer).reshape(-1).view(np.uint8)[:num_bytes]
    return _bytes(packed.scaling), _bytes(pages)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _chunks(part: memoryview) -> Iterator[memoryview]:
    return (part[i : i + CHUNK_BYTES] for i in range(0, len(part), CHUNK_BYTES))


def _check(part: memoryview, checksums: list[int]) -> None:
    for number, (chunk, expected) in enumerate(zip(_chunks(part), checksums, strict=True)):
        if zlib.crc32(chunk) != expected:
            raise PackCorrupt(f"MiB {number} is damaged")


def _read_header(file: BinaryFile) -> Mapping[str, Any]:
    prefix = bytearray(_PREFIX.size)
    _read_all(file, memoryview(prefix))
    magic, length, crc32 = _PREFIX.unpack(prefix)
    if magic != MAGIC or length > MAX_HEADER_BYTES:
        raise PackCorrupt("not a packed adapter of this version")
    text = bytearray(length)
    _read_all(file, memoryview(text))
    if zlib.crc32(text) != crc32:
        raise PackCorrupt("its header is damaged")
    header: Mapping[str, Any] = json.loads(text)  # as written: its checksum holds
    return header


def _read_all(file: BinaryFile, room: memoryview) -> None:
    filled = 0
    while filled < len(room):
        more = file.readinto(room[filled:])
        if not more:
            raise PackCorrupt("it is cut short")
        filled += more


def _write_all(file: BinaryFile, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) or 0 :]
