"""The step: one packed int32 vector in, the next tokens out; all else stays on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlorax.device import sampling
from jlorax.device.parts import in_parts
from jlorax.device.sampling import Books, SamplingRows
from jlorax.device.scores import StepScores, score
from jlorax.layout import (
    QUERY_BLOCKS,
    SAMPLING_FLOATS,
    BankLayout,
    PackedLayout,
    StepLayout,
    StepShape,
    mask_words,
)
from jlorax.models.causal import CausalModel
from jlorax.models.layers import Outputs, TokenBatch
from jlorax.models.lora import Bank, LoraBatch
from jlorax.models.weights import BaseModel
from pallas_kernels.grouped_lora.api import BLOCK_ROWS, Implementation, RowBlocks
from pallas_kernels.paged_attention.api import (
    Chunks,
    Decodes,
    Places,
    Queries,
    QueryBlocks,
    Tiles,
)

_ROWS_PER_PART = 8  # sampling keeps half a dozen arrays of [rows, V] alive at once


class RowState(NamedTuple):
    """What a sequence keeps on the device, by its row id; the row after the last is for padding,
    and for whoever has no mask or no bias: it allows all and favours nothing."""

    last_token: jax.Array  # i32[R + 1]
    seen: jax.Array  # bool[R + 1, V]: in prompt or answer
    counts: jax.Array  # i32[R + 1, V]: in the answer
    masks: jax.Array  # i32[R + 1, ceil(V / 32)]: what may be drawn, a bit a token
    bias: jax.Array  # f32[R + 1, V]: added to the logits


class StepOutput(NamedTuple):
    """Per output: the token, its raw log-probability, and the alternatives it asked for. Of a
    scoring step its scores too."""

    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B]
    top_tokens: jax.Array  # i32[B, 20]
    top_logprobs: jax.Array  # f32[B, 20]
    scores: StepScores | None = None


def empty_rows(max_batch: int, vocab_size: int) -> RowState:
    rows = max_batch + 1
    return RowState(
        last_token=jnp.zeros((rows,), jnp.int32),
        seen=jnp.zeros((rows, vocab_size), jnp.bool_),
        counts=jnp.zeros((rows, vocab_size), jnp.int32),
        masks=jnp.full((rows, mask_words(vocab_size)), -1, jnp.int32),
        bias=jnp.zeros((rows, vocab_size), jnp.float32),
    )


def row_bytes(max_batch: int, vocab_size: int) -> int:
    """Of ``empty_rows``."""
    rows = jax.eval_shape(lambda: empty_rows(max_batch, vocab_size))
    return sum(x.size * x.dtype.itemsize for x in rows)


Step = Callable[
    [list[jax.Array], list[jax.Array], RowState, Bank, jax.Array],
    tuple[list[jax.Array], RowState, StepOutput],
]


def make_step(
    model: BaseModel,
    bank_layout: BankLayout,
    layout: StepLayout,
    implementation: Implementation = "xla",
) -> Step:
    """The function of one executable; ``pools`` and ``rows`` are meant to be donated.

    (leaves, pools, rows, bank, packed i32[layout.size]) -> (pools, rows, output)
    ``implementation``: who computes; packed shapes are Pallas', tiled ones XLA's.
    """
    assert (layout.shape.blocks is None) == (implementation == "xla"), layout.shape

    def step(
        leaves: list[jax.Array],
        pools: list[jax.Array],
        rows: RowState,
        bank: Bank,
        packed: jax.Array,
    ) -> tuple[list[jax.Array], RowState, StepOutput]:
        module = model.merge(leaves)
        inputs = unpack(packed, layout)
        tokens = _tokens(inputs, rows)
        rows = _count(rows, inputs, tokens, may_begin=not layout.shape.is_decode)
        batch = TokenBatch(
            tokens=tokens,
            positions=inputs["positions"],
            rope_lengths=jnp.maximum(inputs["prompt_lengths"], inputs["positions"] + 1),
            places=Places(inputs["kv_pages"], inputs["kv_offsets"]),
            queries=_queries(inputs, layout.shape, implementation),
        )
        lora, head_lora = _adapters(bank, bank_layout, inputs, layout.shape, implementation)
        needs_all = layout.shape.is_decode or layout.shape.scores
        outputs = None if needs_all else Outputs(inputs["out_index"], head_lora)
        hidden, pools = module(batch, pools, lora, implementation, outputs)
        scores = None
        if layout.shape.scores:
            scores = _scores(module, hidden, bank, bank_layout, inputs, layout, implementation)
            hidden = hidden[inputs["out_index"]]
        logits = module.logits(hidden, head_lora)
        output = _choose(logits, inputs, rows, layout, implementation)._replace(scores=scores)
        last_token = rows.last_token.at[inputs["out_rows"]].set(output.tokens)
        return pools, rows._replace(last_token=last_token), output

    return step


def unpack(packed: jax.Array, layout: PackedLayout) -> dict[str, jax.Array]:
    """The arrays in the vector, each of its own dtype and shape."""
    inputs = {}
    for name, (dtype, dims, offset) in layout.fields.items():
        size = 1
        for dim in dims:
            size *= dim
        part = lax.slice(packed, (offset,), (offset + size,)).reshape(dims)
        inputs[name] = part if dtype == "int32" else lax.bitcast_convert_type(part, dtype)
    return inputs


def _queries(
    inputs: dict[str, jax.Array], shape: StepShape, implementation: Implementation
) -> Queries:
    table, positions = inputs["page_table"], inputs["positions"]
    if shape.blocks is None:
        return Tiles(table, positions.reshape(shape.num_tiles, -1))
    interpret = implementation == "pallas_interpret"
    if shape.is_decode:
        return Decodes(table, positions, interpret)
    return Chunks(table, QueryBlocks(*(inputs[name] for name in QUERY_BLOCKS)), interpret)


def _adapters(
    bank: Bank,
    layout: BankLayout,
    inputs: dict[str, jax.Array],
    shape: StepShape,
    implementation: Implementation,
) -> tuple[LoraBatch | None, LoraBatch | None]:
    """The layers' view of the bank, and the head's, whose rows are the outputs."""
    if not shape.lora:
        return None, None
    if shape.blocks is None:
        return (
            LoraBatch(bank, layout, inputs["slots"]),
            _row_by_row(bank, layout, inputs["out_slots"], shape, implementation),
        )
    blocks = RowBlocks(inputs["lora_first"], inputs["lora_count"])
    rows = shape.blocks.lora_rows
    lora = LoraBatch(bank, layout, inputs["slots"], shape.lora, blocks, rows, implementation)
    if shape.is_decode:
        return lora, lora
    return lora, _row_by_row(bank, layout, inputs["out_slots"], shape, implementation)


def _row_by_row(
    bank: Bank,
    layout: BankLayout,
    slots: jax.Array,
    shape: StepShape,
    implementation: Implementation,
) -> LoraBatch:
    """The view for rows of which each has an adapter of its own: slots i32[B]."""
    if shape.blocks is None:
        return LoraBatch(bank, layout, slots)
    base_slot = bank.num_pages.shape[0] - 1
    each = RowBlocks(
        jnp.arange(slots.shape[0], dtype=jnp.int32), (slots != base_slot).astype(jnp.int32)
    )
    return LoraBatch(bank, layout, slots, shape.lora, each, BLOCK_ROWS, implementation)


def _scores(
    module: CausalModel,
    hidden: jax.Array,
    bank: Bank,
    bank_layout: BankLayout,
    inputs: dict[str, jax.Array],
    layout: StepLayout,
    implementation: Implementation,
) -> StepScores:
    shape = layout.shape

    def head(hidden: jax.Array, slots: jax.Array) -> jax.Array:
        return module.logits(hidden, _row_by_row(bank, bank_layout, slots, shape, implementation))

    slots = inputs["score_slots"]
    return score(hidden, slots, inputs, shape.num_outputs, head, implementation)


def _tokens(inputs: dict[str, jax.Array], rows: RowState) -> jax.Array:
    """LAST_TOKEN stands for the row's newest token, which the host may not have read yet."""
    given = inputs["tokens"]
    return jnp.where(given < 0, rows.last_token[inputs["token_rows"]], given)


