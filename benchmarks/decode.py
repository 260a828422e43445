"""The whole engine in this process on dummy weights: decode, prefill and closed load.

Scheduler, paged KV and sampling as they are served; detokenizing off; greedy, end of text ignored.
``decode_cases`` says what is asked for and how the figures are computed.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import decode_cases, decode_table, environment, h100_peers, upload
from benchmarks.clock import Clock
from benchmarks.decode_cases import BATCHES, GROUPS, KINDS, QUICK, Case, Sample, Sizes
from benchmarks.make_adapters import DTYPES, default_cache_dir, make_adapters
from benchmarks.report import JsonLines
from benchmarks.shapes import SHAPES, kv_bytes, write_shape
from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine
from jlorax.layout import BankLayout
from jlorax.models.config import ModelConfig, read_config
from jlorax.types import GenerateRequest, SamplingParams
from servers.settings import size_bytes

_WARM_UP_TOKENS = 2
_PAGES_TO_SPARE = 8
_BANK_ROOM = 2  # pools are cut in eighths of the bank
_SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
_ATTENTION = {"falcon": ("query_key_value", "dense")}


@dataclass(frozen=True)
class Plan:
    """What is measured, on what shape, with which executables."""

    shape: str
    dtype: str
    rank: int
    targets: tuple[str, ...]
    cases: tuple[Case, ...]
    rounds: int
    max_batch: int
    buckets: tuple[int, ...]  # decode batch sizes
    extend_buckets: tuple[int, ...]
    page_size: int
    max_seq_len: int
    kv_cache_bytes: int | None  # None: what the cases need
    cache_dir: Path
    seed: int

    @property
    def num_slots(self) -> int:
        named = [i for case in self.cases for i in case.adapters if i is not None]
        return max(max(named, default=-1) + 1, upload.NUM_SLOTS if self.has_uploads else 0)

    @property
    def num_adapters(self) -> int:
        return self.num_slots + (upload.NUM_SLOTS if self.has_uploads else 0)

    @property
    def has_uploads(self) -> bool:
        return any(case.group == "upload" for case in self.cases)

    @property
    def is_peers(self) -> bool:
        """Whether this is the setting that the peers' figures were measured in."""
        setting = (self.shape, self.rank, frozenset(self.targets))
        return setting == (h100_peers.SHAPE, h100_peers.RANK, frozenset(h100_peers.TARGETS))

    def describe(self) -> str:
        return (
            f"{self.shape}, {self.dtype}, dummy weights; LoRA rank {self.rank} on "
            f"{', '.join(self.targets)}; at most {self.max_batch} at once; decode buckets "
            f"{self.buckets}, extend buckets {self.extend_buckets}, pages of {self.page_size}; "
            f"{self.rounds} rounds after a warm-up; seed {self.seed}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="llama-2-7b", help="(llama-2-7b)")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(bfloat16)")
    add("--cases", nargs="+", choices=GROUPS, default=GROUPS, help="groups of cases (all)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which adapters (all)")
    add("--batch", nargs="+", type=int, default=BATCHES, metavar="B", help=f"{BATCHES}")
    add("--rank", type=int, default=16, metavar="R", help="(16)")
    add("--targets", nargs="+", metavar="NAME", help="projections, or: all (attention's)")
    add("--rounds", type=int, default=3, metavar="N", help="(3)")
    add("--quick", action="store_true", help="short and few requests: does it run at all")
    add("--max-batch", type=int, default=256, metavar="N", help="requests that run at once (256)")
    add("--buckets", nargs="+", type=int, default=BATCHES, metavar="B", help=f"{BATCHES}")
    add("--extend-buckets", nargs="+", type=int, default=(512, 2048, 8192), metavar="T")
    add("--page-size", type=int, default=KVConfig().page_size, metavar="N", help="tokens")
    add("--max-seq-len", type=int, default=4096, metavar="N", help="(4096, or the shape's)")
    add("--kv-cache-bytes", type=size_bytes, metavar="B", help="(what the cases need)")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="keeps executables")
    add("--seed", type=int, default=0, metavar="N", help="prompts, adapters, popularity (0)")
    add("--budget-s", type=float, metavar="S", help="begin nothing new after this")
    add("--commit", help="what is measured, where there is no git to ask")
    add("--trace", type=Path, metavar="DIR", help="record a jax profile of each case, untimed")
    add("--out", type=Path, metavar="FILE", help="(benchmarks/results/decode-SHAPE-TIME)")


