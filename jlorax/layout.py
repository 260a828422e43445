"""Shapes that host and device agree on: the LoRA bank's pages, a step's vector, a row's rules.

A *page* is 8 rank columns of one projection in its whole layer stack: ``[L, 8, width]``. Pages of
equal (L, width) share a pool, whichever projection they belong to. A projection of rank r takes
ceil(r / 8) pages for A (``A`` as PEFT stores it: ``[r, d_in]``) and as many for B (transposed:
``[r, d_out]``); a half-filled last page ends in zero rows. Page 0 of every pool stays zero: table
entries that name nothing name it. So memory and work follow an adapter's true rank and targets.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Protocol

import numpy as np

from jlorax.types import Projection

RANK_PAGE = 8
ZERO_PAGE = 0
NO_PAGE = 2**31 - 1  # in a write: beyond every pool

ALIGN_BYTES = 64  # a CPU device uses host memory in place from here on

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def rank_pages(rank: int) -> int:
    """Pages that a matrix of this rank fills."""
    return -(-rank // RANK_PAGE)


@dataclass(frozen=True, order=True)
class PoolKey:
    """Which pool a page lives in."""

    num_layers: int
    width: int


class LoraReach(IntEnum):
    """Where a step's adapters may have weights; what is beyond is not launched at all."""

    NONE = 0
    ATTENTION = 1
    ALL = 2


@dataclass(frozen=True)
class BankLayout:
    """The bank of one base model: its projections, element type ("float32", "bfloat16"), limits."""

    projections: tuple[Projection, ...]
    dtype: str
    max_rank: int

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Projection name -> its row in the page tables."""
        return {p.name: i for i, p in enumerate(self.projections)}

    @cached_property
    def pools(self) -> tuple[PoolKey, ...]:
        keys = {self.pool_a(p) for p in self.projections} | {
            self.pool_b(p) for p in self.projections
        }
        return tuple(sorted(keys))

    @property
    def table_width(self) -> int:
        """Entries of a page table, even: kernels take pages in pairs (16 columns of rank)."""
        return -(-rank_pages(self.max_rank) // 2) * 2

    @property
    def max_layers(self) -> int:
        return max(p.num_layers for p in self.projections)

    def pool_a(self, projection: Projection) -> PoolKey:
        return PoolKey(projection.num_layers, projection.d_in)

    def pool_b(self, projection: Projection) -> PoolKey:
        return PoolKey(projection.num_layers, projection.d_out)

    def reach(self, names: Iterable[str]) -> LoraReach:
        """Of an adapter that targets these projections."""
        paths = [self.projections[self.index[name]].path for name in names]
        return LoraReach.ATTENTION if all(map(_is_attention, paths)) else LoraReach.ALL

    def page_bytes(self, pool: PoolKey) -> int:
        return _page_elements(pool) * ITEM_BYTES[self.dtype]

    @cached_property
    def unit(self) -> int:
        """Elements of one row of an adapter's buffer; every pool's page is a whole number of them.

        Rows rather than single elements: 32 bits count the largest buffer, and offsets into it are
        known to be aligned.
        """
        return math.gcd(*(_page_elements(pool) for pool in self.pools))

    def page_units(self, pool: PoolKey) -> int:
        return _page_elements(pool) // self.unit

    def units(self, need: Mapping[PoolKey, int]) -> int:
        """Of these pages, without padding."""
        return sum(self.page_units(pool) * count for pool, count in need.items())

    @cached_property
    def most_pages(self) -> Mapping[PoolKey, int]:
        """What an adapter of the largest rank on every projection needs."""
        return self.pages_needed({p.name: self.max_rank for p in self.projections})

    @cached_property
    def buffer_sizes(self) -> tuple[int, ...]:
        """Units that buffers come in, ascending: few, as each has an executable of its own.

        Usual adapters fill one: attention's projections, half of them, or all there are, at rank 8,
        16, 32, 64 and so on. What lies between is padded, to about twice its size at the worst.
        """
        attention = [p.name for p in self.projections if _is_attention(p.path)]
        counts = [n for n in _USUAL_PAGES if n <= rank_pages(self.max_rank)]
        usual = [
            self.units(self.pages_needed(dict.fromkeys(names, n * RANK_PAGE)))
            for names in (attention, self.index)
            for n in counts
        ]
        return _thinned([min(usual) // 2, *usual, self.units(self.most_pages)])

    def buffer_size(self, need: Mapping[PoolKey, int]) -> int:
        """Units of the buffer that an adapter with these pages travels in."""
        units = self.units(need)
        return next(size for size in self.buffer_sizes if size >= units)

    def pages_needed(self, ranks: Mapping[str, int]) -> dict[PoolKey, int]:
        """Pages per pool for an adapter with these true ranks (projection name -> rank)."""
        need: dict[PoolKey, int] = {}
        for name, rank in ranks.items():
            projection = self.projections[self.index[name]]
            for pool in (self.pool_a(projection), self.pool_b(projection)):
                need[pool] = need.get(pool, 0) + rank_pages(rank)
        return need


_USUAL_PAGES = (1, 2, 4, 8, 16, 32)
_NEAR = 0.95  # a size this near to the next is not worth an executable


def _thinned(sizes: Iterable[int]) -> tuple[int, ...]:
    kept: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not kept or 0 < size < _NEAR * kept[-1]:
            kept.append(size)
    return tuple(reversed(kept))


def _page_elements(pool: PoolKey) -> int:
    return pool.num_layers * RANK_PAGE * pool.width


def _is_attention(path: str) -> bool:
    return ".self_attn." in path or ".self_attention." in path


def aligned_zeros(num_bytes: int) -> np.ndarray:
    """u8[num_bytes] that a CPU device can use in place; memory is taken as it is written."""
    memory = np.zeros(num_bytes + ALIGN_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGN_BYTES
    return memory[start : start + num_bytes]


class HostBuffer(Protocol):
    """An adapter's pages in RAM, [units, unit]: a numpy array, or what the device made of one."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...


