"""Pages, pins and a sequence's state: the plain books under the policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlorax.scheduling.pages import PagePool
from jlorax.scheduling.pins import PinBook
from jlorax.types import FinishReason
from tests.scheduling.world import EOS, sequence, version

A, B, C = map(version, "ABC")


def test_pages_grow_to_the_token_and_never_hand_out_page_0() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    pages: list[int] = []
    assert pool.grow(pages, 4)
    assert len(pages) == 1
    assert pool.grow(pages, 5)
    assert len(pages) == 2
    assert 0 not in pages
    pool.check([pages])


def test_a_pool_that_is_short_gives_nothing() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    first: list[int] = []
    second: list[int] = []
    assert pool.grow(first, 8)
    assert not pool.grow(second, 5)
    assert second == []
    assert pool.num_free == 1
    pool.free(first)
    assert first == []
    assert pool.grow(second, 12)


def test_check_sees_a_page_held_twice() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    pages: list[int] = []
    pool.grow(pages, 4)
    with pytest.raises(AssertionError):
        pool.check([pages, pages])
    with pytest.raises(AssertionError):
        pool.check([])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20))))
def test_pages_are_free_or_held_once(operations: list[tuple[int, int]]) -> None:
    pool = PagePool(num_pages=7, page_size=3)
    held: list[list[int]] = [[], [], [], []]
    for who, num_tokens in operations:
        if num_tokens == 0:
            pool.free(held[who])
        else:
            before, fits = len(held[who]), pool.pages_for(num_tokens) - len(held[who])
            expected = fits <= pool.num_free
            assert pool.grow(held[who], num_tokens) is expected
            assert len(held[who]) == (before + max(0, fits) if expected else before)
        pool.check(held)


def test_the_first_wanted_are_acquired_in_order() -> None:
    book = PinBook(2)
    changes = book.update([B, A, B, C])
    assert changes.acquire == (B, A)
    assert book.update([B, A, C]).acquire == ()


def test_a_ready_pin_is_released_when_no_longer_wanted_and_makes_room() -> None:
    book = PinBook(1)
    book.update([A])
    book.ready(A, 5)
    assert book.slot(A) == 5
    changes = book.update([B])
    assert (changes.release, changes.acquire) == ((A,), (B,))
    assert book.slot(A) is None


def test_an_acquire_that_nobody_wants_any_more_is_released_once_ready() -> None:
    book = PinBook(2)
    book.update([A])
    assert book.update([]).release == ()  # no answer yet
    book.ready(A, 0)
    assert book.update([]).release == (A,)
    assert book.update([]).release == ()


def test_an_acquire_that_is_wanted_again_is_not_sent_twice() -> None:
    book = PinBook(2)
    book.update([A])
    book.update([])
    assert book.update([A]).acquire == ()


def test_an_acquire_that_failed_for_nobody_leaves_no_trace() -> None:
    book = PinBook(2)
    book.update([A])
    book.update([])
    book.failed(A)
    assert book.update([]).release == ()
    assert book.update([A]).acquire == (A,)


def test_a_sequence_ends_by_length_or_by_a_stop_token() -> None:
    seq = sequence(max_new_tokens=2)
    seq.accept(5)
    assert seq.finish_reason is None
    seq.accept(6)
    assert seq.finish_reason is FinishReason.LENGTH
    seq = sequence(max_new_tokens=2)
    seq.accept(EOS)
    assert seq.finish_reason is FinishReason.EOS_TOKEN
    assert seq.is_over


def test_what_is_in_flight_counts_towards_the_length() -> None:
    seq = sequence((1, 2, 3), max_new_tokens=2)
    seq.num_prefill = seq.num_computed = 3
    seq.num_in_flight = 1
    assert seq.can_decode
    seq.num_computed, seq.num_in_flight = 4, 2
    assert not seq.can_decode  # a planned stop launches no extra step
