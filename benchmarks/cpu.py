"""SmolLM2 in float32 on this CPU: jlorax beside torch + peft, and llama.cpp where it is installed.

Every contestant is a process of its own that stays up; they take turns round by round, and in each
round another one begins. Same prompts (token ids), same adapters, greedy, end of text ignored.
``report`` says how the two rates are computed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import cpu_cases, environment, gguf_files, report
from benchmarks.contestants.process import ContestantProcess
from benchmarks.contestants.protocol import Setup
from benchmarks.cpu_cases import LLAMA, OURS, PEFT, Case
from benchmarks.make_adapters import default_cache_dir, make_adapters
from benchmarks.report import RATES, JsonLines, Measurement, Measurements
from jlorax.models.embedded import EMBEDDED_MODEL_ID, ensure_embedded_model

MODULES = {
    OURS: "benchmarks.contestants.jlorax_engine",
    PEFT: "benchmarks.contestants.torch_peft",
    LLAMA: "benchmarks.contestants.llama_cpp",
}
WARM_UP_TOKENS = 2
_PLAIN_WIDTH = 120  # columns of a table that goes to a file
_BUSY_LOAD = 0.5  # above, something else runs on this machine


@dataclass(frozen=True)
class Plan:
    """How much is measured, and by which interpreter each contestant runs."""

    pythons: dict[str, str]
    rounds: int = 7
    num_out: int = 128  # tokens
    num_later_starts: int = 3  # of ours, after the first
    few_executables: bool = False
    seed: int = 0

    def describe(self) -> str:
        return (
            f"{EMBEDDED_MODEL_ID}, float32, {environment.num_cores()} threads; "
            f"{cpu_cases.NUM_IN} tokens in, {self.num_out} out, greedy, end of text ignored; LoRA "
            f"rank {cpu_cases.RANK} on q, k, v, o, lora_B not zero, unmerged; {self.rounds} rounds "
            f"in turns after a warm-up; seed {self.seed}; contestants: {', '.join(self.pythons)}"
        )


@dataclass
class Findings:
    """What a run has found so far."""

    ready_s: dict[str, list[float]] = field(default_factory=dict)  # a process start each
    measured: list[Measurement] = field(default_factory=list)
    tokens: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)  # the last round's
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, metavar="N", help="(7)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="prompts, adapters (0)")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run at all")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python with llama-cpp-python")
    parser.add_argument("--only", nargs="+", choices=tuple(MODULES), help="these contestants")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(benchmarks/results/cpu-DATE)")


def main(arguments: argparse.Namespace) -> int:
    now = datetime.datetime.now(datetime.UTC)
    out = arguments.out or Path(__file__).parent / "results" / f"cpu-{now:%Y-%m-%d}.jsonl"
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        run(_plan(arguments), lines, console)
    console.print(f"written to {out}")
    return 0


def run(plan: Plan, lines: JsonLines, console: Console) -> None:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jlorax-benchmark-")))
        found = Findings()
        _describe(plan, lines, console)
        _prepare(plan, work)
        running = _start(plan, work, found, lines, console, stack)
        _take_turns(plan, running, found, lines, console)
        _ask_all(running, found)
    _write_summary(found, lines)
    _show(found, console)


def _plan(arguments: argparse.Namespace) -> Plan:
    pythons = _pythons(arguments.only or tuple(MODULES), arguments.llama_python)
    if arguments.quick:
        rounds = arguments.rounds or 1
        return Plan(pythons, rounds, 8, 1, few_executables=True, seed=arguments.seed)
    return Plan(pythons, arguments.rounds or 7, seed=arguments.seed)


def _pythons(wanted: Sequence[str], llama_python: str | None) -> dict[str, str]:
    """llama.cpp takes part only where it is."""
    pythons = {name: sys.executable for name in MODULES if name in wanted}
    if LLAMA in pythons and llama_python is not None:
        pythons[LLAMA] = llama_python
    elif LLAMA in pythons and importlib.util.find_spec("llama_cpp") is None:
        del pythons[LLAMA]
    return pythons


def _describe(plan: Plan, lines: JsonLines, console: Console) -> None:
    machine, load = environment.machine(), environment.load()
    console.print(plan.describe(), style="bold")
    console.print(f"{machine['cpu']}, {machine['cores']} cores; load {load:.2f}")
    if load > _BUSY_LOAD:
        console.print("something else is running on this machine", style="red")
    if LLAMA not in plan.pythons:
        console.print("llama.cpp takes no part (pip install '.[llama-cpp]', or --llama-python)")
    lines.write(
        "run",
        description=plan.describe(),
        commit=environment.commit(),
        machine=machine,
        load=load,
        rates=report.__doc__,
    )


def _prepare(plan: Plan, work: Path) -> None:
    """The model's folder and the adapters; both as GGUF when llama.cpp takes part."""
    model = ensure_embedded_model(default_cache_dir())
    folders = make_adapters(
        model, work / "adapters", cpu_cases.BATCH, ranks=(cpu_cases.RANK,), seed=plan.seed
    )
    ggufs = {folder.name: work / f"{folder.name}.gguf" for folder in folders}
    if LLAMA in plan.pythons:
        gguf_files.write_model(model, work / "model.gguf")
        for folder in folders:
            gguf_files.write_adapter(folder, model, ggufs[folder.name])
    Setup(
        model=str(model),
        adapters={folder.name: str(folder) for folder in folders},
        model_gguf=str(work / "model.gguf"),
        adapter_ggufs={name: str(path) for name, path in ggufs.items()},
        prompts=cpu_cases.prompts(plan.seed),
        num_out=plan.num_out,
        num_threads=environment.num_cores(),
        executables=str(work / "cache" / "executables"),
        few_executables=plan.few_executables,
    ).write(work / "setup.json")


