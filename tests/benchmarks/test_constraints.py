"""The benchmark of constraints: cases, figures and table by hand, and one quick run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import constraints_cases, constraints_table
from benchmarks.__main__ import main
from benchmarks.constraints_cases import Case, Gaps, Sample
from benchmarks.constraints_masks import MaskTimes, TimedCompiler, Upload
from benchmarks.constraints_table import Figure, Findings
from benchmarks.report import Bound, Spread
from jlorax.types import Constraint, ConstraintKind

NONE, HALF, ALL = Case(8, 0), Case(8, 4), Case(8, 8)


def every(gap_ms: float, num_tokens: int, first_s: float = 0.0) -> list[float]:
    return [first_s + 1e-3 * gap_ms * i for i in range(num_tokens)]


def gaps(ms: float) -> Gaps:
    return Gaps(ms, ms, ms)


def figures(findings: Findings) -> dict[tuple[str, str], Figure]:
    found = constraints_table.figures(findings, 8, hold=0.5)
    assert len({(f.what, f.unit) for f in found}) == len(found)
    return {(f.what, f.unit): f for f in found}


def test_a_batch_has_no_one_half_and_only_constrained_rows() -> None:
    cases = constraints_cases.mixes(8)
    assert [case.num_constrained for case in cases] == [0, 1, 4, 8]
    assert [sum(case.constrained) for case in cases] == [0, 1, 4, 8]
    assert {len(case.constrained) for case in cases} == {8}
    assert constraints_cases.mixes(1) == [Case(1, 0), Case(1, 1)]


def test_visitors_have_the_last_row() -> None:
    for case in constraints_cases.visited(8):
        assert case.constrained == (False,) * 7


def test_rows_that_draw_in_every_second_step_get_half_the_tokens() -> None:
    assert HALF.num_out(256, is_constrained=True) == 128
    assert HALF.num_out(256, is_constrained=False) == 256
    assert ALL.num_out(256, is_constrained=True) == 256


def test_schemas_differ_by_their_titles_alone() -> None:
    first, second = (json.loads(constraints_cases.schema(title).source) for title in "ab")
    assert (first.pop("title"), second.pop("title")) == ("a", "b")
    assert first == second


def test_figures_are_of_the_time_in_which_all_rows_decode() -> None:
    free = [every(5.0, 40)] * 4
    late = [every(10.0, 40, first_s=0.05)] * 4
    alone_again = [free[0] + every(1.0, 9, first_s=1.0)[1:], *free[1:]]
    sample = constraints_cases.sample(HALF, 0.5, 1, [*late, *alone_again], rows_a_step=6.0)
    assert sample.step_ms == pytest.approx(5.0)
    assert sample.free is not None and sample.free.p99_ms == pytest.approx(5.0)
    assert sample.constrained is not None
    assert sample.constrained.p50_ms == pytest.approx(10.0)


def test_without_free_rows_a_step_is_the_constrained_rows_gap() -> None:
    sample = constraints_cases.sample(ALL, 0.5, 1, [every(7.0, 40)] * 8, rows_a_step=8.0)
    assert sample.free is None
    assert sample.step_ms == pytest.approx(7.0)


def test_answers_that_do_not_overlap_are_refused() -> None:
    times_s = [every(5.0, 9)] * 7 + [every(5.0, 9, first_s=9.0)]
    with pytest.raises(ValueError, match="0 tokens while all decode"):
        constraints_cases.sample(NONE, 0.5, 1, times_s, rows_a_step=8.0)


def test_targets_are_in_steps_of_the_same_round() -> None:
    findings = Findings()
    for number, step_ms in enumerate((10.0, 20.0), 1):
        findings.samples += [
            Sample("0 of 8", 0.5, number, step_ms, gaps(step_ms), None, 8.0),
            Sample("4 of 8", 0.5, number, 1.04 * step_ms, gaps(1.04 * step_ms), gaps(30.0), 6.0),
            Sample("8 of 8", 0.5, number, 2.1 * step_ms, None, gaps(2.1 * step_ms), 8.0),
            Sample("4 of 8", 0.0, number, 99.0, gaps(99.0), gaps(99.0), 6.0),
        ]
    found = figures(findings)
    assert found["step, 4 of 8, over none", ""].found == Spread(1.04, 1.04, 1.04)
    assert not found["step, 4 of 8, over none", ""].is_missed
    assert found["step, 8 of 8, over none", ""].is_missed
    longer = "ITL p50, 4 of 8, constrained rows, longer than 0 of 8 by"
    assert found[longer, "ms"].found == Spread(15.0, 10.0, 20.0)
    assert found[longer, "steps"].found == Spread(1.25, 0.5, 2.0)
    assert found[longer, "steps"].is_missed
    assert not found["ITL p99, 4 of 8, free rows, longer than 0 of 8 by", "steps"].is_missed


def test_a_mask_is_held_against_a_step() -> None:
    upload = Upload(8, Spread(80.0, 70.0, 90.0), Spread(90.0, 80.0, 99.0))
    findings = Findings(
        samples=[Sample("0 of 8", 0.5, 1, 5.0, gaps(5.0), None, 8.0)],
        masks=MaskTimes(clock_s=[400e-6, 600e-6], processor_s=[90e-6, 90e-6]),
        upload=upload,
    )
    found = figures(findings)
    assert found["mask and upload of a token, by the clock", "steps"].found.median == (
        pytest.approx((500 + 10) / 5000)
    )
    assert found["mask and upload of a token, by the clock", "steps"].is_missed
    assert not found["mask and upload of a token, of a processor", "steps"].is_missed


def test_first_tokens_are_compared_one_by_one() -> None:
    firsts_ms = {"free": [1.0, 5.0], "kept": [2.0, 6.0], "new": [11.0, 25.0]}
    found = figures(Findings(firsts_ms=firsts_ms))
    assert found["first token, kept, later than free by", "ms"].found == Spread(1.0, 1.0, 1.0)
    assert found["first token, new, later than free by", "ms"].found == Spread(15.0, 10.0, 20.0)


def test_a_run_without_samples_has_an_empty_table() -> None:
    assert figures(Findings()) == {}
    assert constraints_table.cases_text([]).startswith("hold, case")


def test_a_missed_target_is_marked() -> None:
    missed = Figure("step", "ms", Spread(1.2, 1.1, 1.3), Bound(high=1.05))
    _, line = constraints_table.figures_text([missed]).splitlines()
    assert line.split() == ["step", "1.20", "ms", "1.10..1.30", "<", "1.05", "missed"]


class Steady:
    """A compiler, grammar and matcher in one, without an end."""

    is_finished = is_dead = is_slow = is_closed = False

    def compile(self, constraint: Constraint) -> Steady:
        return self

    def matcher(self) -> Steady:
        return self

    def accept(self, token_id: int) -> None: ...

    def mask(self) -> np.ndarray:
        return np.array([1], np.int32)

    def close(self) -> None:
        self.is_closed = True


def test_masks_are_timed_from_their_token_on() -> None:
    steady = Steady()
    timed = TimedCompiler(steady)
    matcher = timed.compile(Constraint(ConstraintKind.REGEX, "a")).matcher()
    np.testing.assert_array_equal(matcher.mask(), [1])
    assert timed.times.clock_s == []
    for token in range(3):
        matcher.accept(token)
        matcher.mask()
    assert len(timed.times.clock_s) == len(timed.times.processor_s) == 3
    assert min(timed.times.clock_s) > 0
    assert not (matcher.is_finished or matcher.is_dead or matcher.is_slow)
    timed.close()
    assert steady.is_closed


@pytest.mark.slow
def test_a_quick_run_measures_and_writes(
    tmp_path: Path, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "constraints.jsonl"
    shape = ["--shape", "tiny", "--dtype", "float32", "--tokenizer", str(smollm2_dir)]
    small = ["--batch", "2", "--rounds", "2", "--holds", "0", "0.5", "--page-size", "16"]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert main(["constraints", "--quick", *shape, *small, *folders]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rounds = [(line["case"], line["hold"]) for line in lines if line["kind"] == "round"]
    names = ["0 of 2", "1 of 2", "2 of 2", "visitors free", "visitors new"]
    assert rounds == [(name, hold) for hold in (0.0, 0.5) for name in names] * 2
    whats = {line["what"] for line in lines if line["kind"] == "summary"}
    assert {"step, 1 of 2, over none", "mask of a token, mean of a processor"} <= whats
    assert {"first token, kept, later than free by", "upload of 2 rows' masks"} <= whats
    assert [
        line["executables_compiled_after_ready"] for line in lines if line["kind"] == "end"
    ] == [0]
    assert "first token, new, later than free by" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.slow
def test_a_spent_budget_still_shows_a_table(
    tmp_path: Path, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--shape", "tiny", "--dtype", "float32", "--tokenizer", str(smollm2_dir)]
    small = ["--quick", "--batch", "1", "--page-size", "16", "--cases", "mix", "--budget-s", "0"]
    folders = ["--cache-dir", str(tmp_path), "--out", str(tmp_path / "constraints.jsonl")]
    assert main(["constraints", *shape, *small, *folders]) == 0
    assert "out of time before round 1, hold 0.5, 0 of 1" in capsys.readouterr().out
