"""Masks and biases of rows: written where steps read them, heeded by every draw, nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlorax.device import sampling
from jlorax.device.executables import ExecutableStore
from jlorax.device.row_writer import RowWriter
from jlorax.device.sampling import Books
from jlorax.device.step import RowState, _is_plain, empty_rows, row_bytes
from jlorax.layout import RowWrites, mask_without, mask_words
from jlorax.types import MAX_LOGIT_BIASES
from tests.device.test_sampling import logits_of, rows_of

V = 333  # a mask's last word is half empty
MAX_BATCH = 40
IMPLEMENTATIONS = ("xla", "pallas_interpret")
GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 1.5}


def allowing(*tokens: int) -> np.ndarray:
    return ~mask_without(tokens, V)


@pytest.fixture(scope="module")
def writer() -> RowWriter:
    with ExecutableStore(None, "") as store:
        return RowWriter(empty_rows(MAX_BATCH, V), store)


@pytest.fixture
def rows() -> RowState:
    return empty_rows(MAX_BATCH, V)


def tokens_of(
    logits: np.ndarray,
    wish: dict[str, float],
    masks: np.ndarray,
    bias: np.ndarray | None = None,
    implementation: sampling.Implementation = "xla",
) -> sampling.Sampled:
    nothing = jnp.zeros(logits.shape, jnp.int32)
    bias = np.zeros(logits.shape, np.float32) if bias is None else bias
    books = Books(nothing > 0, nothing, jnp.asarray(masks), jnp.asarray(bias))
    many = rows_of(*[wish] * len(logits), seeds=list(range(len(logits))))
    sample = jax.jit(sampling.sample, static_argnames="implementation")
    return sample(jnp.asarray(logits), many, books, implementation=implementation)


# ---- what is drawn


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wish", [GREEDY, DRAWN, DRAWN | {"top_k": 3, "top_p": 0.9}])
def test_only_what_a_mask_allows_is_drawn(
    implementation: sampling.Implementation, wish: dict[str, float]
) -> None:
    random = np.random.default_rng(1)
    allowed = [random.choice(V, 5, replace=False) for _ in range(32)]
    allowed[0][:] = V - 1
    logits = logits_of(32, V)
    masks = np.array([allowing(*tokens) for tokens in allowed])
    got = np.asarray(tokens_of(logits, wish, masks, implementation=implementation).tokens)
    for token, tokens, line in zip(got, allowed, logits, strict=True):
        assert token in tokens
        if wish is GREEDY:
            assert token == max(tokens, key=lambda i, line=line: line[i])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_is_added_to_what_is_drawn_from_and_not_to_what_is_reported(
    implementation: sampling.Implementation,
) -> None:
    logits = logits_of(3, V)
    bias = np.zeros_like(logits)
    masks = np.full((3, mask_words(V)), -1, np.int32)
    bias[0, 7], bias[1, logits[1].argmax()] = 100.0, -100.0
    got = tokens_of(
        logits, GREEDY | {"num_alternatives": 2}, masks, bias, implementation=implementation
    )
    second = logits[1].argsort()[-2]
    assert np.asarray(got.tokens).tolist() == [7, second, logits[2].argmax()]
    raw = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(got.logprobs, raw[np.arange(3), got.tokens], atol=1e-5)
    np.testing.assert_array_equal(got.top_tokens[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_cannot_bring_back_what_a_mask_forbids(
    implementation: sampling.Implementation,
) -> None:
    logits = logits_of(1, V)
    bias = np.zeros_like(logits)
    bias[0, 7] = 100.0
    got = tokens_of(logits, GREEDY, allowing(8, 9)[None], bias, implementation=implementation)
    assert int(got.tokens[0]) in (8, 9)


def test_a_batch_of_greedy_rows_is_plain_unless_one_has_a_rule() -> None:
    parameters = rows_of(GREEDY, GREEDY, GREEDY)
    nobodys, own = jnp.full(3, MAX_BATCH), jnp.asarray([MAX_BATCH, 4, MAX_BATCH])
    assert _is_plain(parameters, (nobodys, nobodys), MAX_BATCH)
    assert not _is_plain(parameters, (own, nobodys), MAX_BATCH)
    assert not _is_plain(parameters, (nobodys, own), MAX_BATCH)


# ---- what is written


def state(rows: RowState) -> tuple[np.ndarray, np.ndarray]:
    return np.array(rows.masks), np.array(rows.bias)


def masks_for(rows: range) -> Iterator[tuple[int, np.ndarray]]:
    return ((row, allowing(row, V - 1)) for row in rows)


@pytest.mark.parametrize("written", [range(3, 4), range(32), range(1, 40)])
def test_masks_reach_their_rows_however_many_they_are(
    writer: RowWriter, rows: RowState, written: range
) -> None:
    masks, bias = state(writer.write(rows, RowWrites(masks=tuple(masks_for(written)))))
    for row in range(MAX_BATCH + 1):
        wanted = allowing(row, V - 1) if row in written else mask_without((), V)
        np.testing.assert_array_equal(masks[row], wanted)
    assert not bias.any()


def test_a_bias_replaces_what_the_row_had(writer: RowWriter, rows: RowState) -> None:
    full = tuple((token, token / 7) for token in range(MAX_LOGIT_BIASES))
    rows = writer.write(rows, RowWrites(biases=((2, full), (5, ((V - 1, -3.5),)))))
    rows = writer.write(rows, RowWrites(biases=((2, ((0, 1.25), (9, -100.0))),)))
    masks, bias = state(rows)
    wanted = np.zeros((MAX_BATCH + 1, V), np.float32)
    wanted[2, [0, 9]] = 1.25, -100.0
    wanted[5, V - 1] = -3.5
    np.testing.assert_array_equal(bias, wanted)
    assert (masks == -1).all()


def test_warming_up_and_an_empty_write_change_nothing(writer: RowWriter, rows: RowState) -> None:
    masks, bias = state(writer.write(writer.warm_up(rows), RowWrites()))
    assert (masks == -1).all()
    assert not bias.any()


def test_the_bytes_of_the_books_are_counted() -> None:
    assert row_bytes(MAX_BATCH, V) == sum(x.nbytes for x in empty_rows(MAX_BATCH, V))
