"""Rates, spreads, ratios, promises: by hand-made timings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import cpu_cases, report
from benchmarks.cpu_cases import BASE_8, DIFFERENT_8, LLAMA, ONE_1, OURS, PEFT
from benchmarks.report import RATES, Bound, JsonLines, Measurement, Measurements, Spread, spread

REQUEST, DECODE = RATES.values()


def timed(contestant: str, case: str, whole_s: float, number: int = 1) -> Measurement:
    """8 rows of 128 tokens; the first token after half a second."""
    return Measurement(contestant, case, number, 8, 128, 0.5, whole_s)


def test_rates_count_whole_requests_and_tokens_after_the_first() -> None:
    measured = timed(OURS, BASE_8, 4.5)
    assert REQUEST(measured) == pytest.approx(8 * 128 / 4.5)
    assert DECODE(measured) == pytest.approx(8 * 127 / 4.0)


def test_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert str(spread([3.0, 1.0, 2.0])) == "2.0 (1.0..3.0)"
    assert str(spread([2.0])) == "2.0"


def test_ratio_is_of_medians_and_absent_without_a_peer() -> None:
    ours = [timed(OURS, ONE_1, s, i) for i, s in enumerate((1.0, 2.0, 9.0))]
    measured = Measurements([*ours, timed(PEFT, ONE_1, 6.0)])
    assert measured.ratio(OURS, PEFT, ONE_1, REQUEST) == pytest.approx(3.0)
    assert measured.ratio(OURS, LLAMA, ONE_1, REQUEST) is None
    assert measured.cases == [ONE_1]
    assert measured.contestants == [OURS, PEFT]


def test_cost_of_adapters_is_time_added() -> None:
    measured = Measurements([timed(OURS, BASE_8, 5.0), timed(OURS, DIFFERENT_8, 6.0)])
    assert measured.extra_cost(OURS, DIFFERENT_8, BASE_8, REQUEST) == pytest.approx(0.2)


def test_bounds() -> None:
    assert Bound(low=2.4).holds(2.4)
    assert not Bound(low=2.4).holds(2.39)
    assert not Bound(high=90).holds(90)
    assert (str(Bound(low=0.85)), str(Bound(high=10))) == (">= 0.85", "< 10")


def test_verdicts_are_given_for_what_was_measured_only() -> None:
    measured = Measurements([timed(OURS, ONE_1, 1.0), timed(PEFT, ONE_1, 2.5)])
    found = {v.what: v for v in cpu_cases.verdicts(measured, {OURS: [95.0, 7.0, 11.0]})}
    assert [v.is_met for v in found.values()] == [True, False, False]
    assert [v.value for v in found.values()] == pytest.approx([2.5, 95.0, 11.0])


def test_agreement_ends_at_a_rows_first_difference() -> None:
    assert cpu_cases.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]) == 5 / 8


def test_another_contestant_begins_in_every_round() -> None:
    firsts = [next(cpu_cases.turns([OURS, PEFT, LLAMA], n))[1] for n in range(4)]
    assert firsts == [OURS, PEFT, LLAMA, OURS]
    turns = list(cpu_cases.turns([OURS, PEFT], 1))
    assert len(set(turns)) == len(turns) == 2 * len(cpu_cases.CASES)


def test_prompts_differ_by_row_and_follow_the_seed() -> None:
    rows = cpu_cases.prompts(0)
    assert len({tuple(row) for row in rows}) == cpu_cases.BATCH
    assert {len(row) for row in rows} == {cpu_cases.NUM_IN}
    assert rows == cpu_cases.prompts(0) != cpu_cases.prompts(1)


def test_the_table_shows_medians_and_ratios() -> None:
    measured = Measurements([timed(OURS, ONE_1, 2.0), timed(PEFT, ONE_1, 8.0)])
    table = report.rate_table("title", measured, OURS)
    report.add_figures(table, [("peak RSS, MiB", ["1", "2"])])
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in ("512.0", "128.0", "4.00", "jlorax / peft", "peak RSS, MiB"):
        assert expected in text


def test_json_lines_are_whole_after_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    with JsonLines(path, "now") as lines:
        lines.write("round", value=1)
        assert json.loads(path.read_text()) == {"kind": "round", "run": "now", "value": 1}
