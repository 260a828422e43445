"""How a bank is shared among its pools."""

from __future__ import annotations

import pytest

from benchmarks.shapes import SHAPES
from jlorax.adapters.placement import share_bank
from jlorax.layout import BankLayout
from jlorax.models.config import parse_config

GIB = 1 << 30
QV = {"q_proj": 16, "v_proj": 16}
LAYOUT = BankLayout(parse_config(dict(SHAPES["llama-2-7b"]), "test").projections(), "bfloat16", 64)
EVERYTHING = {p.name: 64 for p in LAYOUT.projections}


@pytest.mark.parametrize("known", [[], [QV], [QV, EVERYTHING]], ids=["none", "q, v", "mixed"])
def test_the_largest_adapter_fits_whatever_was_known_at_the_start(
    known: list[dict[str, int]],
) -> None:
    for bank_bytes in (1, 2 * GIB):
        pages = share_bank(LAYOUT, bank_bytes, known)
        need = LAYOUT.pages_needed(EVERYTHING)
        assert all(pages[pool] - 1 >= count for pool, count in need.items())


@pytest.mark.parametrize("known", [[], [QV], [QV] * 3 + [EVERYTHING]])
def test_the_bank_takes_what_it_may(known: list[dict[str, int]]) -> None:
    pages = share_bank(LAYOUT, 4 * GIB, known)
    taken = sum(LAYOUT.page_bytes(pool) * count for pool, count in pages.items())
    most = sum(LAYOUT.page_bytes(pool) * count for pool, count in LAYOUT.most_pages.items())
    assert 4 * GIB * 0.99 < taken < 4 * GIB + most


def test_one_more_of_the_same_kind_changes_no_pool() -> None:
    mixed = [QV] * 10 + [dict.fromkeys(EVERYTHING, 16)] * 3
    assert share_bank(LAYOUT, GIB, mixed) == share_bank(LAYOUT, GIB, [*mixed, QV])


def test_memory_goes_where_adapters_are() -> None:
    pages = share_bank(LAYOUT, 4 * GIB, [QV])
    need = LAYOUT.pages_needed(QV)
    assert min((pages[pool] - 1) // count for pool, count in need.items()) >= 255
