"""Streaming over HTTP from another process, beside the same load inside the engine's own.

First ``jlorax serve`` (a process) under ``http_load`` (another), then the engine in this process
with the very same settings: what a device's memory holds once cannot be there twice. Closed load:
a connection, or a task, sends its next request when the last is answered. Base model, greedy, end
of text ignored. The server makes text of every token and an event of every text; in this process
detokenizing is off.

  tokens/s = requests x tokens out / seconds from the first request to the last token
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import environment
from benchmarks.clock import Clock
from benchmarks.http_load import Load
from benchmarks.http_processes import LoadProcess, ServeProcess
from benchmarks.make_adapters import default_cache_dir
from benchmarks.report import Bound, JsonLines, Verdict, spread
from benchmarks.shapes import SHAPES, write_shape
from jlorax.config import EngineConfig
from jlorax.engine import Engine
from jlorax.types import GenerateRequest
from servers import cli, settings

HTTP, IN_PROCESS = "http", "in-process"
_LEAST_SHARE = 0.9
_WARM_UP_TOKENS = 4
_QUICK = {"requests": 6, "connections": 3, "num_in": 16, "num_out": 8}


@dataclass(frozen=True)
class Plan:
    shape: str
    num_requests: int
    num_connections: int
    num_in: int
    num_out: int
    rounds: int
    settings: Mapping[str, str]  # of ``jlorax serve``, beside its defaults
    seed: int
    start_deadline_s: float

    def describe(self) -> str:
        named = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return (
            f"{self.shape}, dummy weights; {self.num_requests} requests of {self.num_in} tokens in "
            f"and {self.num_out} out, {self.num_connections} at once; {self.rounds} rounds after a "
            f"warm-up; seed {self.seed}; settings: {named or 'none, the defaults'}"
        )


@dataclass(frozen=True)
class Sample:
    """One round. ``first_s``: a request to its first bytes, where that was measured."""

    where: str
    round: int
    seconds: float
    tokens_per_s: float
    median_first_s: float | None = None
    bytes_per_token: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="llama-2-7b", help="(llama-2-7b)")
    add("--requests", type=int, default=512, metavar="N", help="(512)")
    add("--connections", type=int, default=256, metavar="N", help="(256)")
    add("--num-in", type=int, default=256, metavar="N", help="tokens of a prompt (256)")
    add("--num-out", type=int, default=128, metavar="N", help="tokens of an answer (128)")
    add("--rounds", type=int, default=3, metavar="N", help="(3)")
    add("--quick", action="store_true", help="short and few requests: does it run at all")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="keeps executables")
    add("--seed", type=int, default=0, metavar="N", help="prompts (0)")
    add("--start-deadline-s", type=float, default=1200.0, metavar="S", help="(1200)")
    add("--budget-s", type=float, metavar="S", help="begin nothing new after this")
    add("--commit", help="what is measured, where there is no git to ask")
    add("--out", type=Path, metavar="FILE", help="(benchmarks/results/http-SHAPE-TIME)")


def main(arguments: argparse.Namespace) -> int:
    clock, plan = Clock(arguments.budget_s), make_plan(arguments)
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent / "results"
    out = arguments.out or results_dir / f"http-{plan.shape}-{now:%Y-%m-%d-%H%M%S}.jsonl"
    clock.say(plan.describe())
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        bench = HttpBench(plan, clock, lines)
        try:
            bench.describe(arguments.commit or environment.commit())
            bench.run(arguments.cache_dir)
        finally:  # also when it is told to end: what was found is shown
            bench.show()
            print(f"written to {out}", flush=True)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    sizes = _QUICK if arguments.quick else vars(arguments)
    return Plan(
        shape=arguments.shape,
        num_requests=sizes["requests"],
        num_connections=sizes["connections"],
        num_in=sizes["num_in"],
        num_out=sizes["num_out"],
        rounds=arguments.rounds,
        settings=dict(setting(text) for text in arguments.set),
        seed=arguments.seed,
        start_deadline_s=arguments.start_deadline_s,
    )


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if key not in {known.key for known in settings.SETTINGS} or not equals:
        raise SystemExit(f"--set {text}: a setting of jlorax serve is given as KEY=VALUE")
    return key, value


def engine_config(named: Mapping[str, str]) -> EngineConfig:
    """What ``jlorax serve`` makes of these settings on this machine. Starts jax."""
    return settings.engine_config(settings.read_settings(named, {}), {}, cli.machine())


class HttpBench:
    def __init__(self, plan: Plan, clock: Clock, lines: JsonLines) -> None:
        self._plan = plan
        self._clock = clock
        self._lines = lines
        self._samples: list[Sample] = []
        self._notes: list[str] = []

    def describe(self, commit: str) -> None:
        self._lines.write(
            "run",
            description=self._plan.describe(),
            versions=environment.versions(),
            commit=commit,
            command=environment.command(),
            machine=environment.machine(),
            figures=__doc__,
        )

    def run(self, cache_dir: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as name:
            work = Path(name)
            model = write_shape(self._plan.shape, work / self._plan.shape)
            own = {"model": str(model), "load_format": "dummy", "cache_dir": str(cache_dir)}
            named = own | dict(self._plan.settings)
            self._over_http(named, work)
            if not self._clock.is_over:
                asyncio.run(self._in_process(named))

    def _over_http(self, named: Mapping[str, str], work: Path) -> None:
        self._clock.say("starting jlorax serve")
        deadline_s = self._plan.start_deadline_s
        with (
            ServeProcess(named, work / "serve.log", deadline_s) as server,
            LoadProcess(work / "load.log") as load,
        ):
            self._note_start(HTTP, server.ready_s)
            info = json.loads(server.get("/info"))
            self._http_sample(load, server.url, info["model_id"], 0, _WARM_UP_TOKENS)
            for number in range(1, self._plan.rounds + 1):
                if self._is_over(HTTP, number):
                    break
                out = self._plan.num_out
                self._keep(self._http_sample(load, server.url, info["model_id"], number, out))
            self._end(HTTP, server.metric("jlorax_executables_compiled_after_ready"))

    def _http_sample(
        self, process: LoadProcess, url: str, model: str, number: int, num_out: int
    ) -> Sample:
        plan = self._plan
        answered = process.run(
            Load(
                url=url,
                model=model,
                vocab_size=SHAPES[plan.shape]["vocab_size"],
                num_requests=plan.num_requests,
                num_connections=plan.num_connections,
                num_in=plan.num_in,
                num_out=num_out,
                seed=f"{plan.seed} {number}",
            )
        )
        return Sample(
            HTTP,
            number,
            answered.seconds,
            answered.num_tokens / answered.seconds,
            statistics.median(answered.first_s),
            answered.num_bytes / answered.num_tokens,
        )

    async def _in_process(self, named: Mapping[str, str]) -> None:
        config = engine_config(named)
        card = environment.card()
        self._notes.append(f"{card['card']}, driver {card['driver']}")
        self._lines.write("card", **card)
        start_s = time.perf_counter()
        async with await Engine.start(config, self._clock.progress) as engine:
            self._note_start(IN_PROCESS, time.perf_counter() - start_s)
            await self._seconds(engine, 0, _WARM_UP_TOKENS)
            for number in range(1, self._plan.rounds + 1):
                if self._is_over(IN_PROCESS, number):
                    break
                seconds = await self._seconds(engine, number, self._plan.num_out)
                num_tokens = self._plan.num_requests * self._plan.num_out
                self._keep(Sample(IN_PROCESS, number, seconds, num_tokens / seconds))
            self._end(IN_PROCESS, engine.stats().executables_compiled_after_ready)

    async def _seconds(self, engine: Engine, number: int, num_out: int) -> float:
        requests = iter(list(self._requests(engine, number, num_out)))
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._plan.num_connections):
                tasks.create_task(_work(engine, requests))
        return time.perf_counter() - start_s

    def _requests(self, engine: Engine, number: int, num_out: int) -> Iterator[GenerateRequest]:
        draw = random.Random(f"{self._plan.seed} {number}")
        vocab_size = engine.model_info.vocab_size
        for _ in range(self._plan.num_requests):
            yield GenerateRequest(
                prompt=tuple(
                    draw.choices(range(vocab_size // 100, vocab_size), k=self._plan.num_in)
                ),
                max_new_tokens=num_out,
                ignore_eos=True,
                detokenize=False,
            )

    def _is_over(self, where: str, number: int) -> bool:
        if self._clock.is_over:
            self._notes.append(f"out of time in round {number}, {where}")
        return self._clock.is_over

    def _note_start(self, where: str, ready_s: float) -> None:
        self._notes.append(f"{where}: ready after {ready_s:.1f} s")
        self._clock.say(self._notes[-1])
        self._lines.write("start", where=where, ready_s=ready_s)

    def _keep(self, sample: Sample) -> None:
        self._samples.append(sample)
        first = sample.median_first_s
        text = "" if first is None else f", first bytes after {first:.3f} s in the median"
        self._clock.say(
            f"round {sample.round}, {sample.where}: {sample.tokens_per_s:.0f} tok/s{text}"
        )
        self._lines.write("round", **asdict(sample))

    def _end(self, where: str, late: float) -> None:
        self._notes.append(f"{where}: executables compiled after ready: {late:.0f}")
        self._lines.write("end", where=where, executables_compiled_after_ready=late)

    def show(self) -> None:
        print("\n".join(["", self._plan.describe(), *self._notes, ""]))
        spreads = {
            where: spread(s.tokens_per_s for s in self._samples if s.where == where)
            for where in dict.fromkeys(sample.where for sample in self._samples)
        }
        for where, found in spreads.items():
            print(f"{where:>10}: {found} tok/s")
        if len(spreads) == 2:
            share = spreads[HTTP].median / spreads[IN_PROCESS].median
            verdict = Verdict(f"{HTTP} / {IN_PROCESS}", share, Bound(low=_LEAST_SHARE))
            medians = {where: found.median for where, found in spreads.items()}
            self._lines.write("summary", tokens_per_s=medians, share=share, met=verdict.is_met)
            Console().print(str(verdict))


async def _work(engine: Engine, requests: Iterator[GenerateRequest]) -> None:
    for request in requests:
        num_tokens = 0
        async for _ in engine.generate(request):
            num_tokens += 1
        if num_tokens != request.max_new_tokens:
            raise RuntimeError(f"an answer has {num_tokens} of {request.max_new_tokens} tokens")
