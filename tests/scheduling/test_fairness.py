"""Shares: the counters, and that a tenant or an adapter that asks for much delays nobody else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from jlorax.config import SchedulerConfig
from jlorax.errors import ConfigError
from jlorax.scheduling.fairness import FairShares, VirtualTokens
from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from tests.scheduling.load import Load, closed_load, load_config, request, zipf
from tests.scheduling.world import World, config, sequence, version


def test_who_was_idle_is_lifted_to_the_least_of_the_active() -> None:
    counters: VirtualTokens[str] = VirtualTokens()
    counters.enter("a")
    counters.enter("b")
    counters.charge("a", 10)
    counters.charge("b", 30)
    counters.enter("c")
    assert counters["c"] == 10


def test_a_debt_is_kept_until_the_others_have_reached_it() -> None:
    counters: VirtualTokens[str] = VirtualTokens()
    counters.enter("a")
    counters.enter("b")
    counters.charge("a", 10)
    counters.leave("a")
    counters.enter("a")
    assert counters["a"] == 10
    counters.leave("a")
    counters.charge("b", 20)
    counters.enter("c")
    assert counters["c"] == 20
    counters.leave("c")
    assert len(counters) == 1  # b's alone: it has reached them all
    counters.leave("b")
    assert len(counters) == 0


def test_a_weight_divides_the_charge() -> None:
    shares = FairShares({"gold": 2.0})
    shares.enter("gold", None)
    shares.charge("gold", None, 10)
    assert shares.tenants["gold"] == 5
    assert shares.adapters("gold")[None] == 10


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_is_positive(weight: float) -> None:
    with pytest.raises(ConfigError, match="'gold'"):
        SchedulerConfig(tenant_weights=(("gold", weight),))


def test_prompts_are_charged_when_admitted_and_answers_as_they_come() -> None:
    w = World(Policy(config()))
    seq = w.add(sequence((1, 2, 3), 3))
    seq.stop_token_ids = frozenset()
    w.launch()
    assert w.policy.shares.tenants["default"] == 3
    w.read()
    assert w.policy.shares.tenants["default"] == 3 + 2


def test_one_tenant_with_one_adapter_is_served_in_order() -> None:
    w = World(Policy(config(max_batch=2, num_pages=40)))
    seqs = [w.add(sequence((1, 2), 3, version("A"))) for _ in range(7)]
    starts: list[Sequence] = []
    while not w.policy.is_idle:
        w.grant()
        w.launch()
        starts += [s for s in w.policy.running if s not in starts]
        if w.in_flight:
            w.read()
    assert starts == seqs


@pytest.mark.parametrize("weights", [{}, {"x": 2.0}])
def test_tenants_are_served_by_their_weights(weights: dict[str, float]) -> None:
    w = World(Policy(config(max_batch=1, num_pages=40, tenant_weights=weights)))
    for tenant in "xy":
        for _ in range(30):
            seq = sequence((1, 2), 3)
            seq.tenant, seq.stop_token_ids = tenant, frozenset()
            w.add(seq)
    while len(w.over) < 30:
        if w.launch() is None:
            w.read()
    served = sum(seq.tenant == "x" for seq in w.over)
    assert served == (20 if weights else 15)


def p99_queueing_s(name: Callable[[int], tuple[str, str]], num_hog: int) -> float:
    """Of nine who keep 12 requests each in a server of 64 rows, beside one who keeps num_hog."""
    rng = np.random.default_rng(3)
    load = Load(Policy(load_config(max_batch=64, num_slots=16)))
    who: dict[int, int] = {}

    def new(i: int) -> Sequence:
        tenant, adapter = name(i)
        seq = request(rng, adapter, tenant, mean_new=32)
        who[id(seq)] = i
        return seq

    arrivals = [new(i) for i in range(1, 10) for _ in range(12)] + [new(0) for _ in range(num_hog)]
    for _ in range(1000):
        over = load.step(arrivals)
        arrivals = [new(who[id(seq)]) for seq in over]
    late = load.admitted[len(load.admitted) // 4 :]
    return float(np.percentile([load.queueing_s(s) for s in late if who[id(s)]], 99))


@pytest.mark.parametrize(
    "name",
    [lambda i: (f"t{i}", f"a{i}"), lambda i: ("default", f"a{i}")],
    ids=["tenant", "adapter"],
)
def test_a_hog_delays_nobody_else_much(name: Callable[[int], tuple[str, str]]) -> None:
    alone, beside_hog = p99_queueing_s(name, 0), p99_queueing_s(name, 240)
    assert beside_hog <= 1.5 * alone, (alone, beside_hog)


def p99_latency_s(offered: float, *, with_hog: bool) -> float:
    """Of nine who ask at Poisson times for 60 s, beside one who asks 20 times as often as each.

    ``offered`` by all ten, in parts of what the server's 8 rows can do: 10 requests/s.
    """
    load = Load(Policy(load_config(max_batch=8, num_slots=64)))
    each = 10 * offered / 29
    arrivals = [
        (float(at_s), i)
        for i in range(10)
        if i or with_hog
        for at_s in np.cumsum(
            np.random.default_rng(i).exponential(1 / each / (1 if i else 20), 2000)
        )
        if at_s < 60
    ]
    coming = iter(sorted(arrivals))
    at_s, i = next(coming)
    lengths, others, found = np.random.default_rng(3), set(), []
    while at_s < np.inf:
        now = []
        while at_s <= load.now_s:
            now.append(request(lengths, f"a{i}", f"t{i}"))
            others |= {id(now[-1])} if i else set()
            at_s, i = next(coming, (np.inf, 0))
        found += [load.now_s - seq.arrival_s for seq in load.step(now) if id(seq) in others]
    return float(np.percentile(found, 99))


@pytest.mark.parametrize("offered", [1.5, 2.0])
def test_a_hog_that_fills_every_row_delays_nobody_else_much(offered: float) -> None:
    alone, beside_hog = (p99_latency_s(offered, with_hog=hog) for hog in (False, True))
    assert beside_hog <= 1.5 * alone, (alone, beside_hog)


@pytest.mark.parametrize("is_uniform", [False, True])
def test_many_adapters_for_few_slots_leave_the_rows_busy(is_uniform: bool) -> None:
    rng = np.random.default_rng(1)
    uniform = [f"a{i}" for i in rng.integers(0, 500, 20_000)]
    names = uniform if is_uniform else zipf(rng, 1000, 20_000)
    load = Load(Policy(load_config(max_batch=256, num_slots=128)))
    taken = closed_load(load, names, 1280 if is_uniform else 512, 500)
    assert np.mean(taken[100:]) >= 0.95 * 256