def _count(
    rows: RowState, inputs: dict[str, jax.Array], tokens: jax.Array, *, may_begin: bool
) -> RowState:
    """Enters the step's input tokens into their rows' books; position 0 opens a fresh page.

    ``may_begin`` False: no sequence begins in a decode step, so no whole book is rewritten.
    """
    row, position = inputs["token_rows"], inputs["positions"]
    seen, counts = rows.seen, rows.counts
    if may_begin:
        fresh = jnp.zeros((seen.shape[0],), jnp.bool_).at[row].max(position == 0)
        seen = seen & ~fresh[:, None]
        counts = jnp.where(fresh[:, None], 0, counts)
    is_answer = (position >= inputs["prompt_lengths"]).astype(jnp.int32)
    return rows._replace(
        seen=seen.at[row, tokens].set(True), counts=counts.at[row, tokens].add(is_answer)
    )


def _choose(
    logits: jax.Array,
    inputs: dict[str, jax.Array],
    rows: RowState,
    layout: StepLayout,
    implementation: Implementation,
) -> StepOutput:
    parameters = SamplingRows(
        **{name: inputs[name] for name in SAMPLING_FLOATS},
        top_k=inputs["top_k"],
        num_alternatives=inputs["num_alternatives"],
        seeds=inputs["seeds"],
        positions=inputs["positions"][inputs["out_index"]] + 1,
    )

    rules = inputs["mask_rows"], inputs["bias_rows"]

    def choose(part: tuple[jax.Array, SamplingRows, jax.Array, tuple[Any, Any]]) -> StepOutput:
        logits, parameters, row, (mask_row, bias_row) = part
        books = Books(rows.seen[row], rows.counts[row], rows.masks[mask_row], rows.bias[bias_row])
        return StepOutput(*sampling.sample(logits, parameters, books, implementation))

    whole = logits, parameters, inputs["out_rows"], rules
    if implementation != "xla":  # its kernel does for a row no more than the row asks for
        return choose(whole)
    return lax.cond(
        _is_plain(parameters, rules, nobodys_row=rows.last_token.shape[0] - 1),
        lambda: _greedy_output(logits),
        lambda: in_parts(choose, whole, logits.shape[0], _ROWS_PER_PART),
    )