def main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    clock, plan = Clock(arguments.budget_s), make_plan(arguments)
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent / "results"
    out = arguments.out or results_dir / f"decode-{plan.shape}-{now:%Y-%m-%d-%H%M%S}.jsonl"
    clock.say(plan.describe())
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        commit = arguments.commit or environment.commit()
        bench = DecodeBench(plan, clock, lines, arguments.trace)
        try:
            bench.describe(commit)
            bench.run()
        finally:  # also when it is told to end: what was found is shown
            bench.show()
            print(f"written to {out}", flush=True)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    sizes = QUICK if arguments.quick else Sizes()
    cases = decode_cases.cases(
        sizes, arguments.cases, arguments.kinds, arguments.batch, arguments.seed
    )
    if not cases:
        raise SystemExit("no case is left: --cases, --kinds and --batch exclude each other")
    at_once = max(
        case.num_requests + (upload.ROOM if case.group == "upload" else 0) for case in cases
    )
    max_batch = min(arguments.max_batch, at_once)
    raw = SHAPES[arguments.shape]
    return Plan(
        shape=arguments.shape,
        dtype=arguments.dtype,
        rank=arguments.rank,
        targets=_targets(arguments.targets, raw["model_type"]),
        cases=tuple(cases),
        rounds=arguments.rounds,
        max_batch=max_batch,
        buckets=(*(b for b in sorted(set(arguments.buckets)) if b < max_batch), max_batch),
        extend_buckets=tuple(arguments.extend_buckets),
        page_size=arguments.page_size,
        max_seq_len=min(arguments.max_seq_len, raw["max_position_embeddings"]),
        kv_cache_bytes=arguments.kv_cache_bytes,
        cache_dir=arguments.cache_dir,
        seed=arguments.seed,
    )


def _targets(asked: Sequence[str] | None, model_type: str) -> tuple[str, ...]:
    attention = _ATTENTION.get(model_type, h100_peers.TARGETS)
    every = {
        "falcon": (*attention, "dense_h_to_4h", "dense_4h_to_h"),
    }.get(model_type, (*attention, "gate_proj", "up_proj", "down_proj"))
    return attention if asked is None else every if list(asked) == ["all"] else tuple(asked)


def engine_config(plan: Plan, model: Path, adapters: Sequence[Path]) -> EngineConfig:
    """The engine as this benchmark starts it: everything that a step's shapes depend on."""
    config = read_config(model)
    rank = max(plan.rank, 16)
    layout = BankLayout(config.projections(), plan.dtype, rank)
    need = layout.pages_needed(dict.fromkeys(plan.targets, plan.rank))
    adapter_bytes = sum(layout.page_bytes(pool) * count for pool, count in need.items())
    return EngineConfig(
        cache_dir=plan.cache_dir,
        model=ModelSource(str(model), plan.dtype, load_format="dummy"),
        steps=StepConfig(
            decode_buckets=plan.buckets,
            extend_buckets=plan.extend_buckets,
        ),
        scheduler=SchedulerConfig(
            max_batch=plan.max_batch,
            max_queued=max(256, *(case.num_requests for case in plan.cases)),
        ),
        kv=KVConfig(
            max_seq_len=plan.max_seq_len,
            cache_bytes=plan.kv_cache_bytes or _kv_bytes(plan, config),
            page_size=plan.page_size,
        ),
        adapters=AdapterConfig(
            named=tuple((folder.name, folder) for folder in adapters),
            bank_bytes=_BANK_ROOM * adapter_bytes * plan.num_slots,
            max_slots=max(1, plan.num_slots),
            max_rank=rank,
            host_cache_bytes=2 * adapter_bytes * len(adapters),
        ),
        model_id=plan.shape,
        executable_dir=plan.cache_dir / "executables",
    )


