"""A training's curves as files: ``loss.png`` beside the adapter, TensorBoard's in ``log_dir``.

Both packages are optional. Without matplotlib there is no picture; a ``log_dir`` that cannot be
filled is an error before the start, as it was asked for.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jlorax.errors import ConfigError
from jlorax.training.events import Ended, Evaluated, Event, Report, StepDone

CURVE_FILE = "loss.png"
RECORD_FILE = "training.json"

_log = logging.getLogger(__name__)


@contextmanager
def with_curves(report: Report, log_dir: str | None) -> Iterator[Report]:
    """A Report that tells ``report``, and draws. ConfigError when ``log_dir`` cannot be filled."""
    board = None if log_dir is None else _TensorBoard(Path(log_dir).expanduser())

    def tell(event: Event) -> None:
        if board is not None:
            board(event)
        if isinstance(event, Ended):
            _draw_if_possible(Path(event.folder))
        report(event)

    try:
        yield tell
    finally:
        if board is not None:
            board.close()


class _TensorBoard:
    """Every step's figures, by the step's number: what continues a training continues its curve."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError:
            raise ConfigError("log_dir needs tensorboard: pip install tensorboard") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = Writer(str(folder))
        except OSError as error:
            raise ConfigError(f"log_dir {str(folder)!r} cannot be written: {error}") from None

    def __call__(self, event: Event) -> None:
        match event:
            case StepDone():
                self._add("loss/train", event.loss, event.step)
                for name in ("learning_rate", "grad_norm", "tokens_per_s"):
                    self._add(name, getattr(event, name), event.step)
            case Evaluated():
                self._add("loss/validation", event.loss, event.step)

    def _add(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _draw_if_possible(folder: Path) -> None:
    """The adapter is there already: a picture that cannot be drawn takes nothing from it."""
    try:
        draw(folder)
    except ImportError:
        _log.info("no %s: matplotlib is not installed", CURVE_FILE)
    except OSError as error:
        _log.warning("%s cannot be written: %s", folder / CURVE_FILE, error)


def draw(folder: Path) -> Path:
    """The losses that an adapter's record holds, as ``folder/loss.png``; ImportError without
    matplotlib."""
    from matplotlib.figure import Figure

    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    _line(axes, record["history"]["losses"], label="training", alpha=0.7)
    _line(axes, record["history"]["evaluations"], label="validation", marker="o")
    axes.set_title(f"{folder.parent.name}/{folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    written = folder / f".{CURVE_FILE}.tmp"
    figure.savefig(written, format="png", dpi=120)
    os.replace(written, folder / CURVE_FILE)
    return folder / CURVE_FILE


def _line(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    if points:
        axes.plot([step for step, _ in points], [loss for _, loss in points], **style)
