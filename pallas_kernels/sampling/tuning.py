"""How a row is walked, per device and vocabulary: plain data, and a rule for the rest.

Never by the number of rows: sums of another cut may differ in their last bit, and a draw must not
depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

H100: Final = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Tuning:
    """All are powers of two.

    ``chunk``: logits that a program takes at once, and terms of each of its sums in registers.
    ``ways``: parts into which a walk cuts the range that a threshold lies in, by ``ways`` - 1 sums;
    32 / log2(ways) walks find it.
    """

    chunk: int
    ways: int
    num_warps: int


# (device kind, V rounded up to a power of two) -> what was fastest. None is measured yet.
MEASURED: Mapping[tuple[str, int], Tuning] = {}

_WALKED_AT_ONCE = 4096


def choose(device_kind: str, vocab_size: int) -> Tuning:
    """The tuning for rows of ``vocab_size`` logits."""
    measured = MEASURED.get((device_kind, bucket(vocab_size)))
    return default_tuning(vocab_size) if measured is None else measured


def bucket(vocab_size: int) -> int:
    """The next power of two."""
    return 1 << (vocab_size - 1).bit_length()


def default_tuning(vocab_size: int) -> Tuning:
    """A prediction: 8 logits and 24 sums a thread, 94 registers: a program a multiprocessor."""
    return Tuning(min(max(bucket(vocab_size), 128), _WALKED_AT_ONCE), 4, 16)


def candidates(vocab_size: int) -> tuple[Tuning, ...]:
    """What is worth timing on a card, the default first."""
    made = [
        Tuning(chunk, ways, warps)
        for warps in (8, 16, 32)
        for chunk in (2048, 4096, 8192, 16384)
        for ways in (2, 4, 8, 16)
        if chunk >= 4 * 32 * warps and chunk * ways <= _MOST_REGISTERS
    ]
    return tuple(dict.fromkeys([default_tuning(vocab_size), *made]))


_MOST_REGISTERS = 49152  # for logits and sums, of the 65536 of a multiprocessor
