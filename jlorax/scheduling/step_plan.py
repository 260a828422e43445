"""A step, as the host describes it: padded arrays in one int32 vector, and who gets its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np

from jlorax.layout import (
    LAST_TOKEN,
    LORA_BLOCKS,
    QUERY_BLOCK,
    QUERY_BLOCKS,
    SAMPLING_FLOATS,
    LoraReach,
    RowWrites,
    StepLayout,
    StepShape,
)
from jlorax.scheduling.row_rules import RowRules
from jlorax.scheduling.sequence import Sequence

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Chunk:
    """``count`` consecutive tokens of a sequence; ``final``: the next token is drawn after them."""

    sequence: Sequence
    start: int
    count: int
    slot: int
    final: bool


@dataclass(frozen=True)
class StepPlan:
    """One launch, after its ``writes``. Output i belongs to ``outputs[i]``; further outputs are
    padding."""

    shape: StepShape
    packed: np.ndarray
    writes: RowWrites
    outputs: tuple[Sequence, ...]
    num_tokens: int
    scored: tuple[tuple[Chunk, int], ...] = ()  # chunks, and the first of the step's tokens of each

    @property
    def wants_alternatives(self) -> bool:
        return any(sequence.num_alternatives for sequence in self.outputs)


class PlanBuilder:
    """Lays chunks into the arrays of a shape. ``page_tables`` [rows, W] is the policy's own."""

    def __init__(
        self, page_tables: np.ndarray, page_size: int, base_slot: int, vocab_size: int
    ) -> None:
        self._page_tables = page_tables
        self._rules = RowRules(vocab_size)
        self._page_size = page_size
        self._base_slot = base_slot
        self._padding_row = page_tables.shape[0]
        self._layout = cache(lambda shape: StepLayout(shape, page_tables.shape[1]))

    def decode(self, shape: StepShape, chunks: list[Chunk]) -> StepPlan:
        """One token a sequence, which the device still holds; chunks in order of their slots."""
        packed, views = self._blank(shape)
        n = len(chunks)
        sequences = [chunk.sequence for chunk in chunks]
        rows = np.fromiter((s.row for s in sequences), np.int32, n)
        positions = np.fromiter((chunk.start for chunk in chunks), np.int32, n)
        slots = np.fromiter((chunk.slot for chunk in chunks), np.int32, n)
        views["tokens"][:n] = LAST_TOKEN
        views["token_rows"][:n] = rows
        views["positions"][:n] = positions
        views["prompt_lengths"][:n] = [len(s.prompt) for s in sequences]
        views["kv_pages"][:n] = self._page_tables[rows, positions // self._page_size]
        views["kv_offsets"][:n] = positions % self._page_size
        views["page_table"][:n] = self._page_tables[rows]
        if shape.lora and shape.blocks is None:
            views["slots"][:n] = slots
        elif shape.lora:
            self._fill_lora_blocks(views, shape, chunks)
        views["out_index"][:] = np.arange(shape.num_outputs)
        self._fill_outputs(views, rows, slots, sequences)
        writes = self._rules.fill(views, sequences)
        return StepPlan(shape, packed, writes, tuple(sequences), n)

    def extend(self, shape: StepShape, chunks: list[Chunk]) -> StepPlan:
        """Chunks of prompts, each at a tile of its own, or one right after the other."""
        packed, views = self._blank(shape)
        firsts = list(_firsts(shape, chunks))
        for chunk, first in zip(chunks, firsts, strict=True):
            self._fill_tokens(views, chunk, first)
        if shape.blocks is None:
            self._fill_tiles(views, shape, chunks, firsts)
        else:
            self._fill_blocks(views, shape, chunks, firsts)
        final = [(chunk, first) for chunk, first in zip(chunks, firsts, strict=True) if chunk.final]
        sequences = [chunk.sequence for chunk, _ in final]
        views["out_index"][: len(final)] = [first + chunk.count - 1 for chunk, first in final]
        rows = np.array([s.row for s in sequences], np.int32)
        slots = np.array([chunk.slot for chunk, _ in final], np.int32)
        self._fill_outputs(views, rows, slots, sequences)
        writes = self._rules.fill(views, sequences)
        num_tokens = sum(chunk.count for chunk in chunks)
        if not shape.scores:
            return StepPlan(shape, packed, writes, tuple(sequences), num_tokens)
        scored = tuple(zip(chunks, firsts, strict=True))
        _fill_scores(views, scored)
        return StepPlan(shape, packed, writes, tuple(sequences), num_tokens, scored)

    def _blank(self, shape: StepShape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self._layout(shape).blank(self._padding_row, self._base_slot)

    def _fill_tokens(self, views: dict[str, np.ndarray], chunk: Chunk, first: int) -> None:
        sequence = chunk.sequence
        tokens = slice(first, first + chunk.count)
        positions = np.arange(chunk.start, chunk.start + chunk.count)
        table = self._page_tables[sequence.row]
        views["tokens"][tokens] = sequence.tokens[chunk.start : chunk.start + chunk.count]
        views["token_rows"][tokens] = sequence.row
        views["positions"][tokens] = positions
        views["prompt_lengths"][tokens] = len(sequence.prompt)
        views["kv_pages"][tokens] = table[positions // self._page_size]
        views["kv_offsets"][tokens] = positions % self._page_size

    def _fill_tiles(
        self,
        views: dict[str, np.ndarray],
        shape: StepShape,
        chunks: list[Chunk],
        firsts: list[int],
    ) -> None:
        tile = shape.tile
        for chunk, first in zip(chunks, firsts, strict=True):
            tiles = slice(first // tile, first // tile + -(-chunk.count // tile))
            views["page_table"][tiles] = self._page_tables[chunk.sequence.row]
            if shape.lora:
                views["slots"][tiles] = chunk.slot

    def _fill_blocks(
        self,
        views: dict[str, np.ndarray],
        shape: StepShape,
        chunks: list[Chunk],
        firsts: list[int],
    ) -> None:
        for i, chunk in enumerate(chunks):
            views["page_table"][i] = self._page_tables[chunk.sequence.row]
        _fill(views, QUERY_BLOCKS, list(_query_blocks(chunks, firsts)))
        if shape.lora:
            self._fill_lora_blocks(views, shape, chunks)

    def _fill_lora_blocks(
        self, views: dict[str, np.ndarray], shape: StepShape, chunks: list[Chunk]
    ) -> None:
        """Packed chunks only: what stands together of one adapter, cut into blocks of rows."""
        assert shape.blocks is not None
        first = 0
        blocks: list[tuple[int, ...]] = []
        for slot, run in groupby(chunks, key=lambda chunk: chunk.slot):
            count = sum(chunk.count for chunk in run)
            if slot != self._base_slot:
                blocks += [
                    (first + done, size, slot) for done, size in _cut(count, shape.blocks.lora_rows)
                ]
            first += count
        _fill(views, LORA_BLOCKS, blocks)

    def _fill_outputs(
        self,
        views: dict[str, np.ndarray],
        rows: np.ndarray,
        slots: np.ndarray,
        sequences: list[Sequence],
    ) -> None:
        n = len(sequences)
        views["out_rows"][:n] = rows
        if "out_slots" in views:
            views["out_slots"][:n] = slots
        for name in SAMPLING_FLOATS:
            views[name][:n] = [getattr(s.sampling, name) for s in sequences]
        for name in ("top_p", "typical_p"):  # a device takes what is smaller for 0, which is off
            np.maximum(views[name], np.finfo(np.float32).tiny, out=views[name])
        views["top_k"][:n] = [s.sampling.top_k for s in sequences]
        views["num_alternatives"][:n] = [s.num_alternatives for s in sequences]
        views["seeds"][:n, 0] = [s.seed >> 32 for s in sequences]
        views["seeds"][:n, 1] = [s.seed & _LOW_32 for s in sequences]


def _fill_scores(views: dict[str, np.ndarray], scored: tuple[tuple[Chunk, int], ...]) -> None:
    for i, (chunk, first) in enumerate(scored):
        tokens = slice(first, first + chunk.count)
        views["score_chunks"][tokens] = i
        views["score_slots"][tokens] = chunk.slot
        if chunk.sequence.wants_prompt_logprobs:
            views["score_alternatives"][tokens] = chunk.sequence.num_alternatives
            following = chunk.sequence.prompt[chunk.start + 1 : chunk.start + 1 + chunk.count]
            views["score_targets"][first : first + len(following)] = following


def _firsts(shape: StepShape, chunks: list[Chunk]) -> Iterator[int]:
    """Where each chunk's tokens begin."""
    first = 0
    for chunk in chunks:
        yield first
        first += -(-chunk.count // shape.tile) * shape.tile


def _query_blocks(chunks: list[Chunk], firsts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first token, count, chunk, position of the first): of each chunk the longest walk first."""
    for i, (chunk, first) in enumerate(zip(chunks, firsts, strict=True)):
        for done, count in reversed(list(_cut(chunk.count, QUERY_BLOCK))):
            yield first + done, count, i, chunk.start + done


def _cut(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, length) of the pieces of ``count`` rows."""
    for done in range(0, count, size):
        yield done, min(size, count - done)


def _fill(
    views: dict[str, np.ndarray], names: tuple[str, ...], blocks: list[tuple[int, ...]]
) -> None:
    for name, column in zip(names, zip(*blocks, strict=True), strict=False):
        views[name][: len(column)] = column


def smallest(
    shapes: Iterable[StepShape],
    num_tokens: int,
    lora: LoraReach = LoraReach.ALL,
    num_sequences: int = 0,
) -> StepShape | None:
    """The cheapest shape that holds the tokens of these many sequences; a step that needs no
    adapters may use one that can."""
    fitting = [
        s
        for s in shapes
        if s.num_tokens >= num_tokens and s.num_outputs >= num_sequences and s.lora >= lora
    ]
    return min(fitting, key=lambda s: (s.num_tokens, s.lora), default=None)
