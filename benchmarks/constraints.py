"""Constrained decoding in the whole engine: what masks cost a step, and rows in their company.

The embedded model, or random weights of a shape with the embedded model's tokenizer: masks are of a
real vocabulary then, which replaces the shape's. ``constraints_cases`` says what is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from benchmarks import constraints_cases, constraints_table, environment
from benchmarks.clock import Clock
from benchmarks.constraints_cases import (
    FIRST_KINDS,
    FIRST_OF_ALL,
    GROUPS,
    KEPT,
    QUICK,
    Case,
    Sizes,
    request,
    schema,
)
from benchmarks.constraints_masks import MaskTimes, TimedCompiler, measure_upload
from benchmarks.constraints_table import Findings
from benchmarks.make_adapters import DTYPES, default_cache_dir
from benchmarks.report import JsonLines
from benchmarks.shapes import SHAPES, kv_bytes, write_shape
from jlorax.assembly import Parts, assemble
from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine
from jlorax.models.config import read_config
from jlorax.models.embedded import EMBEDDED_MODEL_ID, ensure_embedded_model
from jlorax.tokenizer import Tokenizer
from jlorax.types import Constraint, GenerateRequest

_SERVED_HOLD = SchedulerConfig().masks_within
_WARM_UP_TOKENS = 8
_PROMPT_TOKENS = 128  # at most
_PAGES_TO_SPARE = 2
_COUNTED = re.compile(rb'^jlorax_(steps|step_tokens)_total\{kind="decode"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """What is measured, on what model. ``shape`` None: the embedded model as it is."""

    shape: str | None
    dtype: str
    tokenizer: Path | None  # a model's folder; None: the embedded model's
    batch: int
    groups: tuple[str, ...]
    sizes: Sizes
    rounds: int
    holds: tuple[float, ...]
    visitors_per_s: float
    extend_bucket: int
    page_size: int
    cache_dir: Path
    seed: int

    @property
    def name(self) -> str:
        return self.shape or EMBEDDED_MODEL_ID

    @property
    def main_hold(self) -> float:
        """Whose figures are held against targets: the one that is served, where it is measured."""
        return _SERVED_HOLD if _SERVED_HOLD in self.holds else self.holds[0]

    @property
    def cases(self) -> list[Case]:
        mixes = constraints_cases.mixes(self.batch) if "mix" in self.groups else []
        visited = constraints_cases.visited(self.batch) if "visitors" in self.groups else []
        return mixes + visited

    def describe(self) -> str:
        weights = "" if self.shape is None else ", dummy weights, the vocabulary of its tokenizer"
        holds = ", ".join(f"{hold:g}" for hold in self.holds)
        return (
            f"{self.name}, {self.dtype}{weights}; batch {self.batch}, {self.sizes.num_out} tokens "
            f"out at temperature 1, JSON schema of {len(KEPT.source)} bytes; held for masks for "
            f"{holds} steps; {self.visitors_per_s:g} visitors a second; {self.rounds} rounds; "
            f"seed {self.seed}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), help="random weights (the embedded model's own)")
    add("--tokenizer", type=Path, metavar="DIR", help="a shape's (the embedded model's)")
    add("--dtype", choices=tuple(DTYPES), help="(bfloat16 of a shape, float32 of the embedded)")
    add("--cases", nargs="+", choices=GROUPS, default=GROUPS, help="groups of cases (all)")
    add("--batch", type=int, default=8, metavar="B", help="(8)")
    add("--num-out", type=int, metavar="N", help=f"tokens an answer ({Sizes().num_out})")
    add("--rounds", type=int, default=3, metavar="N", help="(3)")
    add("--holds", nargs="+", type=float, default=(_SERVED_HOLD,), metavar="H", help="in steps")
    add("--quick", action="store_true", help="short and few requests: does it run at all")
    add("--visitors-per-s", type=float, default=2.0, metavar="R", help="(2)")
    add("--extend-bucket", type=int, default=64, metavar="T", help="tokens (64)")
    add("--page-size", type=int, default=KVConfig().page_size, metavar="N", help="tokens")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="keeps executables")
    add("--seed", type=int, default=0, metavar="N", help="draws (0)")
    add("--budget-s", type=float, metavar="S", help="begin nothing new after this")
    add("--commit", help="what is measured, where there is no git to ask")
    add("--out", type=Path, metavar="FILE", help="(benchmarks/results/constraints-MODEL-TIME)")


def main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    clock, plan = Clock(arguments.budget_s), make_plan(arguments)
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent / "results"
    out = arguments.out or results_dir / f"constraints-{plan.name}-{now:%Y-%m-%d-%H%M%S}.jsonl"
    clock.say(plan.describe())
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        bench = ConstraintsBench(plan, clock, lines)
        try:
            bench.describe(arguments.commit or environment.commit())
            bench.run()
        finally:  # also when it is told to end: what was found is shown
            bench.show()
            print(f"written to {out}", flush=True)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    sizes = QUICK if arguments.quick else Sizes()
    return Plan(
        shape=arguments.shape,
        dtype=arguments.dtype or ("float32" if arguments.shape is None else "bfloat16"),
        tokenizer=arguments.tokenizer,
        batch=arguments.batch,
        groups=tuple(arguments.cases),
        sizes=replace(sizes, num_out=arguments.num_out or sizes.num_out),
        rounds=arguments.rounds,
        holds=tuple(arguments.holds),
        visitors_per_s=arguments.visitors_per_s,
        extend_bucket=arguments.extend_bucket,
        page_size=arguments.page_size,
        cache_dir=arguments.cache_dir,
        seed=arguments.seed,
    )


def write_model(shape: str, tokenizer: Path, folder: Path) -> Path:
    """The shape's config.json with another model's tokenizer, and as many tokens as that has."""
    write_shape(shape, folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    config = {**SHAPES[shape], "vocab_size": Tokenizer.load(folder).vocab_size}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def engine_config(plan: Plan, model: Path) -> EngineConfig:
    """One executable that decodes the batch, and one that extends."""
    tokens = _PROMPT_TOKENS + plan.sizes.num_out
    pages = plan.batch * -(-tokens // plan.page_size) + _PAGES_TO_SPARE
    is_dummy = plan.shape is not None
    return EngineConfig(
        cache_dir=plan.cache_dir,
        model=ModelSource(str(model), plan.dtype, load_format="dummy" if is_dummy else "auto"),
        steps=StepConfig(decode_buckets=(plan.batch,), extend_buckets=(plan.extend_bucket,)),
        scheduler=SchedulerConfig(max_batch=plan.batch),
        kv=KVConfig(
            max_seq_len=tokens,
            cache_bytes=kv_bytes(read_config(model), plan.dtype, pages * plan.page_size),
            page_size=plan.page_size,
        ),
        adapters=AdapterConfig(max_slots=1, max_rank=16, host_cache_bytes=0),
        model_id=plan.name,
        executable_dir=plan.cache_dir / "executables",
    )


class ConstraintsBench:
    def __init__(self, plan: Plan, clock: Clock, lines: JsonLines) -> None:
        self._plan = plan
        self._clock = clock
        self._lines = lines
        self._found = Findings()
        self._notes: list[str] = []
        self._titles = (f"order {i}" for i in count())  # of schemas that nobody has seen

    def describe(self, commit: str) -> None:
        card = environment.card()
        self._notes.append(f"{card['card']}, driver {card['driver']}, commit {commit}")
        self._clock.say(self._notes[0])
        self._lines.write(
            "run",
            description=self._plan.describe(),
            **card,
            versions=environment.versions("llguidance"),
            commit=commit,
            command=environment.command(),
            machine=environment.machine(),
            load=environment.load(),
            figures=constraints_cases.__doc__,
            schema=KEPT.source,
        )

    def run(self) -> None:
        plan, clock = self._plan, self._clock
        with tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as name:
            config = engine_config(plan, self._model(Path(name)))
            vocab_size = read_config(Path(str(config.model.model))).shape.vocab_size
            upload = measure_upload(plan.batch, vocab_size, config.executable_dir)
            self._found.upload = upload
            clock.say(upload.describe())
            self._lines.write("upload", **asdict(upload))
            begin_s = time.perf_counter()
            parts = assemble(config, clock.progress)
            self._note(f"ready after {time.perf_counter() - begin_s:.1f} s")
            timed = TimedCompiler(parts.grammar_compiler)
            asyncio.run(self._rounds(replace(parts, grammar_compiler=timed), timed))

    def _model(self, folder: Path) -> Path:
        plan = self._plan
        tokenizer = plan.tokenizer or ensure_embedded_model(plan.cache_dir)
        return tokenizer if plan.shape is None else write_model(plan.shape, tokenizer, folder)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._clock.say(text)

    async def _rounds(self, parts: Parts, timed: TimedCompiler) -> None:
        """An engine for every hold and round, of the same parts."""
        for number in range(1, self._plan.rounds + 1):
            for hold in self._plan.holds:
                async with Engine.of(_with_hold(parts, hold)) as engine:
                    await self._warm_up(engine)
                    await self._round(engine, hold, number, timed)
                    late = engine.stats().executables_compiled_after_ready
        self._note(f"executables compiled after ready: {late}")
        self._lines.write("end", executables_compiled_after_ready=late)

    async def _warm_up(self, engine: Engine) -> None:
        """Every kind of row once; the process that tries grammars starts, which an engine ends."""
        await self._first_ms(engine, None)
        first_ms = await self._first_ms(engine, schema(next(self._titles)))
        self._found.firsts_ms.setdefault(FIRST_OF_ALL, [first_ms])
        for case in self._plan.cases:
            await self._answers(engine, case, _WARM_UP_TOKENS)

    async def _round(self, engine: Engine, hold: float, number: int, timed: TimedCompiler) -> None:
        is_main = hold == self._plan.main_hold
        for case in self._plan.cases:
            if self._is_over(f"round {number}, hold {hold:g}, {case.name}"):
                return
            timed.times = MaskTimes()
            await self._sample(engine, case, hold, number)
            if is_main:
                self._found.masks.extend(timed.times)
        if is_main and "first" in self._plan.groups:
            await self._firsts(engine, number)

    def _is_over(self, before: str) -> bool:
        if self._clock.is_over:
            self._notes.append(f"out of time before {before}")
        return self._clock.is_over

    async def _sample(self, engine: Engine, case: Case, hold: float, number: int) -> None:
        steps, step_tokens = _decoded(engine)
        async with self._visitors(engine, case):
            times_s = await self._answers(engine, case, self._plan.sizes.num_out)
        steps_now, step_tokens_now = _decoded(engine)
        rows_a_step = (step_tokens_now - step_tokens) / (steps_now - steps)
        sample = constraints_cases.sample(case, hold, number, times_s, rows_a_step)
        self._found.samples.append(sample)
        self._lines.write("round", **asdict(sample))
        self._clock.say(f"round {number}, hold {hold:g}, {case.name}: {sample.step_ms:.3f} ms")

    async def _answers(self, engine: Engine, case: Case, num_out: int) -> list[list[float]]:
        """All requests at once, each in a task of its own: when each answer's tokens came."""
        async with asyncio.TaskGroup() as tasks:
            answers = [
                tasks.create_task(_token_times(engine, asked))
                for asked in self._requests(engine, case, num_out)
            ]
        return [answer.result() for answer in answers]

    def _requests(self, engine: Engine, case: Case, num_out: int) -> Iterator[GenerateRequest]:
        for row, is_constrained in enumerate(case.constrained):
            yield request(
                _prompt(engine, row),
                case.num_out(num_out, is_constrained),
                KEPT if is_constrained else None,
                self._plan.seed + row,
            )

    # ---- first tokens

    async def _firsts(self, engine: Engine, number: int) -> None:
        for _ in range(self._plan.sizes.num_firsts):
            for kind in FIRST_KINDS:
                constraint = {"free": None, "kept": KEPT}.get(kind) or self._new(kind)
                found = self._found.firsts_ms.setdefault(kind, [])
                found.append(await self._first_ms(engine, constraint))
        firsts_ms = {
            kind: self._found.firsts_ms[kind][-self._plan.sizes.num_firsts :]
            for kind in FIRST_KINDS
        }
        self._lines.write("first", round=number, **firsts_ms)

    def _new(self, kind: str) -> Constraint | None:
        return schema(next(self._titles)) if kind == "new" else None

    async def _first_ms(self, engine: Engine, constraint: Constraint | None) -> float:
        """Two tokens: a grammar has to say of the first that it is not the last."""
        begin_s = time.perf_counter()
        asked = request(_prompt(engine, 0), 2, constraint, self._plan.seed)
        return 1e3 * ((await _token_times(engine, asked))[0] - begin_s)

    # ---- visitors

    @asynccontextmanager
    async def _visitors(self, engine: Engine, case: Case) -> AsyncIterator[None]:
        """Comes while the body runs."""
        if case.visitors is None:
            yield
            return
        coming = asyncio.create_task(self._come(engine, case.visitors))
        try:
            yield
        finally:
            coming.cancel()
            await asyncio.wait([coming])

    async def _come(self, engine: Engine, kind: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                asked = request(_prompt(engine, 0), 1, self._new(kind), self._plan.seed)
                tasks.create_task(_token_times(engine, asked))
                await asyncio.sleep(1 / self._plan.visitors_per_s)

    # ---- the end

    def show(self) -> None:
        """The table comes last: whoever cuts a long output keeps its end."""
        plan, found = self._plan, self._found
        figures = constraints_table.figures(found, plan.batch, plan.main_hold)
        for figure in figures:
            self._lines.write("summary", **asdict(figure), is_missed=figure.is_missed)
        print("\n".join(["", plan.describe(), *self._notes, ""]))
        print(constraints_table.cases_text(found.samples) + "\n")
        print(constraints_table.figures_text(figures), flush=True)


def _with_hold(parts: Parts, hold: float) -> Parts:
    scheduler = replace(parts.config.scheduler, masks_within=hold)
    return replace(parts, config=replace(parts.config, scheduler=scheduler))


def _prompt(engine: Engine, row: int) -> tuple[int, ...]:
    text = f"Order {row}: everything that the shop has, with its makers, as JSON.\n"
    return tuple(engine.tokenizer.encode(text))


def _decoded(engine: Engine) -> tuple[float, float]:
    """Decode steps so far, and the rows in them."""
    counted = {name: float(value) for name, value in _COUNTED.findall(engine.metrics())}
    return counted.get(b"steps", 0.0), counted.get(b"step_tokens", 0.0)


async def _token_times(engine: Engine, asked: GenerateRequest) -> list[float]:
    return [time.perf_counter() async for _ in engine.generate(asked)]