def _is_plain(
    parameters: SamplingRows, rules: tuple[jax.Array, ...], nobodys_row: int
) -> jax.Array:
    """Whether every row wants the most probable token as it is, and nothing else."""
    altered = (
        (parameters.temperature > 0)
        | (parameters.repetition_penalty != 1)
        | (parameters.frequency_penalty != 0)
        | (parameters.presence_penalty != 0)
        | (parameters.num_alternatives > 0)
    )
    for rows in rules:
        altered |= rows != nobodys_row
    return ~jnp.any(altered)


def _greedy_output(logits: jax.Array) -> StepOutput:
    """In the shape of a sampling step's output; nobody asked for the alternatives."""
    dims = logits.shape[0], sampling.NUM_ALTERNATIVES
    nothing = jnp.zeros(dims, jnp.int32), jnp.zeros(dims, jnp.float32)
    return StepOutput(*sampling.greedy(logits), *nothing)


def step_arguments(
    model: BaseModel, pools: list[jax.Array], rows: RowState, bank: Bank, layout: StepLayout
) -> tuple[Any, ...]:
    """Shapes of a step's arguments, for compiling without running."""
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.leaves, pools, rows, bank)
    )
    return (*described, jax.ShapeDtypeStruct((layout.size,), jnp.int32))
