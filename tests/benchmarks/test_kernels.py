"""The kernels' benchmark on a fake op: who is timed, who is refused, and what is written."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks.__main__ import main
from benchmarks.kernels import table, timing
from benchmarks.kernels.protocol import Contestant
from benchmarks.kernels.results import HOST_BOUND, Result
from benchmarks.report import spread
from tests.benchmarks import fake_op


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.kernels.fake", fake_op)


def run(out: Path, *options: str) -> list[dict[str, Any]]:
    assert (
        main(["kernels", "--op", "missing", "fake", "--repeats", "3", "--out", str(out), *options])
        == 0
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_only_the_right_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(tmp_path / "out.jsonl", "--commit", "abc")
    by_name = {line["contestant"]: line for line in lines if line["case"] == "large"}
    assert {name for name, line in by_name.items() if line["us"]} == {"ours", "in place", "empty"}
    assert by_name["ours"]["error"] == 0.0
    assert by_name["inexact"]["error"] == pytest.approx(0.5)
    assert by_name["inexact"]["note"].startswith("wrong: off by 5.0e-01")
    assert by_name["not a number"]["note"].startswith("wrong: off by nan")
    assert "wanted is (16, 16)" in by_name["misshapen"]["note"]
    assert by_name["broken"]["note"] == "ValueError: tile is 0"
    unbuilt = [line for line in lines if line["case"] == "cannot be built"]
    assert [line["note"] for line in unbuilt] == ["MemoryError: no room for"]
    for line in lines:
        assert line["kind"] == "kernel" and line["commit"] == "abc" and line["card"]
        assert line["versions"]["jax"] and line["command"].startswith("python -m benchmarks")
    shown = capsys.readouterr().out
    assert "missing: ModuleNotFoundError" in shown
    assert shown.index("building") < shown.index("fake, us a call")


def test_a_sweep_prints_lines_for_tuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path / "out.jsonl", "--sweep")
    assert {line["kind"] for line in lines} == {"sweep"}
    shown = capsys.readouterr().out
    assert "# fake, small: floor 1.0 us, 2 timed, 1 not timed" in shown
    assert "\nTuning(tile=16),  # " in shown


def test_a_spent_budget_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out.jsonl", "--budget-s", "0") == []
    assert "fake: no time for 3 of 3 cases" in capsys.readouterr().out


def test_cases_are_chosen_by_a_part_of_their_name(tmp_path: Path) -> None:
    lines = run(tmp_path / "out.jsonl", "--case", "arg")
    assert {line["case"] for line in lines} == {"large"}


def test_an_argument_that_is_donated_must_come_back() -> None:
    x = jnp.ones((2, 3))
    lost = Contestant("lost", 1, lambda x: x.sum(), (x,), (0,))
    with pytest.raises(ValueError, match="donates argument 0"):
        timing.time_chain(lambda x: x.sum(), lost, timing.Plug(), 3)
    assert x.sum() == 6, "the case's own array is not the one that is donated"


def result(
    contestant: str, us: float | None, error: float | None = 0.004, note: str = ""
) -> Result:
    found = None if us is None else spread([us])
    return Result("op", "case", 5.4, 10.0, contestant, found, error, note)


def test_the_target_is_compared_without_the_empty_chain() -> None:
    results = [result("ours", 12.0), result("empty", 3.0, None), result("xla", None, 0.5, "wrong")]
    heading, row, _, note = table.op_table("op", results).splitlines()
    assert heading.split("  ")[-1].strip() == "ours/target"
    assert row.split() == ["case", "5.4", "10.0", "12.0", "4e-03", "3.0", "?", "wrong", "0.90"]
    assert note == "  xla: wrong [case]"


def test_a_host_bound_figure_is_marked() -> None:
    _, row = table.op_table("op", [result("ours", 12.0, note=HOST_BOUND)]).splitlines()
    assert "12.0h" in row


def test_the_command_has_its_options() -> None:
    parser = argparse.ArgumentParser()
    from benchmarks import kernels

    kernels.add_arguments(parser)
    assert parser.parse_args([]).op == kernels.OPS
