"""Serving under the field's loads: many adapters, open and closed loop, here or at any URL.

The engine in this process has dummy weights and the settings of ``jlorax serve``; a preset says
what room it gets for adapters, and presets of equal room share one start. ``--url`` measures any
server of OpenAI's completions instead. ``workload`` says what is asked for, ``serving_figures`` how
figures follow, ``serving_presets`` what must be shown.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    environment,
    serving_adapters,
    serving_figures,
    serving_load,
    serving_plots,
    serving_presets,
    serving_table,
)
from benchmarks.clock import Clock
from benchmarks.http_streaming import engine_config, setting
from benchmarks.make_adapters import default_cache_dir
from benchmarks.report import JsonLines
from benchmarks.serving_figures import Figures, Slo
from benchmarks.serving_metrics import adapter_figures, memory_log, read
from benchmarks.serving_presets import H100, PRESETS, Kind, Preset, Share
from benchmarks.serving_targets import EngineTarget, Target, UrlTarget
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.workload import Workload
from jlorax.assembly import bank_layout
from jlorax.engine import Engine
from jlorax.models.config import read_config

_H100_SHAPE, _QUICK_SHAPE = "llama-2-7b", "tiny"
_GROUPS = {"h100": H100, "all": tuple(PRESETS)}
_LOAD_ROUNDS = 4
_QUICK_SETTINGS = {"max_batch": "8", "buckets": "8", "adapter_bank_bytes": "4MiB"}


@dataclass(frozen=True)
class Plan:
    presets: tuple[Preset, ...]
    shape: str
    is_quick: bool
    settings: Mapping[str, str]  # of ``jlorax serve``, beside the presets' and its defaults
    url: str | None
    model_prefix: str | None
    slo: Slo
    seed: int
    rate: float | None
    duration_s: float | None

    @property
    def is_h100(self) -> bool:
        """Whether the promises about an H100 are about this run."""
        return self.shape == _H100_SHAPE and not self.is_quick

    def describe(self) -> str:
        named = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        where = self.url or f"{self.shape}, dummy weights; settings: {named or 'the defaults'}"
        return (
            f"{where}; goodput: TTFT at most {self.slo.ttft_ms:g} ms and TPOT at most "
            f"{self.slo.itl_ms:g} ms; seed {self.seed}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(PRESETS)
    add("presets", nargs="+", metavar="PRESET", help=f"{names}; h100: its table's rows; all")
    add("--url", metavar="URL", help="measure this server instead of the engine")
    add("--model-prefix", metavar="P", help="of adapters' names at the server (KIND/)")
    add("--shape", choices=tuple(SHAPES), help=f"({_H100_SHAPE}; {_QUICK_SHAPE} with --quick)")
    add("--quick", action="store_true", help="short and few requests: does it run at all")
    add("--rate", type=float, metavar="R", help="requests/s of open loops (the preset's)")
    add("--duration-s", type=float, metavar="S", help="of open loops (the preset's)")
    add("--slo-ttft-ms", type=float, default=500.0, metavar="MS", help="for goodput (500)")
    add("--slo-itl-ms", type=float, default=50.0, metavar="MS", help="for goodput: TPOT (50)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server")
    add("--adapters-dir", type=Path, metavar="DIR", help="keeps adapters for the next command")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="keeps executables")
    add("--seed", type=int, default=0, metavar="N", help="arrivals, adapters, prompts (0)")
    add("--budget-s", type=float, metavar="S", help="begin nothing new after this")
    add("--commit", help="what is measured, where there is no git to ask")
    add("--plots", type=Path, metavar="DIR", help="draw each preset (needs the extra 'bench')")
    add("--out", type=Path, metavar="FILE", help="(benchmarks/results/serving-SHAPE-TIME)")


def main(arguments: argparse.Namespace) -> int:
    if arguments.plots is not None:
        serving_plots.check()
    clock, plan = Clock(arguments.budget_s), make_plan(arguments)
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent / "results"
    out = arguments.out or results_dir / f"serving-{plan.shape}-{now:%Y-%m-%d-%H%M%S}.jsonl"
    clock.say(plan.describe())
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        bench = ServingBench(plan, clock, lines, arguments.plots)
        try:
            bench.describe(arguments.commit or environment.commit())
            bench.run(arguments.cache_dir, arguments.adapters_dir)
        finally:  # also when it is told to end: what was found is shown
            bench.show()
            print(f"written to {out}", flush=True)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    quick = arguments.quick
    presets = serving_presets.in_order(_names(arguments.presets))
    return Plan(
        presets=tuple(preset.quick() if quick else preset for preset in presets),
        shape=arguments.shape or (_QUICK_SHAPE if quick else _H100_SHAPE),
        is_quick=quick,
        settings=(_QUICK_SETTINGS if quick else {}) | dict(map(setting, arguments.set)),
        url=arguments.url,
        model_prefix=arguments.model_prefix if arguments.url else None,
        slo=Slo(arguments.slo_ttft_ms, arguments.slo_itl_ms),
        seed=arguments.seed,
        rate=arguments.rate,
        duration_s=arguments.duration_s,
    )


def _names(asked: Sequence[str]) -> list[str]:
    names = [name for word in asked for name in _GROUPS.get(word, (word,))]
    if unknown := [name for name in names if name not in PRESETS]:
        known = ", ".join([*PRESETS, *_GROUPS])
        raise SystemExit(f"no such preset: {', '.join(unknown)}; there are: {known}")
    return names


class ServingBench:
    def __init__(self, plan: Plan, clock: Clock, lines: JsonLines, plots: Path | None) -> None:
        self._plan = plan
        self._clock = clock
        self._lines = lines
        self._plots = plots
        self._numbers = serving_adapters.numbers(plan.presets)
        self._results: dict[str, Figures] = {}
        self._notes: list[str] = []

    def describe(self, commit: str) -> None:
        self._notes.append(f"commit {commit}")
        self._lines.write(
            "run",
            description=self._plan.describe(),
            versions=environment.versions(),
            commit=commit,
            command=environment.command(),
            machine=environment.machine(),
            figures=serving_figures.__doc__,
        )

    def run(self, cache_dir: Path, adapters_dir: Path | None) -> None:
        plan = self._plan
        with tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as name:
            work = Path(name)
            model = write_shape(plan.shape, work / plan.shape)
            root = adapters_dir or work / "adapters"
            if plan.url is None or adapters_dir is not None:
                serving_adapters.prepare(root, model, plan.presets, plan.seed, self._clock.say)
            if plan.url is not None:
                asyncio.run(self._at_url(plan.url))
                return
            own = {
                "model": str(model),
                "load_format": "dummy",
                "cache_dir": str(cache_dir),
                "adapter_root": str(root),
                "disk_cache": str(work / "disk-tier"),
            }
            for _, group in itertools.groupby(plan.presets, lambda preset: preset.room):
                if not self._is_over("an engine's start"):
                    asyncio.run(self._in_process(own, model, list(group)))

    # ---- who is measured

    async def _in_process(
        self, own: Mapping[str, str], model: Path, presets: Sequence[Preset]
    ) -> None:
        named = {**own, **self._room_settings(own, model, presets[0]), **self._plan.settings}
        config = engine_config(named)
        self._note_card()
        start_s = time.perf_counter()
        async with await Engine.start(config, self._clock.progress) as engine:
            self._note_start(presets[0], named, time.perf_counter() - start_s)
            for preset in presets:
                await self._preset(EngineTarget(engine), preset)
            late = engine.stats().executables_compiled_after_ready
            self._notes.append(f"executables compiled after ready: {late}")
            self._lines.write("end", executables_compiled_after_ready=late)

    def _room_settings(self, own: Mapping[str, str], model: Path, preset: Preset) -> dict[str, str]:
        """Bytes for adapters as the server's settings; of an adapter as the bank keeps it."""
        room = preset.room
        config = engine_config({**own, **self._plan.settings})
        layout = bank_layout(config, read_config(model))
        need = layout.pages_needed(
            dict.fromkeys(preset.adapters.targets, max(preset.adapters.ranks))
        )
        adapter_bytes = sum(layout.page_bytes(pool) * count for pool, count in need.items())
        named = {"max_slots": str(room.max_slots)}
        if room.bank is not None:
            named["adapter_bank_bytes"] = str(room.bank * adapter_bytes)
        if room.host is not None:
            named["host_cache_bytes"] = str(room.host * adapter_bytes)
        if room.host_bytes is not None:
            named["host_cache_bytes"] = room.host_bytes
        return named

    def _note_card(self) -> None:
        card = environment.card()
        note = f"{card['card']}, driver {card['driver']}"
        if note not in self._notes:
            self._notes.append(note)
            self._lines.write("card", **card)

    def _note_start(self, preset: Preset, named: Mapping[str, str], ready_s: float) -> None:
        shown = {key: named[key] for key in named if not Path(named[key]).is_absolute()}
        self._notes.append(f"ready after {ready_s:.1f} s for {preset.name}: {_text(shown)}")
        self._clock.say(self._notes[-1])
        self._lines.write("start", before=preset.name, ready_s=ready_s, settings=shown)

    async def _at_url(self, url: str) -> None:
        shape = SHAPES[self._plan.shape]
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            target = UrlTarget(session, url, shape["vocab_size"], shape["max_position_embeddings"])
            for preset in self._plan.presets:
                await self._preset(target, preset)

    # ---- one preset

    async def _preset(self, target: Target, asked: Preset) -> None:
        preset = self._with_load(asked)
        if preset is None or self._is_over(asked.name):
            return
        plan = self._plan
        workload = preset.recipe.workload(
            plan.seed, preset.name, target.vocab_size, target.max_seq_len
        )
        self._clock.say(f"{preset.name}: {workload.description}")
        name_of = serving_adapters.name_of(preset, self._numbers[preset.name], plan.model_prefix)
        if preset.touched:
            await self._touch(target, preset, workload, name_of)
        before = read(await target.metrics())
        async with memory_log(target) as memory:
            found = await self._measure(target, preset, workload, name_of)
        figures = {
            **found,
            "adapters": adapter_figures(before, read(await target.metrics())),
            "memory": memory.figures(),
        }
        self._keep(preset, workload, figures)

    def _with_load(self, preset: Preset) -> Preset | None:
        """Its open-loop rate: what was asked for, else its share of a capacity that was measured.
        None: that was not."""
        rate = self._plan.rate
        if rate is None and preset.load is not None:
            rate = self._shared(preset.load)
            if rate is None:
                self._notes.append(f"{preset.name} left out: no capacity of {preset.load.of}")
                return None
        loaded = preset.with_load(rate, self._plan.duration_s)
        return loaded.quick() if self._plan.is_quick else loaded

    def _shared(self, share: Share) -> float | None:
        capacity = serving_figures.figure(self._results.get(share.of, {}), "steady_requests_per_s")
        return None if capacity is None else share.share * capacity

    async def _touch(
        self, target: Target, preset: Preset, workload: Workload, name_of: serving_load.NameOf
    ) -> None:
        touched = await serving_load.touch(target, workload.adapters, name_of)
        errors = [answer.error for answer in touched.found if answer.error is not None]
        self._clock.say(f"{preset.name}: {len(touched.found)} adapters asked once")
        if errors:
            self._notes.append(f"{preset.name}: {len(errors)} of them failed: {errors[0]}")

    async def _measure(
        self, target: Target, preset: Preset, workload: Workload, name_of: serving_load.NameOf
    ) -> dict[str, Any]:
        match preset.kind:
            case Kind.LOADS:
                num_adapters = preset.recipe.num_adapters
                rounds = 1 if self._plan.is_quick else _LOAD_ROUNDS
                total = rounds * len(serving_load.LOAD_KINDS) * len(workload.arrivals)
                with _bar(preset.name, total) as answered:
                    beside = await serving_load.beside_loads(
                        target, workload, name_of, num_adapters, rounds, answered
                    )
                return serving_figures.of_loads(beside)
            case Kind.FIRST_TOKEN:
                with _bar(preset.name, serving_load.num_probes(workload)) as answered:
                    probes = await serving_load.first_tokens(target, workload, name_of, answered)
                return serving_figures.of_probes(probes)
            case Kind.WORKLOAD:
                with _bar(preset.name, len(workload.arrivals)) as answered:
                    answers = await serving_load.run(target, workload, name_of, answered)
                if self._plots is not None:
                    serving_plots.plot(self._plots, preset.name, answers)
                return serving_figures.of_workload(answers, self._plan.slo)

    def _keep(self, preset: Preset, workload: Workload, figures: Figures) -> None:
        self._results[preset.name] = figures
        self._lines.write(
            "preset", preset=preset.name, workload=workload.description, figures=figures
        )
        shown = {
            path: serving_figures.figure(figures, path)
            for path in ("output_tokens_per_s", "ttft_ms.mean", "ttft_ms.p99", "num_errors")
        }
        known = {path: f"{value:.1f}" for path, value in shown.items() if value is not None}
        self._clock.say(f"{preset.name}: {_text(known)}")
        if figures["errors"]:
            counts = {code: str(number) for code, number in figures["errors"].items()}
            self._notes.append(f"{preset.name}: errors: {_text(counts)}")

    def _is_over(self, before: str) -> bool:
        if self._clock.is_over:
            self._notes.append(f"out of time before {before}")
        return self._clock.is_over

    def show(self) -> None:
        """The verdicts come last: whoever cuts a long output keeps its end."""
        plan, results = self._plan, self._results
        judged = serving_table.judge(plan.presets, results, plan.is_h100)
        for one in judged:
            self._lines.write("summary", **one.fields())
        print("\n".join(["", plan.describe(), *self._notes]))
        for text in (
            serving_table.tiers_text(results),
            serving_table.times_text(results),
            serving_table.rates_text(results),
            serving_table.verdicts_text(judged),
        ):
            print(f"\n{text}", flush=True)


@contextmanager
def _bar(name: str, total: int) -> Iterator[serving_load.Answered]:
    """On a terminal alone. Yields what is to be called for every answer."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)


def _text(named: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in named.items())
