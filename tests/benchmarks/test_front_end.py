"""The front-end benchmark: the stand-in's clock, what the load reads, and one quick run."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import front_end, front_end_load
from benchmarks.__main__ import main
from benchmarks.front_end import Plan, round_of
from benchmarks.front_end_engine import DelayEngine, StandInEngine, StepEngine, stamps_in
from benchmarks.front_end_load import Arrivals, Arrived, LoadFailed, Streamed, Streams, stream_of
from benchmarks.front_end_processes import ProcessFailed, two_cores
from jlorax.errors import Unavailable
from jlorax.types import GenerateRequest, TokenEvent
from tests.fakes import FakeEngine, FakeTokenizer
from tests.servers.process import write_model
from tests.servers.serving import in_loop, serving

_OWN_S = 1e6  # what a scripted answer says that its engine took
_SCRIPT = ("<0 7>", "<0 8>", f"<0 {_OWN_S * 1e6:.0f}>")


class _Tokenizer(FakeTokenizer):
    vocab_size = 1000
    eos_token_ids = (2,)


def stepped(step_s: float) -> StepEngine:
    tokenizer: Any = _Tokenizer()
    return StepEngine(tokenizer, "none", step_s)


async def events_of(engine: StandInEngine, num_tokens: int) -> list[TokenEvent]:
    request = GenerateRequest("hi", max_new_tokens=num_tokens)
    return [event async for event in engine.generate(request)]


# ---- the stand-in


@in_loop
async def test_steps_give_all_open_requests_a_token_at_each_step() -> None:
    engine, step_s = stepped(0.01), 0.01
    loop = asyncio.get_running_loop()
    start_us = loop.time() * 1e6
    clock = asyncio.create_task(engine.run())
    one, other = await asyncio.gather(events_of(engine, 3), events_of(engine, 3))
    clock.cancel()
    stamps = [stamps_in("".join(e.token.text for e in events).encode()) for events in (one, other)]
    dues = [[stamp.due_us for stamp in found] for found in stamps]
    assert dues[0] == dues[1]
    gaps = [b - a for a, b in zip(dues[0], dues[0][1:], strict=False)]
    assert gaps == pytest.approx([step_s * 1e6] * 2, abs=1.0)
    for found in stamps:
        assert len({stamp.arrived_us for stamp in found}) == 1
        assert start_us - 1 <= found[0].arrived_us < found[0].due_us <= loop.time() * 1e6
    assert [event.result is None for event in one] == [True, True, False]
    result = one[-1].result
    assert result is not None and len(result.tokens) == 3
    assert result.prompt_token_ids == tuple(_Tokenizer().encode("hi"))


@in_loop
async def test_a_delay_is_each_requests_own_and_holds_all_of_its_tokens() -> None:
    tokenizer: Any = _Tokenizer()
    engine = DelayEngine(tokenizer, "none", delay_s=0.02)
    events = await events_of(engine, 3)
    stamps = stamps_in("".join(event.token.text for event in events).encode())
    waits_us = [stamp.due_us - stamp.arrived_us for stamp in stamps]
    assert waits_us == pytest.approx([0.02 * 1e6] * 3, abs=1.0)
    assert asyncio.get_running_loop().time() * 1e6 >= stamps[-1].due_us
    assert events[-1].result is not None and engine.stats().num_running == 0


@in_loop
async def test_a_closed_request_gets_no_more_tokens() -> None:
    engine = stepped(0.001)
    clock = asyncio.create_task(engine.run())
    async with aclosing(engine.generate(GenerateRequest("hi"))) as events:
        await anext(events)
        assert engine.stats().num_running == 1
    assert engine.stats().num_running == len(engine._inboxes) == 0
    clock.cancel()


# ---- the load


def arrivals(port: int, num_tokens: int | None) -> Arrivals:
    return Arrivals(port, os.getpid(), 100.0, 0.2, num_tokens, "s")


@in_loop
async def test_whole_answers_arrive_at_random_and_lose_the_engines_own_time() -> None:
    async with serving(FakeEngine(script=_SCRIPT)) as server:
        arrived = await front_end_load.run_arrivals(arrivals(server.port, len(_SCRIPT)))
        seen = server.engine.seen
    assert 8 <= len(seen) == len(arrived.beyond_s) == len(arrived.late_s) <= 40  # 20 in the mean
    assert all(-_OWN_S < beyond_s < arrived.seconds - _OWN_S for beyond_s in arrived.beyond_s)
    assert all(late_s >= 0 for late_s in arrived.late_s)
    assert {request.max_new_tokens for request in seen} == {len(_SCRIPT)}
    assert arrived.server_cpu_s > 0


@in_loop
async def test_a_ping_has_no_engine() -> None:
    async with serving() as server:
        arrived = await front_end_load.run_arrivals(arrivals(server.port, None))
        assert server.engine.seen == []
    assert all(0 < beyond_s < arrived.seconds for beyond_s in arrived.beyond_s)


@in_loop
async def test_an_answer_of_another_length_is_no_figure() -> None:
    async with serving(FakeEngine(script=_SCRIPT)) as server:
        failed = pytest.RaisesExc(LoadFailed, match="3 tokens of 4")
        with pytest.RaisesGroup(failed):
            await front_end_load.run_arrivals(arrivals(server.port, 4))


@in_loop
async def test_streams_run_at_once_and_are_read_whole() -> None:
    gate = asyncio.Semaphore(0)
    engine = FakeEngine(script=_SCRIPT, gate=gate)
    async with serving(engine) as server:
        load = Streams(server.port, os.getpid(), num_streams=4, num_tokens=3, ramp_s=0.01)
        running = asyncio.create_task(front_end_load.run_streams(load))
        while engine.num_open < 4:
            engine.opened.clear()
            await engine.opened.wait()
        for _ in range(4 * 3):
            gate.release()
        streamed = await running
    assert (len(streamed.late_s), len(streamed.rates), streamed.num_broken) == (12, 4, 0)
    # each stream's tokens were due at 7 us, 8 us, and in a million seconds
    assert sum(late_s < 0 for late_s in streamed.late_s) == 4


class _SecondRefused(FakeEngine):
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        self.error = Unavailable("gone") if len(self.seen) == 1 else None
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield event


@in_loop
async def test_a_stream_that_breaks_is_counted_and_has_no_rate() -> None:
    async with serving(_SecondRefused(script=_SCRIPT, fail_at=2)) as server:
        load = Streams(server.port, os.getpid(), num_streams=3, num_tokens=3, ramp_s=0.3)
        streamed = await front_end_load.run_streams(load)
    assert (len(streamed.late_s), len(streamed.rates), streamed.num_broken) == (8, 2, 1)


@in_loop
async def test_when_every_stream_breaks_it_is_no_figure() -> None:
    async with serving(FakeEngine(error=Unavailable("gone"))) as server:
        load = Streams(server.port, os.getpid(), num_streams=2, num_tokens=3, ramp_s=0.0)
        with pytest.raises(LoadFailed, match="gone"):
            await front_end_load.run_streams(load)


def test_a_token_came_with_the_piece_that_ends_it() -> None:
    pieces = [
        (1.0, b'x"<5 10'),
        (2.0, b'00000>"<5 2000000>'),
        (3.0, b'" data: [DO'),
        (4.0, b"NE]\n\n"),
    ]
    stream = stream_of(pieces)
    assert stream.times_s == (2.0, 2.0)
    assert stream.late_s == (1.0, 0.0)
    assert stream.tokens_per_s == float("inf")  # both with one piece
    assert stream.is_whole(2) and not stream.is_whole(3)
    assert not stream_of(pieces[:-1]).is_whole(2)


# ---- the figures


def test_figures_of_a_round() -> None:
    ping = Arrived((0.001, 0.002, 0.003), (0.0,) * 3, 1.0, 0.5)
    chats = Arrived((0.004, 0.006, 0.008), (0.0, 0.001, 0.002), 2.0, 0.6)
    streams = Streamed((0.01, 0.02, 0.03), (20.0, 19.0), 1, 4.0, 3.0)
    found = round_of(ping, chats, streams)
    assert found.ping_p50_ms == pytest.approx(2.0)
    assert found.front_end_p50_ms == pytest.approx(4.0)
    assert found.front_end_p99_ms == pytest.approx(5.96)
    assert found.chat_cpu_ms == pytest.approx(200.0)
    assert found.chat_core == pytest.approx(0.3)
    assert (found.stream_tokens_per_s, found.num_broken_streams) == (19.0, 1)
    assert found.late_p50_ms == pytest.approx(20.0)
    assert found.token_cpu_us == pytest.approx(1e6)
    assert found.stream_core == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"front_end_p99_ms": 10.5}, ["front end p99, ms"]),
        ({"num_broken_streams": 1}, ["streams carried whole"]),
        ({"stream_tokens_per_s": 19.0}, ["slowest, tok/s"]),
        ({"late_p99_ms": 51.0}, ["late p99, ms"]),
    ],
)
def test_targets(changes: dict[str, float], missed: list[str]) -> None:
    good = {
        **dict.fromkeys(front_end.Round.__dataclass_fields__, 1.0),
        "num_broken_streams": 0,
        "stream_tokens_per_s": 19.9,
    }
    found = front_end.Round(**good | changes)  # type: ignore[arg-type]
    verdicts = [f for f in front_end.figures(Plan()) if f.target is not None]
    assert [f.what for f in verdicts if not f.target.holds(f.of(found))] == missed  # type: ignore[union-attr]


# ---- the command


def test_one_core_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(SystemExit, match="two cores are needed"):
        two_cores()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "front-end.jsonl")]
    with pytest.raises(ProcessFailed, match="tokenizer cannot be loaded"):
        main(["front-end", "--quick", "--model", str(tmp_path), *out])


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "front-end.jsonl"
    model = write_model(tmp_path / "model")
    files = ["--out", str(out), "--profile", str(tmp_path / "profiles")]
    assert main(["front-end", "--quick", "--rounds", "2", "--model", str(model), *files]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "round", "round", "summary"]
    for line in lines[1:3]:
        assert line["num_chats"] > 5 and line["num_broken_streams"] == 0
        assert line["late_p99_ms"] >= line["late_p50_ms"] > 0
        assert line["front_end_p99_ms"] >= line["front_end_p50_ms"]
        assert line["chat_cpu_ms"] > 0 and line["token_cpu_us"] > 0
    assert set(lines[3]["medians"]) == {figure.what for figure in front_end.figures(Plan())}
    assert "streams carried whole: 10.00" in capsys.readouterr().out
    for server in ("delayed", "stepped"):
        assert (tmp_path / "profiles" / f"{server}.prof").stat().st_size > 0
