"""From a configuration to a published adapter, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from jlorax.training.config import TrainConfig
from jlorax.training.curves import with_curves
from jlorax.training.events import Report, no_report
from jlorax.training.preparation import prepare
from jlorax.training.process import JobFile
from jlorax.training.repository import Published
from jlorax.training.trainer import Trainer


def train(
    config: TrainConfig,
    cache_dir: Path,
    report: Report = no_report,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Published | None:
    """None when it was cancelled. Raises a JLoraxError; what could be known before the first step
    is raised before it."""
    keep_compiled(cache_dir)
    with with_curves(report, config.run.log_dir) as told:
        return Trainer(prepare(config, cache_dir, told), told, is_cancelled).run()


def run(job: JobFile, report: Report, is_cancelled: Callable[[], bool]) -> Published | None:
    return train(TrainConfig.from_dict(job.config), Path(job.cache_dir), report, is_cancelled)


def keep_compiled(cache_dir: Path) -> None:
    """A step is compiled once for a shape: half a minute that later trainings save."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
