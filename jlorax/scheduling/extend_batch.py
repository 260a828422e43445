"""The chunks of one extend step, as they are gathered from prompts that wait to be computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jlorax.layout import StepShape
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import Chunk

_WELL_FILLED = 0.75  # of an extend step's tokens


class ExtendShapes:
    """Of one kind: those that score, or those that do not."""

    def __init__(self, shapes: Iterable[StepShape], *, scores: bool) -> None:
        self.all = tuple(s for s in shapes if not s.is_decode and s.scores == scores)
        self.most_tokens = max((s.num_tokens for s in self.all), default=0)
        self.most_chunks = max((s.num_outputs for s in self.all), default=0)

    def padded(self, count: int) -> int:
        """Of a step's tokens that a chunk of so many takes."""
        tile = self.all[0].tile
        return -(-count // tile) * tile

    def num_tokens(self, chunks: Iterable[Chunk]) -> int:
        return sum(self.padded(chunk.count) for chunk in chunks)


class ExtendBatch:
    """Prompts to be scored are gathered apart from the others: a step is of one kind.

    When both kinds are there, they take turns. So a long prompt that is scored, in steps of the
    smallest shape, does not hold up the others, nor they it.
    """

    def __init__(self, plain: ExtendShapes, scoring: ExtendShapes) -> None:
        self._shapes = {False: plain, True: scoring}
        self._chunks: dict[bool, list[Chunk]] = {False: [], True: []}
        self._tokens_left = {kind: shapes.most_tokens for kind, shapes in self._shapes.items()}

    @property
    def is_full(self) -> bool:
        """Nobody more is to be admitted for this step."""
        return not self._has_room(False)

    def has_room_for(self, sequence: Sequence) -> bool:
        return self._has_room(sequence.is_to_be_scored)

    def _has_room(self, kind: bool) -> bool:
        few = len(self._chunks[kind]) < self._shapes[kind].most_chunks
        return few and self._tokens_left[kind] > 0

    def add(self, sequence: Sequence, slot: int) -> None:
        """As much of its prompt as there is room for."""
        kind, start = sequence.is_to_be_scored, sequence.num_computed
        if not self._has_room(kind):
            return
        count = min(sequence.num_prefill - start, self._tokens_left[kind])
        final = start + count == sequence.num_prefill
        self._chunks[kind].append(Chunk(sequence, start, count, slot, final))
        self._tokens_left[kind] -= self._shapes[kind].padded(count)

    def chosen(self, last_scored: bool) -> tuple[list[Chunk], ExtendShapes]:
        """The step's chunks, in order of their slots, and the shapes that may hold them."""
        kind = not last_scored if self._chunks[not last_scored] else last_scored
        chunks, shapes = self._chunks[kind], self._shapes[kind]
        if chunks:
            chunks = _well_filled(chunks, shapes)
            chunks.sort(key=lambda chunk: chunk.slot)
        return chunks, shapes


def _well_filled(chunks: list[Chunk], shapes: ExtendShapes) -> list[Chunk]:
    """Cut back to the next smaller shape where the one that holds all would be mostly padding,
    which costs what tokens cost; the rest goes into the next step."""
    num_tokens = shapes.num_tokens(chunks)
    sizes = {shape.num_tokens for shape in shapes.all}
    holds_all = min(size for size in sizes if size >= num_tokens)
    room = max((size for size in sizes if size <= num_tokens), default=holds_all)
    if num_tokens >= _WELL_FILLED * holds_all:
        return chunks
    kept = []
    for chunk in chunks:
        count = min(chunk.count, room)
        if count == 0:
            break
        kept.append(chunk if count == chunk.count else replace(chunk, count=count, final=False))
        room -= shapes.padded(count)
    return kept
