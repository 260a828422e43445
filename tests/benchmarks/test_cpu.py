"""Contestants as processes, and the command itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import environment
from benchmarks.__main__ import main
from benchmarks.contestants.process import ContestantFailed, ContestantProcess
from benchmarks.contestants.protocol import Setup


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[ContestantProcess]:
    setup = Setup(
        model="",
        adapters={},
        model_gguf=None,
        adapter_ggufs={},
        prompts=[[10], [20]],
        num_out=3,
        num_threads=1,
        executables="",
        few_executables=True,
    )
    setup.write(tmp_path / "setup.json")
    module, log = "tests.benchmarks.stub_contestant", tmp_path / "log"
    with ContestantProcess("stub", sys.executable, module, tmp_path / "setup.json", log) as process:
        yield process


def test_a_contestant_answers_and_describes_itself(stub: ContestantProcess) -> None:
    seconds, tokens = stub.run((None, None), 3)
    assert tokens == [[10, 11, 12], [20, 21, 22]]
    assert 0 < seconds < stub.ready_s
    rss, notes = stub.describe()
    assert notes == {"kind": "stub"}
    assert 1 << 20 < rss < 1 << 30
    assert stub.packages["python"].startswith("3.")


def test_a_dead_contestant_is_an_error_with_its_last_words(stub: ContestantProcess) -> None:
    with pytest.raises(ContestantFailed, match=r"stub ended with status 1:\n.*\n?.*is broken"):
        stub.run(("broken",), 3)


def test_the_environment_is_named() -> None:
    machine = environment.machine()
    assert machine["cpu"]
    assert 1 <= environment.num_cores() == machine["cores"]
    assert environment.commit()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_measures_everyone(tmp_path: Path, smollm2_dir: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    assert main(["cpu", "--quick", "--only", "jlorax", "peft", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("round") == kinds.count("summary") == 2 * 5
    agreements = [line["tokens_as_ours"] for line in lines if line["kind"] == "summary"]
    assert all(share is None or share > 0.5 for share in agreements)
    assert len({line["run"] for line in lines}) == 1
