"""A plan's arrays: what a token, a tile and an output of a padded shape say."""

from __future__ import annotations

import numpy as np

from jlorax.layout import LAST_TOKEN, PADDING, StepLayout, StepShape
from jlorax.scheduling.step_plan import Chunk, PlanBuilder, StepPlan, smallest
from jlorax.types import SamplingParams
from tests.scheduling.world import sequence, shapes

BASE_SLOT = 7
NUM_ROWS = 3


def builder() -> PlanBuilder:
    tables = np.array([[0, 0], [5, 6], [3, 0]], np.int32)
    return PlanBuilder(tables, page_size=4, base_slot=BASE_SLOT)


def views(plan: StepPlan) -> dict[str, np.ndarray]:
    return StepLayout(plan.shape, 2).views(plan.packed)


def test_decode_reads_the_last_token_from_the_device() -> None:
    first, second = sequence((1,) * 5), sequence((1, 2))
    first.row, second.row = 1, 2
    plan = builder().decode(
        StepShape(4, 1, 4, False), [Chunk(first, 5, 1, 0, True), Chunk(second, 2, 1, 1, True)]
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
        StepShape(16, 4, 4, True), [Chunk(long, 2, 5, 1, False), Chunk(short, 0, 2, 0, True)]
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
    v = views(builder().extend(StepShape(8, 4, 2, True), [Chunk(seq, 0, 2, 0, True)]))
    assert v["temperature"].tolist() == [0.5, 0.0]
    assert v["top_p"].tolist() == [0.25, 1.0]
    assert v["top_k"].tolist() == [3, 0]
    assert v["presence_penalty"].tolist() == [-1.5, 0.0]
    assert v["repetition_penalty"].tolist() == [1.0, 1.0]
    assert v["seeds"][0].tolist() == [0xFEDCBA98, 0x87654321]


def test_the_smallest_shape_that_holds_the_tokens_and_can_sample_if_asked() -> None:
    decode = tuple(s for s in shapes() if s.tile == 1)
    assert smallest(decode, 1, False) == StepShape(1, 1, 1, False)
    assert smallest(decode, 2, True) == StepShape(4, 1, 4, True)
    assert smallest(decode, 5, False) is None
