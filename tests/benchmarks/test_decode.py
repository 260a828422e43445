"""The whole engine's benchmark: cases, figures and table by hand, and one quick run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decode_cases, decode_table, h100_peers
from benchmarks.__main__ import main
from benchmarks.decode_cases import Case, Sample, Sizes
from benchmarks.h100_peers import PEERS, Peer

DECODE_8 = Case("decode B=8 base", "decode", 128, 256, (None,) * 8)
CLOSED = Case("closed base", "closed", 256, 128, (None,) * 512)
PREFILL = Case("prefill 64x128 base", "prefill", 128, 1, (None,) * 64)


def sample(case: Case, first_s: float, whole_s: float, number: int = 1) -> Sample:
    return Sample(case.name, number, first_s, whole_s)


def test_peers_are_named_as_the_cases() -> None:
    names = {case.name for case in decode_cases.cases(Sizes())}
    assert set(PEERS) <= names


def test_the_distinct_case_gives_each_row_an_adapter_of_its_own_while_there_are_any() -> None:
    (case,) = decode_cases.cases(Sizes(), ["decode"], ["distinct"], [128])
    assert case.adapters == (*range(64), *range(64))
    assert (case.num_in, case.num_out) == (128, 256)


def test_zipf_prefers_the_first_and_is_the_same_again() -> None:
    def drawn(seed: int) -> tuple[int | None, ...]:
        (case,) = decode_cases.cases(Sizes(), ["closed"], ["zipf"], seed=seed)
        return case.adapters

    adapters = drawn(0)
    assert adapters == drawn(0) != drawn(1)
    assert len(adapters) == 512
    assert 50 <= len(set(adapters)) <= 64
    assert adapters.count(0) > 2 * adapters.count(5)


def test_prompts_differ_by_row_and_by_seed() -> None:
    prompts = decode_cases.prompts(DECODE_8, 32000, "a")
    assert {len(prompt) for prompt in prompts} == {128}
    assert len(set(prompts)) == 8
    assert prompts == decode_cases.prompts(DECODE_8, 32000, "a")
    assert prompts != decode_cases.prompts(DECODE_8, 32000, "b")


def test_figures_are_in_the_cases_units() -> None:
    assert DECODE_8.figure(sample(DECODE_8, 0.5, 0.5 + 255 * 6e-3)) == pytest.approx(6.0)
    assert DECODE_8.tokens_per_s(sample(DECODE_8, 0.5, 2.0)) == 8 * 256 / 2.0
    assert PREFILL.figure(sample(PREFILL, 0.17, 0.17)) == 0.17
    assert PREFILL.tokens_per_s(sample(PREFILL, 0.2, 0.2)) == 64 * 128 / 0.2
    assert CLOSED.figure(sample(CLOSED, 0.0, 8.0)) == 512 * 128 / 8.0


def test_a_share_below_one_means_ahead_in_every_unit() -> None:
    assert DECODE_8.share(5.0, 10.0) == CLOSED.share(10.0, 5.0) == PREFILL.share(1.0, 2.0) == 0.5


def test_the_table_holds_ours_beside_peer_and_target() -> None:
    samples = [sample(DECODE_8, 0.0, 255 * ms * 1e-3) for ms in (5.0, 6.5, 9.0)]
    (row,) = decode_table.rows([DECODE_8, CLOSED], samples, PEERS)
    assert row.share_of_vllm == pytest.approx(1.0)
    assert row.share_of_target == pytest.approx(6.5 / 5.5)
    _, line = decode_table.as_text([row]).splitlines()
    assert line.split()[:3] == ["decode", "B=8", "base"]
    assert line.split()[-1] == "missed"


def test_sampling_is_held_against_our_own_greedy_step() -> None:
    cases = decode_cases.cases(Sizes(), ["decode", "sampling"], ["base"], [64])
    samples = [sample(case, 0.0, 255 * 0.01) for case in cases]
    greedy, sampled = decode_table.rows(cases, samples, {})
    assert greedy.peer == Peer()
    assert sampled.share_of_target == pytest.approx(1 / h100_peers.SAMPLING_OVER_GREEDY)


def test_a_selection_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no case is left"):
        main(["decode", "--cases", "closed", "--kinds", "distinct", "--out", str(tmp_path / "x")])


@pytest.mark.slow
def test_a_quick_run_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.jsonl"
    shape = ["--shape", "tiny", "--dtype", "float32", "--rank", "4", "--page-size", "16"]
    small = ["--batch", "2", "--buckets", "6", "--extend-buckets", "64", "--rounds", "2"]
    cases = ["--cases", "decode", "prefill", "closed", "--kinds", "base", "distinct", "zipf"]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert main(["decode", "--quick", *shape, *small, *cases, *folders]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = {line["case"] for line in lines if line["kind"] == "summary"}
    assert names == {
        "decode B=2 base",
        "decode B=2 distinct",
        "prefill 2x16 base",
        "prefill 2x16 distinct",
        "prefill 2x32 base",
        "prefill 2x32 distinct",
        "closed base",
        "closed zipf",
    }
    kinds = [line["kind"] for line in lines]
    assert kinds.count("round") == 2 * len(names)
    assert [
        line["executables_compiled_after_ready"] for line in lines if line["kind"] == "end"
    ] == [0]
    assert "closed zipf" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.slow
def test_a_spent_budget_still_shows_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.jsonl"
    shape = ["--shape", "tiny", "--dtype", "float32", "--rank", "4", "--page-size", "16"]
    small = ["--batch", "1", "--buckets", "1", "--extend-buckets", "64", "--cases", "decode"]
    asked = ["--quick", "--budget-s", "0", "--cache-dir", str(tmp_path), "--out", str(out)]
    assert main(["decode", *shape, *small, *asked]) == 0
    assert "out of time in round 1" in capsys.readouterr().out


@pytest.mark.slow
def test_visitors_upload_an_adapter_each_unless_they_share_one(tmp_path: Path) -> None:
    out = tmp_path / "decode.jsonl"
    shape = ["--shape", "tiny", "--dtype", "float32", "--rank", "4", "--page-size", "16"]
    small = ["--quick", "--batch", "8", "--buckets", "8", "--extend-buckets", "64", "--rounds", "2"]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert main(["decode", *shape, *small, "--cases", "upload", *folders]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    (alone,) = [line for line in lines if line["kind"] == "upload"]
    assert alone["buffer_bytes"] > 0 < alone["idle_ms"]["median"]
    last = {line["case"]: line for line in lines if line["kind"] == "visitors"}
    assert list(last) == [f"upload B=8 {kind}" for kind in ("base", "one", "distinct")]
    uploads = [line["uploads"] for line in last.values()]
    assert uploads[:2] == [0, 0] and uploads[2] >= 1
    assert all(line["itl_p99_ms"] >= line["itl_p50_ms"] > 0 for line in last.values())
    assert [
        line["executables_compiled_after_ready"] for line in lines if line["kind"] == "end"
    ] == [0]
