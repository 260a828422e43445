"""Kernels alone: ours beside XLA, jax's own and cuDNN, each against the floor of the card.

A module of this folder has ``cases()`` and ``sweep()``, each a list of KernelCase, of one op or
several; a sweep's contestants are candidates, named by the line that tuning.py would hold.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.clock import Clock
from benchmarks.kernels import table, timing
from benchmarks.kernels.protocol import KernelCase
from benchmarks.kernels.results import Result
from benchmarks.report import JsonLines

OPS = ("grouped_lora", "paged_attention", "paged_extend", "sampling", "skinny_matmul")
_REPEATS, _SWEEP_REPEATS = 11, 5
_CASES_AT_ONCE = 4  # compiled together, so that every core has work
_BYTES_AT_ONCE = 16 << 30
_BEST = 3  # candidates of a sweep's case that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", default=OPS, metavar="NAME", help=f"{', '.join(OPS)}")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name has this in it")
    parser.add_argument("--sweep", action="store_true", help="time the candidates for tuning.py")
    parser.add_argument("--repeats", type=int, metavar="N", help="(11; 5 in a sweep)")
    parser.add_argument("--budget-s", type=float, metavar="S", help="begin nothing new after this")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="(benchmarks/results/kernels-TIME)"
    )


def main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    now = datetime.datetime.now(datetime.UTC)
    results_dir = Path(__file__).parent.parent / "results"
    out = arguments.out or results_dir / f"kernels-{now:%Y-%m-%d-%H%M%S}.jsonl"
    with JsonLines(out, f"{now:%Y-%m-%dT%H:%M:%SZ}") as lines:
        bench = KernelBench(arguments, lines)
        try:
            for op in arguments.op:
                bench.run(op)
        finally:  # also when it is told to end: what was found is shown
            bench.show()
            print(f"written to {out}", flush=True)
    return 0


class KernelBench:
    def __init__(self, arguments: argparse.Namespace, lines: JsonLines) -> None:
        self._is_sweep: bool = arguments.sweep
        self._case: str = arguments.case or ""
        self._repeats: int = arguments.repeats or (_SWEEP_REPEATS if self._is_sweep else _REPEATS)
        self._clock = Clock(arguments.budget_s)
        self._lines = lines
        self._origin: dict[str, Any] = {
            **environment.card(),
            "versions": environment.versions(),
            "commit": arguments.commit or environment.commit(),
            "command": environment.command(),
        }
        self._plug = timing.Plug()
        self._found: list[Result] = []
        self._problems: list[str] = []
        self._clock.say(f"{self._origin['card']}, driver {self._origin['driver']}")

    def run(self, op: str) -> None:
        """All cases of one op; whatever goes wrong in it is noted, and the next op goes on."""
        try:
            module = importlib.import_module(f"benchmarks.kernels.{op}")
            cases = module.sweep() if self._is_sweep else module.cases()
            self._run_cases(op, [case for case in cases if self._case in case.name])
        except Exception as error:
            self._problems.append(f"{op}: {timing.describe(error)}")

    def _run_cases(self, op: str, cases: Sequence[KernelCase]) -> None:
        waiting = deque(cases)
        with timing.compiler_threads() as threads:
            while waiting and not self._clock.is_over:
                self._run_some(waiting, threads)
        if waiting:
            self._problems.append(f"{op}: no time for {len(waiting)} of {len(cases)} cases")

    def _run_some(self, waiting: deque[KernelCase], threads: ThreadPoolExecutor) -> None:
        """Compiles the next few cases together, then times them one by one; their arrays go."""
        together = self._prepare_some(waiting, threads)
        for prepared in together:
            timing.wait(prepared)
        while together and not self._clock.is_over:
            self._measure(together.pop(0))
        waiting.extendleft(prepared.case for prepared in reversed(together))

    def _prepare_some(
        self, waiting: deque[KernelCase], threads: ThreadPoolExecutor
    ) -> list[timing.Prepared]:
        """The next few cases, as many as fit into memory together."""
        together: list[timing.Prepared] = []
        while waiting and len(together) < _CASES_AT_ONCE:
            if sum(p.size_bytes for p in together) > _BYTES_AT_ONCE:
                break
            case = waiting[0]
            self._clock.say(f"{case.op}, {case.name}: building")
            try:
                together.append(timing.prepare(case, threads))
            except Exception as error:
                if together:  # perhaps for want of memory: again, alone
                    break
                self._keep(timing.failed(case, error))
            waiting.popleft()
        return together

    def _measure(self, prepared: timing.Prepared) -> None:
        results = timing.measure(prepared, self._plug, self._repeats)
        for result in results:
            self._keep(result)
        self._clock.say(f"{prepared.case.op}, {prepared.case.name}: {_in_short(results)}")

    def _keep(self, result: Result) -> None:
        self._found.append(result)
        kind = "sweep" if self._is_sweep else "kernel"
        self._lines.write(kind, **asdict(result), **self._origin)

    def show(self) -> None:
        """The tables come last: whoever cuts a long output keeps its end."""
        print("\n".join(["", *self._problems]))
        for op in dict.fromkeys(r.op for r in self._found):
            results = [r for r in self._found if r.op == op]
            shown = table.sweep_lines(results, _BEST) if self._is_sweep else None
            print(f"\n{shown or table.op_table(op, results)}", flush=True)


def _in_short(results: Sequence[Result]) -> str:
    """What is worth a progress line: the quickest, and how many were not timed."""
    timed = [(r.us.median, r.contestant) for r in results if r.us is not None]
    missing = f"; {len(results) - len(timed)} not timed" if len(timed) < len(results) else ""
    return f"{min(timed)[0]:.1f} us by {min(timed)[1]}{missing}" if timed else f"none{missing}"
