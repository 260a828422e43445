"""Which tile reads a weight fastest: measured where it was measured, else by a rule.

A decode step waits for its weights, so a tile is good when 132 multiprocessors all load, about
40 KB each in flight at any time (3.1 TB/s x 0.8 us / 132 = 19 KB is the least), and when what comes
on top stays small: x is read once per column of tiles, f32 partials are written and read once per
split, both from L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Op = Literal["matmul", "matmul_swiglu", "split_matmul", "swiglu_split_matmul"]
XLA: Final = "xla"
H100: Final = "NVIDIA H100 80GB HBM3"

_MULTIPROCESSORS = 132
_ALMOST_ALL = 120  # programs: a few idle multiprocessors cost less than an uneven second turn
MIN_DOT_ROWS = 16  # the tensor cores' smallest tile
WARM_ROWS = 128  # of the next weight, read ahead by the kernel that sums: 3 to 6 MB
MAX_ROWS = 256  # above, a product is bound by arithmetic, and cuBLAS is good at that
MAX_WHOLE_ROWS = 128  # a wide product without splits: cuBLAS has the better tiles above
MAX_SWIGLU_ROWS = 64  # every column of tiles computes the activation again


@dataclass(frozen=True)
class Tile:
    """How one product is cut.

    A program owns ``block_t`` rows and ``block_n`` columns of one split of K and walks it in steps
    of ``block_k``. Up to 4 rows multiply and add on the CUDA cores, 16 and more on the tensor
    cores, whose smallest tile that is. ``num_stages`` steps are in flight (tensor cores only).
    """

    block_t: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


Choice = Tile | Literal["xla"]
# (device kind, op, T bucket, K, N) -> what was fastest. Swept on 2026-11-25, jax 0.11.2.
MEASURED: Mapping[tuple[str, Op, int, int, int], Choice] = {
    (H100, "split_matmul", 1, 4096, 4096): Tile(16, 64, 128, 2, 4, 4),  # 14.3 us
    (H100, "split_matmul", 8, 4096, 4096): Tile(16, 32, 256, 1, 4, 4),  # 14.9 us
    (H100, "split_matmul", 16, 4096, 4096): Tile(16, 64, 128, 2, 4, 4),
    (H100, "split_matmul", 32, 4096, 4096): Tile(32, 64, 128, 2, 4, 4),  # 16.2 us
    (H100, "split_matmul", 64, 4096, 4096): Tile(64, 64, 128, 2, 4, 4),  # 16.1 us
    (H100, "split_matmul", 128, 4096, 4096): Tile(128, 64, 64, 4, 4, 4),  # 21.2 us
    (H100, "split_matmul", 256, 4096, 4096): Tile(128, 128, 64, 2, 4, 4),  # 27.9 us
    (H100, "split_matmul", 1, 11008, 4096): Tile(16, 128, 64, 4, 4, 5),  # 34.0 us
    (H100, "split_matmul", 8, 11008, 4096): Tile(16, 64, 128, 2, 4, 4),  # 34.8 us
    (H100, "split_matmul", 16, 11008, 4096): Tile(16, 64, 128, 2, 4, 4),
    (H100, "split_matmul", 32, 11008, 4096): Tile(32, 128, 64, 4, 4, 4),  # 37.5 us
    (H100, "split_matmul", 64, 11008, 4096): Tile(64, 64, 128, 2, 4, 4),  # 39.5 us
    (H100, "split_matmul", 128, 11008, 4096): Tile(128, 64, 64, 4, 4, 4),  # 47.3 us
    (H100, "split_matmul", 256, 11008, 4096): Tile(128, 128, 64, 2, 4, 4),  # 62.0 us
    (H100, "matmul_swiglu", 1, 4096, 11008): Tile(16, 64, 128, 1, 4, 4),  # 66.2 us
    (H100, "matmul_swiglu", 8, 4096, 11008): Tile(16, 64, 128, 1, 4, 4),  # 67.8 us
    (H100, "matmul_swiglu", 32, 4096, 11008): Tile(32, 64, 64, 1, 4, 6),  # 70.7 us
    (H100, "matmul_swiglu", 64, 4096, 11008): Tile(64, 64, 64, 1, 4, 4),  # 67.8 us
    (H100, "matmul", 1, 4096, 12288): Tile(16, 64, 64, 1, 4, 6),  # 36.7 us
    (H100, "matmul", 8, 4096, 12288): Tile(16, 64, 64, 1, 4, 6),  # 36.9 us
    (H100, "matmul", 64, 4096, 12288): Tile(64, 64, 64, 1, 4, 5),  # 39.0 us
}


def choose(op: Op, device_kind: str, rows: int, k: int, n: int, itemsize: int) -> Choice:
    """The tile, or XLA, for x [rows, k] @ w [k, n]; for matmul_swiglu n is F of w [k, 2 F]."""
    whole = op in ("matmul", "matmul_swiglu")
    if rows > (MAX_WHOLE_ROWS if whole else MAX_ROWS) or (
        op == "swiglu_split_matmul" and rows > MAX_SWIGLU_ROWS
    ):
        return XLA
    if itemsize != 2:  # f32 is there for exactness
        return default_tile(op, rows, k, n, itemsize)
    measured = MEASURED.get((device_kind, op, bucket(rows), k, n))
    return default_tile(op, rows, k, n, itemsize) if measured is None else measured


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def default_tile(op: Op, rows: int, k: int, n: int, itemsize: int) -> Tile:
    """Splits K until every multiprocessor has a program, or two where few rows leave the room.

    A whole product of few rows rather takes narrow tiles: splits would cost it a second launch.
    """
    gated = op == "matmul_swiglu"  # two tiles of weights a program, and no splits
    few = rows <= MIN_DOT_ROWS
    block_t = min(max(bucket(rows), MIN_DOT_ROWS), 128)
    block_n = _divisor(n, 64 if gated or (few and op != "swiglu_split_matmul") else 128)
    if itemsize == 4 or (op == "matmul" and few and n // block_n < _ALMOST_ALL):
        block_n = min(block_n, 32)
    block_k = _divisor(k, 64 if rows > 32 else 128)
    columns = -(-n // block_n) * -(-rows // block_t)
    wanted = _ALMOST_ALL * (2 if few and op != "matmul" else 1)
    splits = 1 if gated else max(1, min(-(-wanted // columns), 8, k // (4 * block_k)))
    if itemsize == 4:
        return Tile(block_t, block_n, 32, splits, 4, 2)
    return Tile(block_t, block_n, block_k, splits, 8 if rows > 64 else 4, 3 if rows > 64 else 4)


def _divisor(n: int, at_most: int) -> int:
    """The largest power of two up to ``at_most`` that divides n; 32 at least, masked if need be."""
    block = at_most
    while block > 32 and n % block:
        block //= 2
    return block


def candidates(op: Op, rows: int, k: int, n: int) -> tuple[Tile, ...]:
    """Tiles worth timing for bf16 on a card, the default first."""
    tiles = [default_tile(op, rows, k, n, 2)]
    tiles += [tile for tile in _possible(op, rows) if _sensible(tile, op, rows, k, n)]
    return tuple(dict.fromkeys(tiles))


def _possible(op: Op, rows: int) -> list[Tile]:
    block_t = min(max(bucket(rows), MIN_DOT_ROWS), 256)
    shapes = [(block_t, *shape) for shape in _DOTS[block_t]]
    splits = [1, 2, 4, 8]
    if block_t == 256:
        shapes += [(128, *shape) for shape in _DOTS[128]]
    if rows <= _MAX_VECTOR_ROWS:
        shapes += [(bucket(rows), *shape, 1) for shape in _VECTORS]
        splits += [16]
    return [
        Tile(t, n, k, split, warps, stages)
        for t, n, k, warps, stages in shapes
        for split in ([1] if op == "matmul_swiglu" else splits)
    ]


_MAX_VECTOR_ROWS = 4
# block_n, block_k, warps
_VECTORS = ((32, 128, 4), (64, 64, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8))
# block_t -> block_n, block_k, warps, stages
_DOTS: Mapping[int, tuple[tuple[int, int, int, int], ...]] = {
    16: ((32, 256, 4, 4), (32, 128, 4, 6), (64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 5)),
    32: ((32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4), (128, 64, 8, 5)),
    64: ((64, 64, 4, 5), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3)),
    128: ((64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3)),
    256: ((64, 64, 8, 4), (128, 64, 8, 3)),
}
_SHARED_BYTES = 227 << 10


def _sensible(tile: Tile, op: Op, rows: int, k: int, n: int) -> bool:
    """Enough programs, with 40 KB a multiprocessor in flight; at least 3 steps each; it fits; and
    no splits that wait for others.
    """
    weights = tile.block_n * (2 if op == "matmul_swiglu" else 1)
    programs = -(-n // tile.block_n) * -(-rows // tile.block_t) * tile.splits
    vector = tile.block_t < MIN_DOT_ROWS
    flights = 1 if vector else tile.num_stages - 1
    in_flight = programs * flights * tile.block_k * weights * 2
    shared = 0 if vector else tile.num_stages * tile.block_k * (tile.block_t + weights) * 2
    at_once = 32 // tile.num_warps if vector else _SHARED_BYTES // shared
    most = min(at_once, 8) if tile.splits > 1 else 8 * min(at_once, 1)
    return (
        _ALMOST_ALL <= programs <= _MULTIPROCESSORS * most
        and in_flight >= _MULTIPROCESSORS * (40 << 10)
        and k // (tile.block_k * tile.splits) >= 3
    )
