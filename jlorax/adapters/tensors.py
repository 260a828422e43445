"""Views of the tensors in a safetensors file's bytes, after a strict check of its header.

Layout: u64 header length, JSON {name: {dtype, shape, data_offsets}}, data without holes.
The library's own reader takes a path, and would open the file a second time after we looked at it;
its numpy side also has no bfloat16. The format is small enough to read from the bytes at hand.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jlorax.errors import AdapterInvalid

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 50_000

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Slice:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensors(data: bytes | memoryview, adapter_id: str, file: str) -> dict[str, np.ndarray]:
    """Name -> read-only view into ``data``. Anything odd in the header: AdapterInvalid."""
    try:
        header_end, header = _read_header(data)
        slices = [_slice(name, entry) for name, entry in header.items()]
        _check_packed(slices, len(data) - header_end)
    except _Malformed as error:
        raise AdapterInvalid(adapter_id, file, str(error)) from error
    return {
        s.name: np.frombuffer(
            data, s.dtype, count=math.prod(s.shape), offset=header_end + s.start
        ).reshape(s.shape)
        for s in slices
    }


class _Malformed(ValueError):
    """What is wrong, in words for the user."""


def _read_header(data: bytes | memoryview) -> tuple[int, dict[str, Any]]:
    if len(data) < 8:
        raise _Malformed(f"the file has {len(data)} bytes; a safetensors file has at least 8")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _Malformed(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if 8 + length > len(data):
        raise _Malformed(f"the header claims {length} bytes, but the file has only {len(data)}")
    try:
        text = bytes(data[8 : 8 + length]).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except _Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _Malformed("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _Malformed("__metadata__ is not an object")
    if len(header) > MAX_TENSORS:
        raise _Malformed(f"the file has {len(header)} tensors; at most {MAX_TENSORS} are read")
    return 8 + length, header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _Malformed(f"the key {name!r} appears twice")
    return result


def _slice(name: str, entry: Any) -> _Slice:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"{name!r}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Malformed(f"{name!r}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _Malformed(f"{name!r}: shape {shape!r} or data_offsets {offsets!r} is not valid")
    if 0 in shape:
        raise _Malformed(f"{name!r}: shape {shape} has an empty dimension")
    start, end = offsets
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != size:
        raise _Malformed(
            f"{name!r}: shape {shape} of {dtype} takes {size} bytes, not {end - start}"
        )
    return _Slice(name, DTYPES[dtype], tuple(shape), start, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_packed(slices: list[_Slice], data_bytes: int) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing behind the last."""
    position = 0
    for s in sorted(slices, key=lambda s: s.start):
        if s.start != position:
            fault = "overlaps another tensor" if s.start < position else "has a hole before it"
            raise _Malformed(f"{s.name!r} {fault}: it starts at {s.start}, expected {position}")
        position = s.end
    if position != data_bytes:
        fault = "trailing bytes" if position < data_bytes else "truncated file"
        raise _Malformed(f"{fault}: the tensors take {position} bytes, the file has {data_bytes}")
