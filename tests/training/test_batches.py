"""Packing and batching: nothing is lost, nothing overlaps, every target is the next token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlorax.training.batches import Batch, Batches, packed
from jlorax.training.examples import Example

SEQ_LEN = 16
LENGTHS = st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=30)


def examples(lengths: list[int]) -> list[Example]:
    """Every token is unlike every other; all but the first are learnt."""
    made, first = [], 1
    for number, length in enumerate(lengths, 1):
        ids = np.arange(first, first + length, dtype=np.int32)
        made.append(Example(ids, np.arange(length) > 0, number))
        first += length
    return made


def batches(lengths: list[int], *, packing: bool, seed: int = 0) -> Batches:
    return Batches(examples(lengths), seq_len=SEQ_LEN, batch_size=3, packing=packing, seed=seed)


@given(LENGTHS)
def test_every_example_has_one_place_in_a_row_that_holds_it(lengths: list[int]) -> None:
    rows = packed(lengths, SEQ_LEN)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= SEQ_LEN for row in rows)
    for first in range(len(rows)):  # no two rows that would have fitted into one
        for second in range(first):
            both = sum(lengths[i] for i in (*rows[first], *rows[second]))
            assert both > SEQ_LEN or len(rows[first]) > 1 or len(rows[second]) > 1


@settings(deadline=None)
@given(LENGTHS, st.booleans(), st.integers(0, 3))
def test_an_epoch_holds_every_token_once(lengths: list[int], packing: bool, epoch: int) -> None:
    source = batches(lengths, packing=packing)
    made = list(source.epoch(epoch))
    assert len(made) == source.num_batches
    tokens = np.concatenate([b.tokens[b.segments > 0] for b in made])
    assert sorted(tokens.tolist()) == list(range(1, sum(lengths) + 1))
    for batch in made:
        check_targets(batch)
        assert batch.num_targets <= source.max_targets()
        assert batch.tokens.shape[0] == 3


def check_targets(batch: Batch) -> None:
    for row in range(batch.tokens.shape[0]):
        for place in range(batch.tokens.shape[1] - 1):
            follows = batch.segments[row, place] == batch.segments[row, place + 1] > 0
            expected = batch.tokens[row, place + 1] if follows else -1
            assert batch.targets[row, place] == expected
            if follows:
                assert batch.positions[row, place + 1] == batch.positions[row, place] + 1
        assert batch.targets[row, -1] == -1


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_is_entered_anywhere(packing: bool) -> None:
    source = batches([5, 7, 3, 9, 16, 2, 8, 4, 11], packing=packing)
    whole = list(source.epoch(2))
    for start in range(source.num_batches):
        for one, other in zip(source.epoch(2, start=start), whole[start:], strict=True):
            assert (one.tokens == other.tokens).all()


def test_the_order_follows_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        source = batches([4] * 30, packing=False, seed=seed)
        return [number for batch in source.epoch(epoch) for number in batch.examples]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


def test_unpacked_batches_have_few_lengths() -> None:
    source = Batches(
        examples(list(range(2, 300))), seq_len=512, batch_size=1, packing=False, seed=0
    )
    assert {batch.tokens.shape[1] for batch in source.epoch(0)} == {64, 128, 256, 512}
