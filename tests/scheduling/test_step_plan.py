"""A plan's arrays: what a token, a tile and an output of a padded shape say."""

from __future__ import annotations

import numpy as np

from jlorax.layout import (
    LAST_TOKEN,
    NO_TARGET,
    PADDING,
    QUERY_BLOCK,
    BankLayout,
    LoraReach,
    StepLayout,
    StepShape,
    decode_shape,
    packed_extend_shape,
)
from jlorax.scheduling.step_plan import Chunk, PlanBuilder, StepPlan, smallest
from jlorax.types import Projection, SamplingParams
from tests.scheduling.world import VOCAB, sequence, shapes

BASE_SLOT = 7
NUM_ROWS = 3


def builder() -> PlanBuilder:
    tables = np.array([[0, 0], [5, 6], [3, 0]], np.int32)
    return PlanBuilder(tables, page_size=4, base_slot=BASE_SLOT, vocab_size=VOCAB)


def views(plan: StepPlan) -> dict[str, np.ndarray]:
    return StepLayout(plan.shape, 2).views(plan.packed)


def test_decode_reads_the_last_token_from_the_device() -> None:
    first, second = sequence((1,) * 5), sequence((1, 2))
    first.row, second.row = 1, 2
    plan = builder().decode(
        StepShape(4, 1, 4), [Chunk(first, 5, 1, 0, True), Chunk(second, 2, 1, 1, True)]
    )
    v = views(plan)
    assert v["tokens"].tolist() == [LAST_TOKEN, LAST_TOKEN, 0, 0]
    assert v["token_rows"].tolist() == [1, 2, NUM_ROWS, NUM_ROWS]
    assert v["positions"].tolist() == [5, 2, PADDING, PADDING]
    assert v["prompt_lengths"].tolist() == [5, 2, 0, 0]
    assert v["kv_pages"].tolist() == [6, 3, 0, 0]
    assert v["kv_offsets"].tolist() == [1, 2, 0, 0]
    assert v["page_table"].tolist() == [[5, 6], [3, 0], [0, 0], [0, 0]]
    assert v["slots"].tolist() == [0, 1, BASE_SLOT, BASE_SLOT]
    assert v["out_slots"].tolist() == [0, 1, BASE_SLOT, BASE_SLOT]
    assert v["out_rows"].tolist() == [1, 2, NUM_ROWS, NUM_ROWS]
    assert v["out_index"].tolist() == [0, 1, 2, 3]
    assert plan.outputs == (first, second)
    assert plan.num_tokens == 2


def test_chunks_of_an_extend_step_begin_at_tiles_and_final_ones_have_outputs() -> None:
    long, short = sequence(tuple(range(10, 18))), sequence((20, 21))
    long.row, short.row = 1, 2
    plan = builder().extend(
        StepShape(16, 4, 4), [Chunk(long, 2, 5, 1, False), Chunk(short, 0, 2, 0, True)]
    )
    v = views(plan)
    assert v["tokens"].tolist() == [12, 13, 14, 15, 16, 0, 0, 0, 20, 21, *[0] * 6]
    assert v["positions"].tolist() == [2, 3, 4, 5, 6, *[PADDING] * 3, 0, 1, *[PADDING] * 6]
    assert v["kv_pages"].tolist() == [5, 5, 6, 6, 6, 0, 0, 0, 3, 3, *[0] * 6]
    assert v["kv_offsets"].tolist() == [2, 3, 0, 1, 2, 0, 0, 0, 0, 1, *[0] * 6]
    assert v["slots"].tolist() == [1, 1, 0, BASE_SLOT]
    assert v["page_table"].tolist() == [[5, 6], [5, 6], [3, 0], [0, 0]]
    assert v["out_index"][0] == 9
    assert v["out_rows"].tolist() == [2, NUM_ROWS, NUM_ROWS, NUM_ROWS]
    assert v["out_slots"].tolist() == [0, BASE_SLOT, BASE_SLOT, BASE_SLOT]
    assert plan.outputs == (short,)
    assert plan.num_tokens == 7


