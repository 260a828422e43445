"""The serving benchmark: load, figures and verdicts by hand, and quick runs of both targets."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks import (
    serving_adapters,
    serving_figures,
    serving_load,
    serving_metrics,
    serving_plots,
    serving_presets,
    serving_table,
)
from benchmarks.__main__ import main
from benchmarks.report import Bound
from benchmarks.serving_figures import Slo
from benchmarks.serving_load import Answer, Answers, Beside, Probe
from benchmarks.serving_presets import PRESETS, Promise
from benchmarks.serving_targets import AskFailed, UrlTarget, own_rss_bytes
from benchmarks.shapes import write_shape
from benchmarks.workload import Arrival, Workload
from jlorax.types import AdapterInfo, GenerateRequest, TokenEvent
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

# ---- a target that answers at once


class FakeTarget:
    """Adapters in ``failing`` raise, those in ``short`` stop a token early."""

    vocab_size = 100
    max_seq_len = 512

    def __init__(
        self, failing: Mapping[str, Exception] | None = None, short: frozenset[str] = frozenset()
    ) -> None:
        self.asked: list[str] = []
        self.prefetched: list[str] = []
        self.num_open = self.most_open = 0
        self._failing = failing or {}
        self._short = short

    async def tokens(
        self, adapter: str, tenant: str, prompt: tuple[int, ...], num_out: int
    ) -> AsyncIterator[None]:
        self.asked.append(adapter)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if adapter in self._failing:
                raise self._failing[adapter]
            for _ in range(num_out - (adapter in self._short)):
                await asyncio.sleep(0)
                yield
        finally:
            self.num_open -= 1

    async def prefetch(self, adapter: str) -> None:
        self.prefetched.append(adapter)
        if adapter in self._failing:
            raise self._failing[adapter]

    async def metrics(self) -> str:
        return ""

    async def rss_bytes(self) -> float | None:
        return 1e9


class TieredTarget(FakeTarget):
    """Two adapters on the device, six in RAM, all on disk once they were asked for; by age."""

    def __init__(self) -> None:
        super().__init__()
        self._device: OrderedDict[str, None] = OrderedDict()
        self._host: OrderedDict[str, None] = OrderedDict()
        self._disk: set[str] = set()
        self._uploaded_bytes = 0
        self._loads = {"source": 0, "disk": 0}

    async def tokens(
        self, adapter: str, tenant: str, prompt: tuple[int, ...], num_out: int
    ) -> AsyncIterator[None]:
        if adapter not in self._device:
            self._uploaded_bytes += 64
            if adapter not in self._host:
                self._loads["disk" if adapter in self._disk else "source"] += 1
        self._disk.add(adapter)
        for tier, room in ((self._device, 2), (self._host, 6)):
            tier[adapter] = None
            tier.move_to_end(adapter)
            if len(tier) > room:
                tier.popitem(last=False)
        yield

    async def metrics(self) -> str:
        loads = [f'jlorax_adapter_loads_total{{tier="{t}"}} {n}' for t, n in self._loads.items()]
        return "\n".join([f"jlorax_adapter_uploaded_bytes_total {self._uploaded_bytes}", *loads])


def name_of(number: int) -> str:
    return f"a{number}"


def arrival(at_s: float = 0.0, adapter: int = 0, tenant: str = "default", out: int = 3) -> Arrival:
    return Arrival(at_s, adapter, tenant, (1, 2), out)


# ---- the load


@in_loop
async def test_an_open_loop_counts_from_the_intended_arrival() -> None:
    arrivals = tuple(arrival(at_s, i) for i, at_s in enumerate((0.0, 0.001, 0.002, 0.02)))
    answers = await serving_load.run(FakeTarget(), Workload("", arrivals, None), name_of)
    starts = [answer.start_s for answer in answers.found]
    assert starts == [answers.start_s + a.at_s for a in arrivals]
    assert all(a.token_times_s[0] >= a.start_s for a in answers.found)
    assert [len(a.token_times_s) for a in answers.found] == [3] * 4


@in_loop
async def test_closed_requests_are_all_open_at_once_unless_there_is_a_limit() -> None:
    arrivals = tuple(arrival(adapter=i) for i in range(10))
    for limit, most in ((None, 10), (3, 3)):
        target = FakeTarget()
        answers = await serving_load.run(target, Workload("", arrivals, limit), name_of)
        assert target.most_open == most
        assert sorted(target.asked) == sorted(name_of(i) for i in range(10))
        assert len(answers.found) == 10


@in_loop
async def test_an_error_is_counted_by_its_code_and_stops_nobody() -> None:
    failing = {"a1": AskFailed("adapter_not_found"), "a2": ValueError("what is this")}
    target = FakeTarget(failing, short=frozenset({"a3"}))
    arrivals = tuple(arrival(adapter=i % 5) for i in range(10))
    count = Counter[str]()
    answers = await serving_load.run(
        target, Workload("", arrivals, None), name_of, lambda: count.update(["answered"])
    )
    figures = serving_figures.of_workload(answers, Slo(1e9, 1e9))
    assert figures["errors"] == {"adapter_not_found": 2, "ValueError": 2, "short answer": 2}
    assert (figures["num_errors"], figures["num_requests"]) == (6, 10)
    assert count["answered"] == 10


@in_loop
async def test_cold_loads_come_beside_a_steady_batch_and_each_is_new() -> None:
    target = FakeTarget({"a4": AskFailed("adapter_invalid")})
    steady = Workload("", tuple(arrival(adapter=i, out=50) for i in range(4)), None)
    beside = await serving_load.beside_loads(target, steady, name_of, 16, 2)
    count = Counter(target.asked)
    assert beside.num_visits["none"] == 0
    assert beside.num_visits["cold"] >= 2 <= beside.num_visits["resident"]
    assert all(count[name_of(i)] == 1 + 2 * 4 for i in (1, 2, 3))  # touched; rounds x kinds
    assert count["a0"] == 1 + 2 * 4 + beside.num_visits["resident"]
    cold = [name for name in count if int(name[1:]) >= 4]
    assert [count[name] for name in cold] == [1] * beside.num_visits["cold"]
    assert len(target.prefetched) == beside.num_visits["prefetched"] >= 2
    assert not set(cold) & set(target.prefetched)
    assert beside.num_cold_adapters_left == 12 - len(cold) - len(target.prefetched)
    assert beside.errors == ("adapter_invalid",)
    assert all(0 < len(beside.gaps_s[kind]) <= 2 * 4 * 49 for kind in serving_load.LOAD_KINDS)


@in_loop
async def test_first_tokens_are_told_apart_by_the_tier_that_served_them() -> None:
    workload = Workload("", tuple(arrival(adapter=i, out=1) for i in range(12)), 1)
    probes = await serving_load.first_tokens(TieredTarget(), workload, name_of)
    assert len(probes) == serving_load.num_probes(workload)
    tiers = [probe.tier for probe in probes]
    assert tiers[:12] == ["source"] * 12
    assert tiers[12:36] == ["disk", "device"] * 12
    assert tiers[36:] == ["host"] * 6


# ---- figures


def answered(start_s: float, times_s: list[float], **who: Any) -> Answer:
    return Answer(arrival(out=len(times_s), **who), start_s, times_s)


def test_figures_are_the_fields_own() -> None:
    answers = (
        answered(10.0, [10.1, 10.2, 10.4], adapter=1),
        answered(10.5, [10.8, 11.0], adapter=2, tenant="hog"),
        Answer(arrival(adapter=3), 10.0, [10.2], error="overloaded"),
    )
    figures = serving_figures.of_workload(Answers(9.0, answers), Slo(200, 160))
    assert figures["seconds"] == pytest.approx(2.0)
    assert figures["output_tokens_per_s"] == pytest.approx(5 / 2)
    assert figures["requests_per_s"] == pytest.approx(2 / 2)
    assert figures["goodput_per_s"] == pytest.approx(1 / 2)
    assert figures["distinct_adapters"] == 3
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)
    assert figures["ttft_ms"]["p99"] == pytest.approx(100 + 0.99 * 200)
    assert figures["itl_ms"]["mean"] == pytest.approx((100 + 200 + 200) / 3)
    assert figures["tpot_ms"]["mean"] == pytest.approx((150 + 200) / 2)
    assert figures["e2e_ms"]["p90"] == pytest.approx(400 + 0.9 * 100)
    assert figures["others_ttft_ms"]["mean"] == pytest.approx(100)
    assert figures["others_e2e_ms"]["mean"] == pytest.approx(400)


@pytest.mark.parametrize(
    ("ttft_ms", "itl_ms", "good"), [(99, 160, 0), (101, 149, 0), (101, 151, 1)]
)
def test_goodput_needs_both_the_first_token_and_the_rest_in_time(
    ttft_ms: float, itl_ms: float, good: float
) -> None:
    answers = Answers(9.4, (answered(10.0, [10.1, 10.2, 10.4]),))
    figures = serving_figures.of_workload(answers, Slo(ttft_ms, itl_ms))
    assert figures["goodput_per_s"] == pytest.approx(good)


def test_the_steady_rate_leaves_out_ramp_and_tail() -> None:
    ends = [5.0, *(6 + 0.1 * i for i in range(20)), 20.0]
    answers = Answers(0.0, tuple(answered(0.0, [end]) for end in ends))
    figures = serving_figures.of_workload(answers, Slo(1, 1))
    assert figures["steady_requests_per_s"] == pytest.approx(10)
    assert figures["requests_per_s"] == pytest.approx(22 / 20)


def test_a_run_without_a_whole_answer_has_no_rates() -> None:
    answers = Answers(0.0, (Answer(arrival(), 0.0, [], error="unavailable"),))
    figures = serving_figures.of_workload(answers, Slo(1, 1))
    assert figures["output_tokens_per_s"] is figures["ttft_ms"] is None
    assert serving_figures.figure(figures, "ttft_ms.p99") is None


def test_loads_are_held_against_the_batch_alone() -> None:
    gaps = {"none": [0.01] * 4, "prefetched": [], "resident": [0.011] * 4, "cold": [0.012] * 4}
    figures = serving_figures.of_loads(Beside(gaps, {"cold": 3}, ("overloaded",), 2))
    over_none = figures["itl_p99_over_none"]
    assert over_none.pop("prefetched") is None
    assert over_none == pytest.approx({"none": 1, "resident": 1.1, "cold": 1.2})
    assert figures["num_errors"] == 1


def test_a_tiers_first_token_is_told_above_a_resident_one() -> None:
    times = {"device": (0.010, 0.010, 0.011), "disk": (0.030, 0.034, 0.090)}
    probes = [Probe(tier, ttft_s, None) for tier, found in times.items() for ttft_s in found]
    figures = serving_figures.of_probes([*probes, Probe("device", None, "overloaded")])
    assert figures["above_resident_ms"]["disk"] == pytest.approx(24)
    assert figures["above_resident_ms"]["host"] is None
    assert figures["num_errors"] == 1


# ---- what a server says of itself

BEFORE = """
jlorax_adapter_tier_hits_total{tier="host"} 10
jlorax_adapter_tier_misses_total{tier="host"} 10
jlorax_adapter_uploaded_bytes_total 1000
jlorax_adapter_load_seconds_sum{tier="disk"} 1
jlorax_adapter_load_seconds_count{tier="disk"} 10
jlorax_adapter_load_seconds_bucket{tier="disk",le="0.1"} 0
jlorax_adapter_load_seconds_bucket{tier="disk",le="0.5"} 10
jlorax_adapter_load_seconds_bucket{tier="disk",le="+Inf"} 10
"""
AFTER = """
jlorax_adapter_tier_hits_total{tier="host"} 40
jlorax_adapter_tier_misses_total{tier="host"} 20
jlorax_adapter_tier_bytes{tier="host"} 77
jlorax_adapter_uploaded_bytes_total 5000
jlorax_adapter_load_seconds_sum{tier="disk"} 1.5
jlorax_adapter_load_seconds_count{tier="disk"} 20
jlorax_adapter_load_seconds_bucket{tier="disk",le="0.1"} 10
jlorax_adapter_load_seconds_bucket{tier="disk",le="0.5"} 20
jlorax_adapter_load_seconds_bucket{tier="disk",le="+Inf"} 20
"""


def test_tiers_are_differences_of_two_readings() -> None:
    figures: Any = serving_metrics.adapter_figures(
        serving_metrics.read(BEFORE), serving_metrics.read(AFTER)
    )
    host, disk = figures["tiers"]["host"], figures["tiers"]["disk"]
    assert (host["hits"], host["misses"], host["hit_rate"], host["bytes"]) == (30, 10, 0.75, 77)
    assert disk["loads"] == 10
    assert disk["swap_ms_mean"] == pytest.approx(50)
    assert disk["swap_ms_p99_at_most"] == pytest.approx(100)
    assert (figures["loads"], figures["uploaded_bytes"]) == (10, 4000)
    assert serving_metrics.came_from({}, {}) == "unknown"
    assert host["evictions"] is disk["hits"] is figures["tiers"]["host"]["loads"] is None


def test_the_slope_is_of_the_second_half_alone() -> None:
    times_s = [float(t) for t in range(0, 240, 10)]
    values = [t * 1e6 if t < 120 else 1e9 + (t - 175) / 60 * 1e7 for t in times_s]
    assert serving_metrics.slope_percent_per_min(times_s, values) == pytest.approx(1.0)
    assert serving_metrics.slope_percent_per_min([0.0], [1.0]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_own_process_takes_memory() -> None:
    assert (own_rss_bytes() or 0) > 10 * 2**20


# ---- presets, adapters, verdicts


def test_what_a_preset_needs_comes_before_it_and_engines_are_not_started_twice() -> None:
    names = [p.name for p in serving_presets.in_order(["open-64-bank8", "slora-s1-2000"])]
    assert names == ["open-64-bank8", "slora-s1-capacity", "slora-s1-5", "slora-s1-2000"]
    mixed = ["closed-1000-zipf-warm", "open-64", "closed-1000-uniform", "cold-64"]
    rooms = [preset.room for preset in serving_presets.in_order(mixed)]
    assert len(rooms) == 5
    assert sum(a != b for a, b in pairwise(rooms)) == 1


def test_the_closed_loads_are_measured_with_targets_of_the_issue() -> None:
    bounds = {
        (name, promise.figure): promise.bound
        for name in serving_presets.H100
        for promise in PRESETS[name].promises
    }
    assert bounds["closed-1000-zipf", "output_tokens_per_s"] == Bound(low=6300)
    assert bounds["open-64", "ttft_ms.p99"] == Bound(high=120)
    assert all(PRESETS[name].promises for name in serving_presets.H100)


def test_presets_have_their_own_adapters_unless_they_share() -> None:
    presets = serving_presets.in_order(["closed-1000-zipf-warm", "closed-1000-uniform", "slora-s1"])
    own = serving_adapters.numbers(presets)
    assert own["closed-1000-zipf"] == own["closed-1000-zipf-warm"] == range(1000)
    assert own["closed-1000-uniform"] == range(1000, 2000)
    assert own["slora-s1"] == range(2000)  # of another kind
    name = serving_adapters.name_of(presets[2], own["closed-1000-uniform"], None)
    assert name(3) == "r16-qkvo/adapter-1003"
    assert serving_adapters.name_of(presets[2], own["slora-s1"], "lora-")(3) == "lora-adapter-0003"


def test_adapters_are_made_once_and_again_when_they_do_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_adapters, "NUM_FILES", 2)
    model = write_shape("tiny", tmp_path / "tiny")
    said: list[str] = []
    few = [PRESETS["open-16-bank8"].quick()]
    more = [*few, PRESETS["cold-64"].quick()]
    for presets, seed in ((few, 0), (few, 0), (more, 0), (few, 0), (few, 1)):
        serving_adapters.prepare(tmp_path, model, presets, seed, said.append)
    counts = [12, 24, 12]
    assert said == [f"making {count} adapters, r16-qkvo" for count in counts]


def test_a_promise_may_be_about_another_presets_figure() -> None:
    results: dict[str, Any] = {
        "slora-s1-5": {"requests_per_s": 10.0},
        "slora-s1-2000": {"requests_per_s": 9.7},
        "open-64": {"ttft_ms": {"mean": 34.0, "p99": 121.0}},
    }
    presets = [PRESETS[name] for name in results]
    judged = serving_table.judge(presets, results, is_h100=True)
    assert [(j.preset, j.fields()["met"]) for j in judged] == [
        ("slora-s1-2000", False),
        ("open-64", True),
        ("open-64", False),
    ]
    assert judged[0].value == pytest.approx(0.97)
    assert [j.preset for j in serving_table.judge(presets, results, False)] == ["slora-s1-2000"]
    lines = serving_table.verdicts_text(judged).splitlines()
    assert lines[-1].split()[-4:] == ["<", "120", "missed", "3,490"]
    del results["slora-s1-5"]
    assert serving_table.judge(presets, results, True)[0].value is None


def test_what_was_not_measured_is_a_dash() -> None:
    results = {"a": {"num_requests": 3, "ttft_ms": {"mean": 1.5}}}
    assert serving_table.rates_text(results).splitlines()[1].split()[:3] == ["a", "3", "-"]
    assert serving_table.times_text(results).splitlines()[1].split() == ["a", "TTFT", "1.5", *"---"]
    promise = Promise("what", "no.such", Bound(low=1))
    assert serving_table.promised(promise, "a", results) is None


# ---- any server


class Everybody(dict[str, AdapterInfo]):
    def __contains__(self, name: object) -> bool:
        return name != "unknown"

    def get(self, name: Any, default: Any = None) -> Any:
        return adapter_info(name) if name in self else default


class AnsweringEngine(FakeEngine):
    """As many tokens as were asked for, from any adapter."""

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        script = ("x",) * (request.max_new_tokens or 1)
        answering = FakeEngine(script, registered=Everybody(), error=self.error, fail_at=1)
        async for event in answering._events(request):
            yield event


async def ask(url: str, adapter: str, num_out: int) -> int:
    async with aiohttp.ClientSession() as session:
        target = UrlTarget(session, url, 1000, 256)
        return len([None async for _ in target.tokens(adapter, "default", (5, 6, 7), num_out)])


@in_loop
async def test_a_url_streams_token_ids_and_counts_tokens() -> None:
    async with serving(AnsweringEngine()) as server:
        assert await ask(server.url, "r16/one", 5) == 5
        (seen,) = server.engine.seen
    assert (seen.prompt, seen.adapter_id, seen.max_new_tokens) == ((5, 6, 7), "r16/one", 5)
    assert seen.ignore_eos and seen.sampling.temperature == 0


@in_loop
async def test_an_event_more_than_tokens_asked_for_is_not_one() -> None:
    async with serving(FakeEngine(registered=Everybody())) as server:
        assert await ask(server.url, "one", 3) == 3


@in_loop
async def test_a_urls_errors_have_codes_before_the_stream_and_in_it() -> None:
    async with serving(AnsweringEngine()) as server:
        with pytest.raises(AskFailed, match="http 404"):
            await ask(server.url, "unknown", 5)
    async with serving(AnsweringEngine(error=AskFailed("broke"))) as server:  # type: ignore[arg-type]
        with pytest.raises(AskFailed, match="error in the stream"):
            await ask(server.url, "one", 5)
    with pytest.raises(AskFailed, match="ClientConnectorError"):
        await ask(server.url, "one", 5)


# ---- whole commands


def lines_of(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@in_loop
async def test_errors_are_shown_by_their_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(FakeEngine()) as server:  # knows no adapter
        where = ["--url", server.url, "--quick", "--out", str(tmp_path / "out")]
        assert await asyncio.to_thread(main, ["serving", "punica-identical", *where]) == 0
    assert "punica-identical: errors: http 404 16" in capsys.readouterr().out


@in_loop
async def test_a_quick_run_measures_any_url(tmp_path: Path) -> None:
    out, asked = (
        tmp_path / "out.jsonl",
        ["slora-s1-2000", "hog", "loads-20", "closed-1000-zipf-warm"],
    )
    async with serving(AnsweringEngine(registered=Everybody())) as server:
        where = ["--url", server.url, "--quick", "--out", str(out), "--model-prefix", "p-"]
        assert await asyncio.to_thread(main, ["serving", *asked, *where]) == 0
        seen = server.engine.seen
    results = {line["preset"]: line["figures"] for line in lines_of(out, "preset")}
    assert list(results) == [
        *("slora-s1-capacity", "slora-s1-5", "slora-s1-2000"),
        *("hog-without", "hog", "loads-20", "closed-1000-zipf", "closed-1000-zipf-warm"),
    ]
    assert not any(figures["num_errors"] for figures in results.values())
    names = {request.adapter_id for request in seen}
    assert all(name is not None and name.startswith("p-adapter-00") for name in names)
    summaries = {line["preset"]: line for line in lines_of(out, "summary")}
    assert set(summaries) == {"slora-s1-2000", "hog", "loads-20"}
    rates = [results[name]["requests_per_s"] for name in ("slora-s1-2000", "slora-s1-5")]
    assert summaries["slora-s1-2000"]["value"] == pytest.approx(rates[0] / rates[1])


@pytest.mark.slow
def test_a_quick_run_in_process_finds_the_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving_adapters, "NUM_FILES", 4)  # the others are links
    out = tmp_path / "out.jsonl"
    folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    small = ["--quick", "--set", "max_rank=16", "--commit", "abc"]
    assert main(["serving", "first-token", "open-16-bank8", *small, *folders]) == 0
    first, opened = (line["figures"] for line in lines_of(out, "preset"))
    probes = first["num_probes"]
    assert probes["source"] == 12  # every link is a version of its own
    assert probes["disk"] >= 8 <= probes["device"] and probes["host"] >= 2
    assert first["num_errors"] == opened["num_errors"] == 0
    assert opened["memory"]["rss_first_bytes"] > 0 < opened["itl_ms"]["p99"]
    assert [line["executables_compiled_after_ready"] for line in lines_of(out, "end")] == [0]
    (run,) = lines_of(out, "run")
    assert run["commit"] == "abc" and "jax" in run["versions"]
    assert lines_of(out, "card")[0]["card"] == "cpu"
    (start,) = lines_of(out, "start")
    assert start["settings"]["max_slots"] == "2" and str(tmp_path) not in json.dumps(start)
    assert "open-16-bank8 TTFT" in capsys.readouterr().out


def test_a_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answers = Answers(9.0, (answered(10.0, [10.1, 10.4]), answered(10.5, [10.8])))
    path = serving_plots.plot(tmp_path / "plots", "cold-64", answers)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    failed = Answers(9.0, (Answer(arrival(), 9.0, [], error="overloaded"),))
    assert serving_plots.plot(tmp_path, "cold-64", failed) is None


def test_plots_without_matplotlib_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="bench"):
        main(["serving", "cold-64", "--quick", "--plots", str(tmp_path), "--out", str(out)])
    assert not out.exists()


def test_a_spent_budget_starts_no_engine_and_still_shows_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    asked = ["serving", "cold-64", "--quick", "--budget-s", "0", "--out", str(out)]
    assert main(asked) == 0
    assert "out of time before an engine's start" in capsys.readouterr().out
    assert not lines_of(out, "start")


@pytest.mark.parametrize("asked", [["no-such"], ["cold-64", "--set", "no_such=1"]])
def test_what_is_unknown_is_refused_by_its_name(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"no.such"):
        main(["serving", *asked, "--out", str(tmp_path / "out")])


def test_a_load_follows_from_the_capacity_that_was_measured() -> None:
    preset = PRESETS["slora-s1-2000"]
    loaded = preset.with_load(0.9 * 30, 5.0)
    arrivals = loaded.recipe.workload(0, "x", 100, 4096).arrivals
    assert len(arrivals) == pytest.approx(27 * 5, rel=0.2)
    assert replace(loaded, recipe=preset.recipe) == preset
    closed = PRESETS["closed-1000-zipf"]
    assert closed.with_load(1.0, 1.0) == closed