class HostMemory(Protocol):
    """The RAM in which adapters wait. Used by several threads."""

    def reserve(self, num_bytes: int) -> None:
        """Has so much ready, where getting it later would disturb the device."""

    def kept_bytes(self, num_bytes: int) -> int:
        """Of so much, what adapters that stay may take; the rest is for those that pass through:
        being loaded, or on their way to a disk."""

    def blank(self, num_bytes: int) -> np.ndarray:
        """u8[num_bytes] of zeros to build a buffer in, aligned; the calling thread's until its next
        call, or for good once it is kept."""

    def keep(self, buffer: np.ndarray) -> HostBuffer:
        """The finished buffer, where the device likes to read it; it never changes again."""

    def copy(self, buffer: np.ndarray) -> HostBuffer:
        """The same for a buffer of somebody else's."""


class PlainMemory:
    """For a device that is the host: what was built is what is read."""

    def reserve(self, num_bytes: int) -> None:
        """Nothing to be gained: memory is taken as it is written."""

    def kept_bytes(self, num_bytes: int) -> int:
        """All of it: a little more for a while does no harm."""
        return num_bytes

    def blank(self, num_bytes: int) -> np.ndarray:
        return aligned_zeros(num_bytes)

    def keep(self, buffer: np.ndarray) -> HostBuffer:
        buffer.flags.writeable = False
        return buffer

    def copy(self, buffer: np.ndarray) -> HostBuffer:
        own = aligned_zeros(buffer.nbytes).view(buffer.dtype).reshape(buffer.shape)
        np.copyto(own, buffer)
        return self.keep(own)


class Scratch(threading.local):
    """Memory that a thread uses again: pages that were touched before are written ten times faster.

    Beyond ``most_bytes`` it is given back after each use.
    """

    def __init__(self, most_bytes: int = 1 << 28) -> None:
        self._most_bytes = most_bytes
        self._memory = np.empty(0, np.uint8)

    def room(self, num_bytes: int) -> np.ndarray:
        """u8[num_bytes], aligned, of any content; the thread's until its next call."""
        if len(self._memory) >= num_bytes:
            return self._memory[:num_bytes]
        memory = aligned_zeros(num_bytes)
        if num_bytes <= self._most_bytes:
            self._memory = memory
        return memory


@dataclass(frozen=True)
class SlotWrite:
    """Everything the device needs to make one adapter resident in one slot."""

    slot: int
    buffer: HostBuffer
    packed: np.ndarray  # i32, as a WriteLayout of this buffer's length lays it out


MASK_BITS = 32  # of a mask's words

BiasedTokens = tuple[tuple[int, float], ...]  # (token id, what is added to its logit), an id once