def test_sampling_parameters_and_a_seed_of_64_bits() -> None:
    sampling = SamplingParams(temperature=0.5, top_k=3, top_p=0.25, presence_penalty=-1.5)
    seq = sequence((1, 2), sampling=sampling)
    seq.row, seq.seed = 1, (0xFEDCBA98 << 32) | 0x87654321
    v = views(builder().extend(StepShape(8, 4, 2), [Chunk(seq, 0, 2, 0, True)]))
    assert v["temperature"].tolist() == [0.5, 0.0]
    assert v["top_p"].tolist() == [0.25, 1.0]
    assert v["top_k"].tolist() == [3, 0]
    assert v["presence_penalty"].tolist() == [-1.5, 0.0]
    assert v["repetition_penalty"].tolist() == [1.0, 1.0]
    assert v["seeds"][0].tolist() == [0xFEDCBA98, 0x87654321]


def test_a_mass_too_small_for_a_device_is_not_taken_for_off() -> None:
    seq = sequence((1, 2), sampling=SamplingParams(temperature=1.0, top_p=1e-300, typical_p=1e-40))
    seq.row = 1
    v = views(builder().extend(StepShape(8, 4, 2), [Chunk(seq, 0, 2, 0, True)]))
    assert v["top_p"][0] == v["typical_p"][0] == np.finfo(np.float32).tiny


def test_the_smallest_shape_that_holds_the_tokens() -> None:
    decode = tuple(s for s in shapes() if s.tile == 1)
    assert smallest(decode, 1) == StepShape(1, 1, 1)
    assert smallest(decode, 2) == StepShape(4, 1, 4)
    assert smallest(decode, 5) is None


def blocks(v: dict[str, np.ndarray], *names: str) -> list[tuple[int, ...]]:
    """The blocks that are not empty."""
    columns = [v[name].tolist() for name in names]
    return [block for block in zip(*columns, strict=True) if block[1]]


LORA = ("lora_first", "lora_count", "slots")
QUERIES = ("query_first", "query_count", "query_chunk", "query_position")


def test_packed_decode_has_a_block_for_each_run_of_an_adapter() -> None:
    chunks = []
    for slot in [0] * 18 + [3] + [BASE_SLOT] * 2:
        seq = sequence((1, 2))
        seq.row = 1
        chunks.append(Chunk(seq, 2, 1, slot, True))
    shape = decode_shape(32, packed_slots=BASE_SLOT)
    v = views(builder().decode(shape, chunks))
    assert blocks(v, *LORA) == [(0, 16, 0), (16, 2, 0), (18, 1, 3)]
    assert v["page_table"][20].tolist() == [5, 6]
    assert v["out_slots"][18:22].tolist() == [3, BASE_SLOT, BASE_SLOT, BASE_SLOT]


def test_packed_chunks_lie_one_after_the_other() -> None:
    long, short, base = sequence(tuple(range(3, 203))), sequence((20, 21)), sequence((30,))
    tables = np.array([list(range(1, 51)), [60] + [0] * 49, [70] + [0] * 49], np.int32)
    long.row, short.row, base.row = 0, 1, 2
    chunks = [
        Chunk(long, 7, QUERY_BLOCK + 1, 1, False),
        Chunk(short, 0, 2, 1, True),
        Chunk(base, 0, 1, BASE_SLOT, True),
    ]
    shape = packed_extend_shape(256, num_chunks=4)
    plan = PlanBuilder(tables, page_size=4, base_slot=BASE_SLOT, vocab_size=VOCAB).extend(
        shape, chunks
    )
    v = StepLayout(shape, 50).views(plan.packed)
    end = QUERY_BLOCK + 1
    assert v["tokens"][end - 1 : end + 4].tolist() == [3 + 7 + QUERY_BLOCK, 20, 21, 30, 0]
    assert v["positions"][end : end + 4].tolist() == [0, 1, 0, PADDING]
    # the longest walk of a chunk comes first
    assert blocks(v, *QUERIES) == [
        (QUERY_BLOCK, 1, 0, 7 + QUERY_BLOCK),
        (0, QUERY_BLOCK, 0, 7),
        (end, 2, 1, 0),
        (end + 2, 1, 2, 0),
    ]
    assert blocks(v, *LORA) == [(0, 64, 1), (64, 64, 1), (128, 3, 1)]
    assert v["page_table"][:4, 0].tolist() == [1, 60, 70, 0]
    assert v["out_index"][:2].tolist() == [end + 1, end + 2]
    assert plan.outputs == (short, base)


