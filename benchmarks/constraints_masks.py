"""What masks cost the host: in the engine's own threads while it decodes, and on their way to it.

mask     us from a token to the mask for the next, as a thread of the grammars' sees it: its time on
         the clock, in which it may wait for the interpreter, and of a processor
upload   us of the device's thread to send one step's masks, and until they are there
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.report import Spread, spread
from jlorax.actors.grammar import Compiler, Grammar, Matcher
from jlorax.device.executables import ExecutableStore
from jlorax.device.row_writer import RowWriter
from jlorax.device.step import empty_rows
from jlorax.layout import RowWrites, mask_words
from jlorax.types import Constraint

_REPEATS = 50


@dataclass
class MaskTimes:
    """Of one token each; any thread appends."""

    clock_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)

    def extend(self, others: MaskTimes) -> None:
        self.clock_s += others.clock_s
        self.processor_s += others.processor_s


class TimedCompiler:
    """A compiler whose grammars note what their masks take; ``times`` may be taken out."""

    def __init__(self, compiler: Compiler) -> None:
        self.times = MaskTimes()
        self._compiler = compiler

    def compile(self, constraint: Constraint) -> Grammar:
        return _TimedGrammar(self._compiler.compile(constraint), self)

    def close(self) -> None:
        self._compiler.close()


class _TimedGrammar:
    def __init__(self, grammar: Grammar, compiler: TimedCompiler) -> None:
        self._grammar = grammar
        self._compiler = compiler

    def matcher(self) -> Matcher:
        return _TimedMatcher(self._grammar.matcher(), self._compiler)


class _TimedMatcher:
    """From ``accept`` to the end of ``mask``; the first mask, before any token, is not counted."""

    def __init__(self, matcher: Matcher, compiler: TimedCompiler) -> None:
        self._matcher = matcher
        self._compiler = compiler
        self._begin: tuple[float, float] | None = None

    def accept(self, token_id: int) -> None:
        self._begin = time.perf_counter(), time.thread_time()
        self._matcher.accept(token_id)

    def mask(self) -> np.ndarray:
        mask = self._matcher.mask()
        if self._begin is not None:
            clock_s, processor_s = self._begin
            times = self._compiler.times
            times.clock_s.append(time.perf_counter() - clock_s)
            times.processor_s.append(time.thread_time() - processor_s)
        return mask

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_finished

    @property
    def is_dead(self) -> bool:
        return self._matcher.is_dead

    @property
    def is_slow(self) -> bool:
        return self._matcher.is_slow


@dataclass(frozen=True)
class Upload:
    """us of a step's masks."""

    num_rows: int
    thread_us: Spread
    ready_us: Spread

    def describe(self) -> str:
        return (
            f"masks of {self.num_rows} rows: the device's thread is free after "
            f"{self.thread_us.median:.0f} us, they are there after {self.ready_us.median:.0f}"
        )


def measure_upload(num_rows: int, vocab_size: int, executable_dir: Path | None) -> Upload:
    """Into rows of its own, before the engine is there."""
    rows = empty_rows(num_rows, vocab_size)
    with ExecutableStore(executable_dir, repr((num_rows, vocab_size))) as store:
        writer = RowWriter(rows, store)
    rows = writer.warm_up(rows)
    mask = np.full(mask_words(vocab_size), -1, np.int32)
    writes = RowWrites(tuple((row, mask) for row in range(num_rows)))
    thread_s, ready_s = [], []
    for _ in range(_REPEATS):
        rows.masks.block_until_ready()
        begin_s = time.perf_counter()
        rows = writer.write(rows, writes)
        thread_s.append(time.perf_counter() - begin_s)
        rows.masks.block_until_ready()
        ready_s.append(time.perf_counter() - begin_s)
    return Upload(num_rows, _us(thread_s), _us(ready_s))


def _us(seconds: Sequence[float]) -> Spread:
    return spread(1e6 * s for s in seconds)
