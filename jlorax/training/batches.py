"""Examples as rows of fixed length, in an order that follows from a seed alone. Plain.

Several short examples share a row (packing), each a segment of its own that sees no other: less
than a tenth of a batch is padding then, and all batches have one shape. Without packing a row is an
example, and a batch is as long as its longest, rounded up: few shapes, as each is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jlorax.training.examples import Example

_LENGTH_STEP = 64  # tokens: lengths of unpacked batches are powers of two times this
_TARGET_STEP = 64


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. ``examples``: whose they are, as the data counts them."""

    tokens: np.ndarray  # i32[B, T]
    segments: np.ndarray  # i32[B, T]: 1, 2, ... for each example of a row; 0 is padding
    positions: np.ndarray  # i32[B, T], in the segment
    targets: np.ndarray  # i32[B, T]: the token that follows, where it is to be learnt; else -1
    examples: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.segments > 0).sum())

    @property
    def num_targets(self) -> int:
        return int((self.targets >= 0).sum())


class Batches:
    """Batches of ``batch_size`` rows of at most ``seq_len`` tokens."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seq_len: int,
        batch_size: int,
        packing: bool,
        seed: int,
    ) -> None:
        self._examples = examples
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._is_packed = packing
        lengths = [len(example.ids) for example in examples]
        self._rows = packed(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]

    @property
    def num_batches(self) -> int:
        """Of an epoch; the last may be filled up with empty rows."""
        return -(-len(self._rows) // self._batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """From the batch ``start`` on; the order depends on seed and number alone."""
        order = np.random.default_rng((self._seed, number)).permutation(len(self._rows))
        for at in range(start * self._batch_size, len(order), self._batch_size):
            yield self._batch([self._rows[i] for i in order[at : at + self._batch_size]])

    def max_targets(self) -> int:
        """No batch of any epoch has more targets: a batch may get the rows that have most."""
        num = sorted(
            (sum(self._examples[i].num_targets for i in row) for row in self._rows), reverse=True
        )
        return -(-sum(num[: self._batch_size]) // _TARGET_STEP) * _TARGET_STEP

    def _batch(self, rows: list[list[int]]) -> Batch:
        length = self._length(rows)
        shape = self._batch_size, length
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        targets = np.full(shape, -1, np.int32)
        for place, row in enumerate(rows):
            at = 0
            for segment, number in enumerate(row, 1):
                example = self._examples[number]
                part = slice(at, at + len(example.ids))
                tokens[place, part] = example.ids
                segments[place, part] = segment
                positions[place, part] = np.arange(len(example.ids))
                targets[place, part] = example.next_targets()
                at = part.stop
        examples = tuple(self._examples[i].number for row in rows for i in row)
        return Batch(tokens, segments, positions, targets, examples)

    def _length(self, rows: list[list[int]]) -> int:
        if self._is_packed:
            return self._seq_len
        longest = max(len(self._examples[i].ids) for row in rows for i in row)
        length = _LENGTH_STEP
        while length < longest:
            length *= 2
        return min(length, max(longest, self._seq_len))


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each into the fullest row that has room
    (best-fit decreasing; Johnson 1973). Rows are found by the room they have left, so a million
    examples take seconds."""
    by_room: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    rooms = np.zeros(room + 1, np.int64)  # how many rows have so much left
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[number]
        fitting = np.flatnonzero(rooms[need:])
        left = room if len(fitting) == 0 else need + int(fitting[0])
        if len(fitting) == 0:
            row = len(rows)
            rows.append([])
        else:
            row = by_room[left].pop()
            rooms[left] -= 1
        rows[row].append(number)
        by_room.setdefault(left - need, []).append(row)
        rooms[left - need] += 1
    return rows
