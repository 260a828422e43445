"""A step, as the host describes it: padded arrays in one int32 vector, and who gets its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from jlorax.layout import LAST_TOKEN, SAMPLING_FLOATS, StepLayout, StepShape
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
    """One launch. Output i belongs to ``outputs[i]``; further outputs are padding."""

    shape: StepShape
    packed: np.ndarray
    outputs: tuple[Sequence, ...]
    num_tokens: int


class PlanBuilder:
    """Lays chunks into the arrays of a shape. ``page_tables`` [rows, W] is the policy's own."""

    def __init__(self, page_tables: np.ndarray, page_size: int, base_slot: int) -> None:
        self._page_tables = page_tables
        self._page_size = page_size
        self._base_slot = base_slot
        self._padding_row = page_tables.shape[0]
        self._layout = cache(lambda shape: StepLayout(shape, page_tables.shape[1]))

    def decode(self, shape: StepShape, chunks: list[Chunk]) -> StepPlan:
        """One token a sequence, which the device still holds."""
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
        views["slots"][:n] = slots
        views["out_index"][:] = np.arange(shape.num_outputs)
        self._fill_outputs(views, rows, slots, sequences)
        return StepPlan(shape, packed, tuple(sequences), n)

    def extend(self, shape: StepShape, chunks: list[Chunk]) -> StepPlan:
        """Chunks of prompts; each begins at a tile of its own."""
        packed, views = self._blank(shape)
        first = 0
        out_index = []
        for chunk in chunks:
            self._fill_chunk(views, chunk, first, shape.tile)
            if chunk.final:
                out_index.append(first + chunk.count - 1)
            first += -(-chunk.count // shape.tile) * shape.tile
        final = [chunk for chunk in chunks if chunk.final]
        sequences = [chunk.sequence for chunk in final]
        views["out_index"][: len(final)] = out_index
        rows = np.array([s.row for s in sequences], np.int32)
        slots = np.array([chunk.slot for chunk in final], np.int32)
        self._fill_outputs(views, rows, slots, sequences)
        return StepPlan(shape, packed, tuple(sequences), sum(chunk.count for chunk in chunks))

    def _blank(self, shape: StepShape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self._layout(shape).blank(self._padding_row, self._base_slot)

    def _fill_chunk(
        self, views: dict[str, np.ndarray], chunk: Chunk, first: int, tile: int
    ) -> None:
        sequence = chunk.sequence
        tokens = slice(first, first + chunk.count)
        tiles = slice(first // tile, first // tile + -(-chunk.count // tile))
        positions = np.arange(chunk.start, chunk.start + chunk.count)
        table = self._page_tables[sequence.row]
        views["tokens"][tokens] = sequence.tokens[chunk.start : chunk.start + chunk.count]
        views["token_rows"][tokens] = sequence.row
        views["positions"][tokens] = positions
        views["prompt_lengths"][tokens] = len(sequence.prompt)
        views["kv_pages"][tokens] = table[positions // self._page_size]
        views["kv_offsets"][tokens] = positions % self._page_size
        views["page_table"][tiles] = table
        views["slots"][tiles] = chunk.slot

    def _fill_outputs(
        self,
        views: dict[str, np.ndarray],
        rows: np.ndarray,
        slots: np.ndarray,
        sequences: list[Sequence],
    ) -> None:
        n = len(sequences)
        views["out_rows"][:n] = rows
        views["out_slots"][:n] = slots
        if "seeds" not in views:
            return
        for name in SAMPLING_FLOATS:
            views[name][:n] = [getattr(s.sampling, name) for s in sequences]
        views["top_k"][:n] = [s.sampling.top_k for s in sequences]
        views["num_alternatives"][:n] = [s.num_alternatives for s in sequences]
        views["seeds"][:n, 0] = [s.seed >> 32 for s in sequences]
        views["seeds"][:n, 1] = [s.seed & _LOW_32 for s in sequences]


def smallest(shapes: Iterable[StepShape], num_tokens: int, sampling: bool) -> StepShape | None:
    """The cheapest shape that holds num_tokens; a step without sampling may use one that can."""
    fitting = [s for s in shapes if s.num_tokens >= num_tokens and s.sampling >= sampling]
    return min(fitting, key=lambda s: (s.num_tokens, s.sampling), default=None)