def _start(
    plan: Plan,
    work: Path,
    found: Findings,
    lines: JsonLines,
    console: Console,
    stack: ExitStack,
) -> dict[str, ContestantProcess]:
    """One by one. Ours first with an empty store of executables, then again; the last one stays."""
    running = {}
    for name in plan.pythons:
        num_starts = 1 + plan.num_later_starts if name == OURS else 1
        for i in range(num_starts):
            with console.status(f"starting {name}, {i + 1} of {num_starts}"):
                process = _open(plan, work, name)
            found.ready_s.setdefault(name, []).append(process.ready_s)
            console.print(f"{name}: ready after {process.ready_s:.1f} s")
            if i + 1 < num_starts:
                process.close()
        running[name] = stack.enter_context(process)
        lines.write(
            "start", contestant=name, ready_s=found.ready_s[name], packages=process.packages
        )
    return running


def _open(plan: Plan, work: Path, name: str) -> ContestantProcess:
    log, setup = work / f"{name}.log", work / "setup.json"
    return ContestantProcess(name, plan.pythons[name], MODULES[name], setup, log)


def _take_turns(
    plan: Plan,
    running: dict[str, ContestantProcess],
    found: Findings,
    lines: JsonLines,
    console: Console,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    steps = [
        (number, case, name)
        for number in range(plan.rounds + 1)  # round 0 warms up and is not kept
        for case, name in cpu_cases.turns(list(running), number)
    ]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(steps))
        for number, case, name in steps:
            progress.update(bar, description=f"round {number}: {name}, {case.name}")
            if number == 0:
                running[name].run(case.adapters, WARM_UP_TOKENS)
            else:
                _measure(number, case, running[name], plan.num_out, found, lines)
            progress.advance(bar)


def _measure(
    number: int,
    case: Case,
    contestant: ContestantProcess,
    num_out: int,
    found: Findings,
    lines: JsonLines,
) -> None:
    first_s, _ = contestant.run(case.adapters, 1)
    whole_s, tokens = contestant.run(case.adapters, num_out)
    if [len(row) for row in tokens] != [num_out] * len(case.adapters):
        raise RuntimeError(f"{contestant.name}, {case.name}: a row has not {num_out} tokens")
    batch = len(case.adapters)
    measured = Measurement(contestant.name, case.name, number, batch, num_out, first_s, whole_s)
    found.measured.append(measured)
    found.tokens[contestant.name, case.name] = tokens
    rates = {name: rate(measured) for name, rate in RATES.items()}
    lines.write("round", **asdict(measured), **rates, load=environment.load())


def _ask_all(running: dict[str, ContestantProcess], found: Findings) -> None:
    for name, process in running.items():
        found.peak_rss_bytes[name], found.notes[name] = process.describe()


def _agreements(found: Findings) -> dict[tuple[str, str], float]:
    """(peer, case) -> the share of its tokens that are ours."""
    return {
        (name, case): cpu_cases.agreement(found.tokens[OURS, case], tokens)
        for (name, case), tokens in found.tokens.items()
        if name != OURS and (OURS, case) in found.tokens
    }


def _write_summary(found: Findings, lines: JsonLines) -> None:
    measured, agreements = Measurements(found.measured), _agreements(found)
    for name in measured.contestants:
        for case in measured.cases:
            spreads = {what: measured.spread(name, case, rate) for what, rate in RATES.items()}
            lines.write(
                "summary",
                contestant=name,
                case=case,
                tokens_as_ours=agreements.get((name, case)),
                **{what: asdict(spread) for what, spread in spreads.items() if spread},
            )
        rss, notes = found.peak_rss_bytes[name], found.notes[name]
        ready_s = found.ready_s[name]
        lines.write("process", contestant=name, ready_s=ready_s, peak_rss_bytes=rss, notes=notes)
    for verdict in cpu_cases.verdicts(measured, found.ready_s):
        lines.write("target", **asdict(verdict), met=verdict.is_met)


def _show(found: Findings, console: Console) -> None:
    measured = Measurements(found.measured)
    table = report.rate_table("tokens per second", measured, OURS)
    _add_processes(table, measured.contestants, found)
    console.print(table)
    for name, notes in found.notes.items():
        for what, note in notes.items():
            console.print(f"{name}: {what}: {note}", highlight=False)
    for (name, case), share in _agreements(found).items():
        console.print(f"{name}: {case}: {share:.0%} of the tokens as ours", highlight=False)
    for verdict in cpu_cases.verdicts(measured, found.ready_s):
        console.print(str(verdict), highlight=False)


def _add_processes(table: Table, measured: list[str], found: Findings) -> None:
    names = [OURS, *(name for name in measured if name != OURS)]
    starts = [found.ready_s.get(name, []) for name in names]
    later = [s[1:] or s for s in starts]  # peers compile nothing: their only start is a later one
    report.add_figures(
        table,
        [
            ("first start, s", [f"{s[0]:.1f}" if len(s) > 1 else "-" for s in starts]),
            ("later start, s", [f"{statistics.median(s):.1f}" if s else "-" for s in later]),
            ("peak RSS, MiB", [f"{found.peak_rss_bytes.get(n, 0) / 2**20:.0f}" for n in names]),
        ],
    )