def test_packed_shapes_have_room_for_the_most_blocks() -> None:
    """Every chunk may leave a block of its own half empty."""
    chunks = []
    for slot in range(8):
        seq = sequence((1,) * 40)
        seq.row = 1
        chunks.append(Chunk(seq, 0, 33 if slot else 256 - 7 * 33, slot, True))
    shape = packed_extend_shape(256, num_chunks=8)
    tables = np.zeros((3, 64), np.int32)
    plan = PlanBuilder(tables, page_size=4, base_slot=8, vocab_size=VOCAB).extend(shape, chunks)
    v = StepLayout(shape, 64).views(plan.packed)
    assert len(blocks(v, *QUERIES)) == len(blocks(v, *LORA)) == 8


def test_the_smallest_shape_reaches_as_far_as_the_adapters_do() -> None:
    each = tuple(decode_shape(8, reach, packed_slots=4) for reach in LoraReach)
    found = [smallest(each, 5, reach) for reach in LoraReach]
    assert found == list(each)
    assert smallest(each[:2], 5, LoraReach.ALL) is None
    extend = (packed_extend_shape(64, 2), packed_extend_shape(128, 8))
    assert smallest(extend, 60, num_sequences=3) == extend[1]


def test_reach_is_attention_only_when_nothing_else_is_targeted() -> None:
    projections = (
        Projection("q_proj", "model.layers.{layer}.self_attn.q_proj", 8, 8, 2),
        Projection("up_proj", "model.layers.{layer}.mlp.up_proj", 8, 8, 2),
        Projection("dense", "transformer.h.{layer}.self_attention.dense", 8, 8, 2),
        Projection("lm_head", "lm_head", 8, 16, 1),
    )
    layout = BankLayout(projections, "float32", 16)
    assert layout.reach(["q_proj", "dense"]) == LoraReach.ATTENTION
    assert layout.reach(["q_proj", "up_proj"]) == layout.reach(["lm_head"]) == LoraReach.ALL


def test_rules_name_their_rows_and_nobodys_otherwise() -> None:
    ruled = sequence((1,) * 5, logit_bias=((7, 1.0),), min_new_tokens=3)
    free, biased = sequence((1, 2)), sequence((1, 2), logit_bias=((8, -1.0),))
    ruled.row, free.row, biased.row = 1, 2, 0
    chunks = [Chunk(s, len(s.prompt), 1, BASE_SLOT, True) for s in (ruled, free, biased)]
    plan = builder().decode(StepShape(4, 1, 4), chunks)
    v = views(plan)
    assert v["mask_rows"].tolist() == [1, NUM_ROWS, NUM_ROWS, NUM_ROWS]
    assert v["bias_rows"].tolist() == [1, NUM_ROWS, 0, NUM_ROWS]
    assert [row for row, _ in plan.writes.masks] == [1]
    assert plan.writes.biases == ((1, ((7, 1.0),)), (0, ((8, -1.0),)))


def test_a_scoring_step_names_what_follows_each_token() -> None:
    asked = {"wants_prompt_logprobs": True, "num_alternatives": 2}
    long, end = sequence(tuple(range(10, 18)), **asked), sequence((20, 21), **asked)
    embedded = sequence((30, 31), wants_embedding=True)
    long.row, end.row, embedded.row = 1, 2, 0
    chunks = [
        Chunk(long, 2, 5, 1, False),
        Chunk(end, 0, 2, 0, True),
        Chunk(embedded, 0, 2, 3, True),
    ]
    plan = builder().extend(StepShape(16, 4, 4, scores=True), chunks)
    v = views(plan)
    none = NO_TARGET
    assert v["score_targets"].tolist() == [
        *(13, 14, 15, 16, 17, none, none, none),
        *(21, none, none, none),
        *[none] * 4,
    ]
    assert v["score_alternatives"].tolist() == [2] * 5 + [0] * 3 + [2, 2] + [0] * 6
    assert v["score_chunks"].tolist() == [0] * 5 + [4] * 3 + [1, 1, 4, 4] + [2, 2, 4, 4]
    b = BASE_SLOT
    assert v["score_slots"].tolist() == [1] * 5 + [b] * 3 + [0, 0, b, b] + [3, 3, b, b]
    assert plan.scored == tuple(zip(chunks, (0, 8, 12), strict=True))