def _kv_bytes(plan: Plan, config: ModelConfig) -> int:
    """Room for every case without preempting anybody."""
    pages = max(
        min(case.num_requests, plan.max_batch) * -(-(case.num_in + case.num_out) // plan.page_size)
        for case in plan.cases
    )
    return kv_bytes(config, plan.dtype, (pages + _PAGES_TO_SPARE) * plan.page_size)


class DecodeBench:
    def __init__(self, plan: Plan, clock: Clock, lines: JsonLines, trace: Path | None) -> None:
        self._plan = plan
        self._clock = clock
        self._lines = lines
        self._trace = trace
        self._turns = {kind: upload.turns(kind, plan.num_adapters) for kind in KINDS}
        self._samples: list[Sample] = []
        self._notes: list[str] = []

    def describe(self, commit: str) -> None:
        card = environment.card()
        self._notes.append(f"{card['card']}, driver {card['driver']}, commit {commit}")
        self._clock.say(self._notes[0])
        self._lines.write(
            "run",
            description=self._plan.describe(),
            **card,
            versions=environment.versions(),
            commit=commit,
            command=environment.command(),
            machine=environment.machine(),
            figures=decode_cases.__doc__,
        )

    def run(self) -> None:
        plan, clock = self._plan, self._clock
        with tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as name:
            model = write_shape(plan.shape, Path(name) / plan.shape)
            clock.say(f"making {plan.num_adapters} adapters")
            adapters = make_adapters(
                model,
                Path(name) / "adapters",
                plan.num_adapters,
                ranks=(plan.rank,),
                targets=plan.targets,
                seed=plan.seed,
                dtype=plan.dtype,
            )
            config = engine_config(plan, model, adapters)
            if plan.has_uploads:
                alone = upload.measure_alone(config, adapters[0])
                self._notes.append(alone.describe())
                clock.say(alone.describe())
                self._lines.write("upload", **alone.fields())
            asyncio.run(self._measure_all(config))

    async def _measure_all(self, config: EngineConfig) -> None:
        start_s = time.perf_counter()
        async with await Engine.start(config, self._clock.progress) as engine:
            self._note_start(engine, time.perf_counter() - start_s)
            await self._warm_up(engine)
            for number in range(1, self._plan.rounds + 1):
                await self._round(engine, number)
            await self._trace_all(engine)
            late = engine.stats().executables_compiled_after_ready
            self._notes.append(f"executables compiled after ready: {late}")
            self._lines.write("end", executables_compiled_after_ready=late)

    def _note_start(self, engine: Engine, ready_s: float) -> None:
        pages = engine.stats().total_pages
        self._notes.append(f"ready after {ready_s:.1f} s; {pages} pages of KV")
        self._clock.say(self._notes[-1])
        self._lines.write("start", ready_s=ready_s, pages=pages)

    async def _warm_up(self, engine: Engine) -> None:
        """Every case once and short: adapters come onto the device, code is loaded."""
        for case in self._plan.cases:
            if self._clock.is_over:
                return
            await self._seconds(engine, case, _WARM_UP_TOKENS, "warm-up")

    async def _round(self, engine: Engine, number: int) -> None:
        for case in self._plan.cases:
            if self._clock.is_over:
                self._notes.append(f"out of time in round {number}, before {case.name}")
                return
            sample = await self._sample(engine, case, number)
            self._samples.append(sample)
            figure, rate = case.figure(sample), case.tokens_per_s(sample)
            text = f"{figure:.3f} {case.unit}, {rate:.0f} tok/s"
            self._clock.say(f"round {number}, {case.name}: {text}")
            self._lines.write(
                "round",
                **asdict(sample),
                figure=figure,
                unit=case.unit,
                tokens_per_s=rate,
            )

    async def _sample(self, engine: Engine, case: Case, number: int) -> Sample:
        first_s = 0.0
        if case.needs_first:
            first_s = await self._seconds(engine, case, 1, f"first {number}")
        if case.num_out == 1:
            return Sample(case.name, number, first_s, first_s)
        uploads = upload.num_uploads(engine)
        whole_s, times_s = await self._answer(engine, case, case.num_out, f"whole {number}")
        if case.group == "upload":
            self._note_visitors(case, number, upload.num_uploads(engine) - uploads, times_s)
        return Sample(case.name, number, first_s, whole_s)

    def _note_visitors(
        self, case: Case, number: int, uploads: int, times_s: Sequence[Sequence[float]]
    ) -> None:
        gaps = upload.gaps_ms(times_s)
        between = ", ".join(f"{name} {value:.2f}" for name, value in gaps.items())
        self._notes.append(f"round {number}, {case.name}: {uploads} uploads, {between}")
        self._lines.write("visitors", case=case.name, round=number, uploads=uploads, **gaps)

    async def _seconds(self, engine: Engine, case: Case, num_out: int, seed: str) -> float:
        return (await self._answer(engine, case, num_out, seed))[0]

    async def _answer(
        self, engine: Engine, case: Case, num_out: int, seed: str
    ) -> tuple[float, list[list[float]]]:
        """All requests at once, each in a task of its own, as a server's handlers would: seconds in
        all, and when each answer's tokens came."""
        prompts = decode_cases.prompts(
            case, engine.model_info.vocab_size, f"{self._plan.seed} {seed}"
        )
        requests = [
            _request(case, prompt, adapter, num_out)
            for prompt, adapter in zip(prompts, case.adapters, strict=True)
        ]
        async with self._visitors(engine, case):
            start_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(_token_times(engine, request)) for request in requests]
            seconds = time.perf_counter() - start_s
        times_s = [answer.result() for answer in answers]
        if wrong := [times for times in times_s if len(times) != num_out]:
            raise RuntimeError(f"{case.name}: {len(wrong)} answers have not {num_out} tokens")
        return seconds, times_s

    def _visitors(self, engine: Engine, case: Case) -> AbstractAsyncContextManager[None]:
        if case.group != "upload":
            return nullcontext()
        return upload.visitors(engine, self._turns[case.kind])

    async def _trace_all(self, engine: Engine) -> None:
        """A profile a case, of a few steps: a profiled step is slower, so it is not timed."""
        if self._trace is None:
            return
        import jax

        for case in self._plan.cases:
            with jax.profiler.trace(str(self._trace / case.name.replace(" ", "-"))):
                await self._seconds(engine, case, min(16, case.num_out), "trace")

    def show(self) -> None:
        """The table comes last: whoever cuts a long output keeps its end."""
        peers = h100_peers.PEERS if self._plan.is_peers else {}
        rows = decode_table.rows(self._plan.cases, self._samples, peers)
        for row in rows:
            self._lines.write("summary", **asdict(row))
        print("\n".join(["", self._plan.describe(), *self._notes, ""]))
        print(decode_table.as_text(rows), flush=True)


def _request(
    case: Case, prompt: tuple[int, ...], adapter: int | None, num_out: int
) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        adapter_id=None if adapter is None else upload.adapter_name(adapter),
        sampling=_SAMPLED if case.group == "sampling" else SamplingParams(),
        max_new_tokens=num_out,
        ignore_eos=True,
        detokenize=False,
    )


async def _token_times(engine: Engine, request: GenerateRequest) -> list[float]:
    return [time.perf_counter() async for _ in engine.generate(request)]
