"""Workloads: each distribution against its own formula, and the same again for the same seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.serving_presets import PRESETS
from benchmarks.workload import (
    HOG,
    Closed,
    Distinct,
    Fixed,
    Gamma,
    Groups,
    Hog,
    Identical,
    Lengths,
    PerAdapter,
    Popularity,
    PowerLaw,
    PunicaLengths,
    Recipe,
    ShareGptLike,
    Uniform,
    UniformLengths,
    Zipf,
    dealt_rates,
)

MANY = 100_000


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(popularity: Popularity, num: int, num_adapters: int) -> np.ndarray:
    return popularity.adapters(draw(), num, num_adapters)


def lengths_of(lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
    return lengths.draw(draw(), MANY)


@pytest.mark.parametrize(
    ("num_adapters", "shares"),
    [(1000, {8: 0.36, 64: 0.63, 256: 0.82}), (5000, {8: 0.30, 64: 0.52, 256: 0.67})],
)
def test_zipf_gives_the_top_adapters_their_known_shares(
    num_adapters: int, shares: dict[int, float]
) -> None:
    adapters = drawn(Zipf(1.0), MANY, num_adapters)
    for top, share in shares.items():
        assert (adapters < top).mean() == pytest.approx(share, abs=0.01)
    counts = np.bincount(drawn(Zipf(0.8), MANY, num_adapters))
    assert counts[0] / counts[1] == pytest.approx(2**0.8, rel=0.1)


def test_512_requests_use_as_many_of_1000_adapters_as_the_reference_says() -> None:
    assert len(set(drawn(Zipf(1.0), 512, 1000))) == pytest.approx(216, abs=12)
    assert len(set(drawn(Uniform(), 512, 1000))) == pytest.approx(394, abs=12)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_power_law_gives_the_first_k_of_n_a_share_of_k_over_n_to_alpha(alpha: float) -> None:
    adapters = drawn(PowerLaw(alpha), MANY, 200)
    assert 0 <= adapters.min() <= adapters.max() < 200
    for k in (20, 100):
        assert (adapters < k).mean() == pytest.approx((k / 200) ** alpha, abs=0.01)


def test_groups_grow_by_half_and_come_mixed() -> None:
    adapters = drawn(Groups(1.5), 1000, 16)
    counts = Counter(adapters.tolist())
    assert [counts[i] for i in range(8)] == [1, 1, 2, 3, 5, 7, 11, 17]
    assert len(adapters) == 1000 and len(counts) == 16
    assert np.abs(np.diff(adapters)).max() > 1 and (np.diff(adapters) < 0).any()


def test_identical_is_one_and_distinct_goes_round() -> None:
    assert set(drawn(Identical(), 9, 4)) == {0}
    assert drawn(Distinct(), 6, 4).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gamma_gaps_have_their_mean_and_variation(cv: float) -> None:
    times = [v.at_s for v in Gamma(50.0, 400.0, cv).visits(draw(), 1)]
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert (gaps >= 0).all() and times[-1] < 400


def test_rates_are_dealt_in_turn_and_then_shuffled() -> None:
    rates = dealt_rates(draw(), (0.1, 0.05, 0.025), 64)
    assert Counter(rates.tolist()) == {0.1: 22, 0.05: 21, 0.025: 21}
    assert rates.tolist() != sorted(rates.tolist(), reverse=True)
    assert rates[:6].tolist() != [0.1, 0.05, 0.025] * 2


def test_each_adapter_keeps_its_own_rate_and_all_sum_to_the_load() -> None:
    traffic = PerAdapter(40.0, 500.0, (4.0, 1.0))
    visits = traffic.visits(draw(), 4)
    counts = sorted(Counter(v.adapter for v in visits).values())
    assert len(visits) == pytest.approx(40 * 500, rel=0.03)
    assert counts == pytest.approx([2000, 2000, 8000, 8000], rel=0.1)
    assert [v.at_s for v in visits] == sorted(v.at_s for v in visits)


def test_the_hog_offers_twenty_times_each_and_leaves_the_others_as_they_are() -> None:
    traffic = Hog(290.0, 100.0)
    visits = traffic.visits(draw(), 1)
    counts = Counter(v.tenant for v in visits)
    hog = counts.pop(HOG)
    assert len(counts) == 9 and min(counts.values()) == pytest.approx(1000, rel=0.12)
    assert hog == pytest.approx(20_000, rel=0.03)
    alone = replace(traffic, with_hog=False).visits(draw(), 1)
    assert alone == [v for v in visits if v.tenant != HOG]


def test_lengths_have_their_means_and_limits() -> None:
    ins, outs = lengths_of(ShareGptLike())
    assert (ins.mean(), outs.mean()) == pytest.approx((222, 196), rel=0.02)
    assert min(ins.min(), outs.min()) >= 1 and max(ins.max(), outs.max()) == 1000
    ins, outs = lengths_of(UniformLengths(8, 512))
    assert (ins.min(), ins.max(), outs.min(), outs.max()) == (8, 511, 8, 511)
    ins, outs = lengths_of(PunicaLengths())
    assert np.median(ins) == pytest.approx(17, abs=1)
    assert (ins + outs).mean() == pytest.approx(1024, rel=0.03)
    ins, outs = lengths_of(Fixed(256, 128))
    assert set(ins) == {256} and set(outs) == {128}


RECIPE = Recipe(Gamma(20.0, 5.0), Zipf(1.0), UniformLengths(), 100)


def test_a_seed_makes_the_same_again_and_another_does_not() -> None:
    assert RECIPE.workload(1, "a", 1000, 4096) == RECIPE.workload(1, "a", 1000, 4096)
    assert RECIPE.workload(1, "a", 1000, 4096) != RECIPE.workload(2, "a", 1000, 4096)


def test_another_name_has_other_prompts_and_nothing_else() -> None:
    one, other = (RECIPE.workload(1, name, 1000, 4096).arrivals for name in "ab")
    assert all(a.prompt != b.prompt for a, b in zip(one, other, strict=True))
    assert [replace(a, prompt=()) for a in one] == [replace(b, prompt=()) for b in other]


def test_more_adapters_change_neither_times_nor_lengths() -> None:
    few = replace(RECIPE, num_adapters=5).workload(1, "a", 1000, 4096).arrivals
    many = RECIPE.workload(1, "a", 1000, 4096).arrivals
    assert [replace(a, adapter=0) for a in few] == [replace(a, adapter=0) for a in many]
    assert max(a.adapter for a in few) < 5 < max(a.adapter for a in many)


def test_prompt_and_answer_fit_the_context_and_special_tokens_are_left_out() -> None:
    arrivals = RECIPE.workload(0, "a", 1000, 64).arrivals
    assert all(1 <= len(a.prompt) <= 63 for a in arrivals)
    assert all(a.num_out >= 1 and len(a.prompt) + a.num_out <= 64 for a in arrivals)
    tokens = {token for a in arrivals for token in a.prompt}
    assert min(tokens) >= 10 and max(tokens) < 1000


def test_closed_requests_come_at_once() -> None:
    closed = replace(RECIPE, traffic=Closed(7, max_at_once=2)).workload(0, "a", 1000, 64)
    assert [a.at_s for a in closed.arrivals] == [0.0] * 7
    assert closed.max_at_once == 2
    assert RECIPE.workload(0, "a", 1000, 64).max_at_once is None


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_one_line_and_small_when_quick(name: str) -> None:
    preset = PRESETS[name]
    assert "\n" not in preset.recipe.describe()
    quick = preset.quick().recipe.workload(0, name, 256, 512)
    assert "\n" not in quick.description
    assert 0 < len(quick.arrivals) <= 24
    assert max(a.adapter for a in quick.arrivals) < 12
    assert max(len(a.prompt) + a.num_out for a in quick.arrivals) <= 64
    assert all(a.at_s < 1 for a in quick.arrivals)
