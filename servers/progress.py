"""Shows what a start is doing: bars on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StartProgress:
    """Call it as a ``jlorax.types.Progress``, from any thread."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, fraction: float) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=1.0)
            self._line(f"{what} ...")
        self._bars.update(self._tasks[what], completed=fraction)
        if fraction >= 1.0 and what not in self._finished:
            self._finished.add(what)
            self._line(f"{what}: done")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)