def mask_words(vocab_size: int) -> int:
    return -(-vocab_size // MASK_BITS)


def mask_without(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """A mask i32[ceil(V / 32)] that allows all but these: bit i % 32 of word i // 32 allows i."""
    words = np.full(mask_words(vocab_size), 0xFFFFFFFF, np.uint32)
    for token in tokens:
        words[token // MASK_BITS] &= ~np.uint32(1 << token % MASK_BITS)
    return words.view(np.int32)


@dataclass(frozen=True)
class RowWrites:
    """What rows may draw and what they favour, from the next step on.

    Nobody's row, the one after the last, is never written: it allows all and favours nothing.
    """

    masks: tuple[tuple[int, np.ndarray], ...] = ()  # (row, i32[ceil(V / 32)])
    biases: tuple[tuple[int, BiasedTokens], ...] = ()  # (row, all that it favours)


@dataclass(frozen=True)
class BlockCounts:
    """How many blocks a packed step has room for; the host fills as many as it needs.

    ``lora``: of at most ``lora_rows`` consecutive rows of one adapter.
    ``queries``: of at most ``QUERY_BLOCK`` consecutive tokens of one sequence; none in a decode,
    where every row is a sequence of its own.
    """

    lora: int
    lora_rows: int
    queries: int


QUERY_BLOCK = 128


@dataclass(frozen=True)
class StepShape:
    """One executable: T tokens, B outputs.

    Decode has an output per token; an extend step carries chunks of prompts, an output a chunk at
    most. Adapters are added as far as ``lora`` reaches. ``scores``: an extend step that also says
    how probable its tokens are, and sums hidden states. How tokens lie follows from what computes:
      tiles   (XLA)    ``tile`` consecutive tokens belong to one sequence, padded
      packed  (Pallas) one after the other; ``blocks`` say who they belong to, and ``tile`` is 1
    """

    num_tokens: int
    tile: int
    num_outputs: int
    lora: LoraReach = LoraReach.ALL
    blocks: BlockCounts | None = None
    scores: bool = False

    @property
    def is_decode(self) -> bool:
        return self.num_outputs == self.num_tokens

    @property
    def num_tiles(self) -> int:
        return self.num_tokens // self.tile


def decode_shape(
    batch: int, lora: LoraReach = LoraReach.ALL, packed_slots: int | None = None
) -> StepShape:
    """``packed_slots``: of the bank, for packed steps; None: tiles."""
    if packed_slots is None:
        return StepShape(batch, 1, batch, lora)
    most = min(batch, packed_slots + batch // _DECODE_LORA_ROWS) if lora else 0
    return StepShape(batch, 1, batch, lora, BlockCounts(most, _DECODE_LORA_ROWS, 0))


def packed_extend_shape(
    num_tokens: int, num_chunks: int, lora: LoraReach = LoraReach.ALL
) -> StepShape:
    """At most ``num_chunks`` chunks, each of which may end a prompt."""
    chunks = min(num_chunks, num_tokens - 1)
    lora_blocks = _most_blocks(num_tokens, chunks, _EXTEND_LORA_ROWS) if lora else 0
    queries = _most_blocks(num_tokens, chunks, QUERY_BLOCK)
    counts = BlockCounts(lora_blocks, _EXTEND_LORA_ROWS, queries)
    return StepShape(num_tokens, 1, chunks, lora, counts)


# A decode step's rows differ in their adapters, a prompt's do not.
_DECODE_LORA_ROWS, _EXTEND_LORA_ROWS = 16, 64


def _most_blocks(num_tokens: int, num_chunks: int, block: int) -> int:
    return num_chunks + (num_tokens - num_chunks) // block


_Fields = dict[str, tuple[str, tuple[int, ...]]]


def _step_fields(shape: StepShape, max_pages: int) -> _Fields:
    tokens, outputs = (shape.num_tokens,), (shape.num_outputs,)
    fields: _Fields = {
        "tokens": ("int32", tokens),
        "token_rows": ("int32", tokens),
        "positions": ("int32", tokens),
        "prompt_lengths": ("int32", tokens),
        "kv_pages": ("int32", tokens),
        "kv_offsets": ("int32", tokens),
        "out_index": ("int32", outputs),
        **dict.fromkeys(OUTPUT_ROWS, ("int32", outputs)),
    }
    if shape.blocks is None:
        fields |= _tile_fields(shape, max_pages)
    else:
        fields |= _block_fields(shape, shape.blocks, max_pages)
    if shape.lora:
        fields["out_slots"] = ("int32", outputs)
    fields |= dict.fromkeys(SAMPLING_FLOATS, ("float32", outputs))
    fields |= dict.fromkeys(("top_k", "num_alternatives"), ("int32", outputs))
    fields["seeds"] = ("uint32", (shape.num_outputs, 2))
    if shape.scores:
        fields |= dict.fromkeys(SCORE_FIELDS, ("int32", tokens))
    return fields


def _tile_fields(shape: StepShape, max_pages: int) -> _Fields:
    fields: _Fields = {"page_table": ("int32", (shape.num_tiles, max_pages))}
    if shape.lora:
        fields["slots"] = ("int32", (shape.num_tiles,))
    return fields


def _block_fields(shape: StepShape, blocks: BlockCounts, max_pages: int) -> _Fields:
    """The page table has a row per sequence of the step; blocks name rows and chunks."""
    fields: _Fields = {"page_table": ("int32", (shape.num_outputs, max_pages))}
    if shape.lora:
        fields |= dict.fromkeys(LORA_BLOCKS, ("int32", (blocks.lora,)))
    if blocks.queries:
        fields |= dict.fromkeys(QUERY_BLOCKS, ("int32", (blocks.queries,)))
    return fields


OUTPUT_ROWS = ("out_rows", "mask_rows", "bias_rows")  # the latter two: nobody's for no rule
LORA_BLOCKS = ("lora_first", "lora_count", "slots")
QUERY_BLOCKS = ("query_first", "query_count", "query_chunk", "query_position")
# Per token: what follows it, how many alternatives are asked for, its chunk, its adapter.
SCORE_FIELDS = ("score_targets", "score_alternatives", "score_chunks", "score_slots")
SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
LAST_TOKEN = -1  # in ``tokens``: the token that the row drew last, which is still on the device
NO_TARGET = -1  # in ``score_targets``: nobody asks what follows this token
PADDING = -1  # in ``positions``: this token is not one


class PackedLayout:
    """Where each of several arrays lies in one int32 vector that travels to the device."""

    def __init__(self, fields: _Fields) -> None:
        self.fields: dict[str, tuple[str, tuple[int, ...], int]] = {}
        offset = 0
        for name, (dtype, dims) in fields.items():
            self.fields[name] = (dtype, dims, offset)
            offset += math.prod(dims)
        self.size = offset

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views into a packed int32[size], each of its own dtype and shape."""
        return {
            name: packed[offset : offset + math.prod(dims)].view(dtype).reshape(dims)
            for name, (dtype, dims, offset) in self.fields.items()
        }


class StepLayout(PackedLayout):
    """Of the vector that describes a step."""

    def __init__(self, shape: StepShape, max_pages: int) -> None:
        super().__init__(_step_fields(shape, max_pages))
        self.shape = shape

    def blank(self, padding_row: int, base_slot: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A packed vector in which every token and output is padding, and its views."""
        packed = np.zeros(self.size, np.int32)
        views = self.views(packed)
        views["positions"][:] = PADDING
        for name in ("token_rows", *OUTPUT_ROWS):
            views[name][:] = padding_row
        if self.shape.lora:
            for name in ("slots", "out_slots"):
                views[name][:] = base_slot
        for name in ("top_p", "typical_p", "repetition_penalty"):
            views[name][:] = 1.0
        if self.shape.scores:
            views["score_targets"][:] = NO_TARGET
            views["score_chunks"][:] = self.shape.num_outputs
            views["score_slots"][:] = base_slot
        return packed, views


class WriteLayout(PackedLayout):
    """Of the vector that says where an adapter's buffer of ``num_units`` goes.

    The slot, its rows of the tables, and by pool: the buffer's unit where its pages begin, how many
    they are, and their ids, with NO_PAGE and smaller where the list is longer than the pages.
    """

    def __init__(self, bank: BankLayout, num_units: int) -> None:
        projections, pools = len(bank.projections), (len(bank.pools),)
        fields: _Fields = {
            "slot": ("int32", ()),
            "table": ("int32", (projections, 2, bank.table_width)),
            "num_pages": ("int32", (projections,)),
            "scaling": ("float32", (projections, bank.max_layers)),
            "first": ("int32", pools),
            "count": ("int32", pools),
        }
        for pool in bank.pools:
            most = min(bank.most_pages[pool], num_units // bank.page_units(pool))
            fields[pages_field(pool)] = ("int32", (most,))
        super().__init__(fields)
        self._pools = bank.pools

    def blank(self, slot: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A vector that gives ``slot`` nothing, and its views."""
        packed = np.zeros(self.size, np.int32)
        views = self.views(packed)
        views["slot"][...] = slot
        for pool in self._pools:
            ids = views[pages_field(pool)]
            ids[:] = NO_PAGE - np.arange(len(ids))  # no id twice: the device may rely on it
        return packed, views


def pages_field(pool: PoolKey) -> str:
    return f"pages_{pool.num_layers}x{pool.width}"
