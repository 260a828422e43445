"""The HTTP benchmark: the load counts what it gets, and one quick run of both sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import http_load
from benchmarks.__main__ import main
from benchmarks.http_load import Load, LoadFailed
from benchmarks.http_processes import ProcessFailed, ServeProcess
from tests.fakes import FakeEngine
from tests.servers.serving import Server, in_loop, serving

TEXTS = ("one", " two", "\ndata: ", ": three")


def load_on(server: Server) -> Load:
    return Load(
        url=server.url,
        model="base",
        vocab_size=1000,
        num_requests=5,
        num_connections=2,
        num_in=7,
        num_out=len(TEXTS),
        seed="s",
    )


@in_loop
async def test_the_load_sends_what_it_says_and_counts_every_token() -> None:
    async with serving(FakeEngine(script=TEXTS)) as server:
        answered = await http_load.run(load_on(server))
        assert answered.num_tokens == 5 * len(TEXTS)
        assert len(answered.first_s) == 5
        assert all(0 < first_s < answered.seconds for first_s in answered.first_s)
        seen = server.engine.seen
    assert {len(request.prompt) for request in seen} == {7}
    assert len({request.prompt for request in seen}) == 5
    assert all(request.ignore_eos and not request.sampling.temperature for request in seen)
    assert {request.max_new_tokens for request in seen} == {len(TEXTS)}


@in_loop
async def test_an_answer_of_another_length_is_no_figure() -> None:
    async with serving(FakeEngine(script=TEXTS)) as server:
        with pytest.RaisesGroup(LoadFailed, allow_unwrapped=True, flatten_subgroups=True):
            await http_load.run(replace(load_on(server), num_out=3, num_connections=1))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no such folder"):
        ServeProcess({"model": "/no/such/model"}, tmp_path / "log", 60.0)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(SystemExit, match="max_batsch"):
        main(["http", "--set", "max_batsch=4"])


@pytest.mark.slow
def test_a_quick_run_measures_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "http.jsonl"
    small = ["--set", "max_batch=3", "--set", "buckets=3", "--set", "adapter_bank_bytes=1MiB"]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert main(["http", "--quick", "--shape", "tiny", "--rounds", "2", *small, *folders]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rounds = [(line["where"], line["round"]) for line in lines if line["kind"] == "round"]
    assert rounds == [("http", 1), ("http", 2), ("in-process", 1), ("in-process", 2)]
    ends = [line["executables_compiled_after_ready"] for line in lines if line["kind"] == "end"]
    assert ends == [0, 0]
    (summary,) = (line for line in lines if line["kind"] == "summary")
    rates = summary["tokens_per_s"]
    assert summary["share"] == pytest.approx(rates["http"] / rates["in-process"])
    assert "http / in-process" in capsys.readouterr().out
