"""What the HTTP server costs by itself: whole answers by arrival, and hundreds of streams at once.

The server of ``jlorax serve`` over a stand-in engine, in a process held to one core; the load in
another, held to another. No model runs; a real chat template and tokenizer do.

  front end, ms   sent -> answer received, less the stand-in's own fixed delay, less the median of
                  GET /ping under the same arrivals
  late, ms        a token's due moment -> received; all streams' tokens are due at the same moment
  stream tok/s    (tokens - 1) / (last - first token received)
  cpu             processor time of the server, the stand-in's too, for each chat, or each token
                  of a stream
  core            processor time of the server / time: the share of its one core
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import environment
from benchmarks.clock import Clock
from benchmarks.front_end_load import Arrived, Streamed
from benchmarks.front_end_processes import FrontEnd, front_end
from benchmarks.make_adapters import default_cache_dir
from benchmarks.report import Bound, JsonLines, Spread, Verdict, spread
from benchmarks.text_table import text_table
from jlorax.models.embedded import ensure_embedded_model


@dataclass(frozen=True)
class Plan:
    rate_per_s: float = 200.0
    chat_s: float = 10.0
    chat_tokens: int = 16
    delay_s: float = 0.2  # of the stand-in, before it has the whole answer
    num_streams: int = 500
    stream_tokens: int = 200
    tokens_per_s: float = 20.0  # of each stream
    ramp_s: float = 1.0  # the streams begin within
    rounds: int = 3
    seed: int = 0

    def describe(self) -> str:
        return (
            f"{self.rate_per_s:g} chats/s (Poisson) of {self.chat_tokens} tokens for "
            f"{self.chat_s:g} s; {self.num_streams} streams of {self.stream_tokens} tokens at "
            f"{self.tokens_per_s:g} tokens/s; {self.rounds} rounds; seed {self.seed}"
        )


_QUICK: dict[str, Any] = {
    "rate_per_s": 40.0,
    "chat_s": 0.5,
    "chat_tokens": 4,
    "num_streams": 10,
    "stream_tokens": 10,
    "ramp_s": 0.1,
}


@dataclass(frozen=True)
class Round:
    """The figures of one round; times in ms."""

    num_chats: int
    ping_p50_ms: float
    front_end_p50_ms: float
    front_end_p99_ms: float
    load_late_p99_ms: float  # the load's own fault: chats were sent so much after their time
    chat_cpu_ms: float
    chat_core: float
    num_broken_streams: int
    stream_tokens_per_s: float  # of the slowest stream
    late_p50_ms: float
    late_p99_ms: float
    token_cpu_us: float
    stream_core: float


@dataclass(frozen=True)
class Figure:
    what: str
    of: Callable[[Round], float]
    target: Bound | None = None


def figures(plan: Plan) -> Sequence[Figure]:
    """Streams are carried when every token comes before the next is due, at the rate asked for."""
    num, rate = plan.num_streams, plan.tokens_per_s
    return (
        Figure("GET /ping p50, ms", lambda r: r.ping_p50_ms),
        Figure("front end p50, ms", lambda r: r.front_end_p50_ms),
        Figure("front end p99, ms", lambda r: r.front_end_p99_ms, Bound(high=10.0)),
        Figure("load late p99, ms", lambda r: r.load_late_p99_ms),
        Figure("cpu of a chat, ms", lambda r: r.chat_cpu_ms),
        Figure("core while chats come, %", lambda r: 100 * r.chat_core),
        Figure("streams carried whole", lambda r: num - r.num_broken_streams, Bound(low=num)),
        Figure("slowest, tok/s", lambda r: r.stream_tokens_per_s, Bound(low=0.99 * rate)),
        Figure("late p50, ms", lambda r: r.late_p50_ms),
        Figure("late p99, ms", lambda r: r.late_p99_ms, Bound(high=1e3 / rate)),
        Figure("cpu of a token, us", lambda r: r.token_cpu_us),
        Figure("core while streams run, %", lambda r: 100 * r.stream_core),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="its tokenizer and chat template (the embedded)")
    add("--rounds", type=int, default=Plan.rounds, metavar="N", help=f"({Plan.rounds})")
    add("--seed", type=int, default=Plan.seed, metavar="N", help=f"arrivals ({Plan.seed})")
    add("--quick", action="store_true", help="short and few requests: does it run at all")
    add("--profile", type=Path, metavar="DIR", help="cProfile's figures of the servers")
    add("--out", type=Path, metavar="FILE", help="(benchmarks/results/front-end-TIME)")


def main(arguments: argparse.Namespace) -> int:
    clock, plan = Clock(), make_plan(arguments)
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent / "results"
    out = arguments.out or results_dir / f"front-end-{now:%Y-%m-%d-%H%M%S}.jsonl"
    model = arguments.model or ensure_embedded_model(default_cache_dir())
    clock.say(plan.describe())
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        lines.write(
            "run",
            description=plan.describe(),
            versions=environment.versions(),
            commit=environment.commit(),
            command=environment.command(),
            machine=environment.machine(),
            load=environment.load(),
            figures=__doc__,
        )
        found = list(_rounds(plan, model, arguments.profile, clock, lines))
        show(plan, found, lines)
    print(f"written to {out}", flush=True)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    plan = Plan(rounds=arguments.rounds, seed=arguments.seed)
    return replace(plan, **_QUICK) if arguments.quick else plan


def _rounds(
    plan: Plan, model: Path, profiles: Path | None, clock: Clock, lines: JsonLines
) -> Iterable[Round]:
    with (
        tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as work,
        front_end(model, plan.delay_s, 1 / plan.tokens_per_s, Path(work), profiles) as measured,
    ):
        for number in range(plan.rounds + 1):
            clock.say(f"round {number}" if number else "warming up")
            found = _round(plan, measured, number)
            if number:
                lines.write("round", round=number, **asdict(found))
                yield found


def _round(plan: Plan, measured: FrontEnd, number: int) -> Round:
    seed = f"{plan.seed} {number}"
    ping = measured.pings(plan.rate_per_s, plan.chat_s / 5, seed)
    chats = measured.chats(plan.rate_per_s, plan.chat_s, plan.chat_tokens, seed)
    streams = measured.streams(plan.num_streams, plan.stream_tokens, plan.ramp_s)
    return round_of(ping, chats, streams)


def round_of(ping: Arrived, chats: Arrived, streams: Streamed) -> Round:
    bare_ms = _percentile_ms(ping.beyond_s, 50)
    return Round(
        num_chats=len(chats.beyond_s),
        ping_p50_ms=bare_ms,
        front_end_p50_ms=_percentile_ms(chats.beyond_s, 50) - bare_ms,
        front_end_p99_ms=_percentile_ms(chats.beyond_s, 99) - bare_ms,
        load_late_p99_ms=_percentile_ms(chats.late_s, 99),
        chat_cpu_ms=1e3 * chats.server_cpu_s / len(chats.beyond_s),
        chat_core=chats.server_cpu_s / chats.seconds,
        num_broken_streams=streams.num_broken,
        stream_tokens_per_s=min(streams.rates, default=0.0),
        late_p50_ms=_percentile_ms(streams.late_s, 50),
        late_p99_ms=_percentile_ms(streams.late_s, 99),
        token_cpu_us=1e6 * streams.server_cpu_s / len(streams.late_s),
        stream_core=streams.server_cpu_s / streams.seconds,
    )


def _percentile_ms(values_s: Sequence[float], percent: float) -> float:
    return 1e3 * float(np.percentile(values_s, percent))


def show(plan: Plan, found: Sequence[Round], lines: JsonLines) -> None:
    rows: list[tuple[str, str, str]] = []
    verdicts: list[Verdict] = []
    medians: dict[str, Any] = {}
    for figure in figures(plan):
        values = spread(figure.of(one) for one in found)
        medians[figure.what] = values.median
        rows.append((figure.what, _shown(values), str(figure.target or "")))
        if figure.target is not None:
            verdicts.append(Verdict(figure.what, values.median, figure.target))
    lines.write("summary", medians=medians, missed=[v.what for v in verdicts if not v.is_met])
    print("\n" + text_table(("median (lowest..highest)", "", "target"), rows) + "\n")
    for verdict in verdicts:
        Console().print(str(verdict))


def _shown(values: Spread) -> str:
    return f"{values.median:.2f} ({values.low:.2f}..{values.high:.2f})"
