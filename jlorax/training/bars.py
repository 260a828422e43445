"""A training's progress for people: bars on a terminal, the data's report anywhere. Plain."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from jlorax.training.events import Began, Ended, Evaluated, Event, Preparing, StepDone


class TrainingBars:
    """A Report: a bar for each thing that is prepared, and one for the steps."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[told]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._num_steps = 0
        self._validation = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Preparing(what, fraction):
                self._show(what, fraction, 1.0, f"{fraction:.0%}")
            case Began():
                self._num_steps = event.num_steps
                self._bars.console.print(_about_data(event))
                self._show("training", event.step, event.num_steps, "compiling the first step")
            case StepDone():
                self._show("training", event.step, self._num_steps, self._told(event))
            case Evaluated():
                self._validation = f"validation {event.loss:.3f}  "
            case Ended():
                self._bars.console.print(f"{event.reason} after {event.metrics['steps']} steps")

    def _told(self, step: StepDone) -> str:
        left = timedelta(seconds=round(step.eta_s))
        return (
            f"{step.step}/{self._num_steps}  loss {step.loss:.3f}  {self._validation}"
            f"{step.tokens_per_s:,.0f} tokens/s  {left} left"
        )

    def _show(self, what: str, done: float, total: float, told: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, told="")
        self._bars.update(self._tasks[what], completed=done, told=told)


def _about_data(began: Began) -> str:
    """What became of the rows: cut and left out ones are named."""
    data = began.data
    told = [f"{data['num_used']:,} of {data['num_rows']:,} rows are used"]
    told += [
        f"{data[key]:,} {what}"
        for key, what in (
            ("num_validation", "for validation"),
            ("num_truncated", "cut to max_seq_len"),
            ("num_dropped", "too long or with nothing to learn"),
            ("num_empty", "empty"),
        )
        if data[key]
    ]
    return f"{', '.join(told)}; {began.num_parameters:,} parameters are trained"
