"""Create an adapter in a few lines: ``jlorax.finetune`` and the job behind it.

The training runs in a process of its own, so that its memory is free when it ends, and so that it
can be cancelled at any time. This module imports no jax.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jlorax.defaults import default_cache_dir
from jlorax.errors import RequestCancelled, TrainingFailed
from jlorax.training.aliases import config_from_mapping
from jlorax.training.bars import TrainingBars
from jlorax.training.config import TrainConfig
from jlorax.training.events import (
    Cancelled,
    Ended,
    Evaluated,
    Event,
    Failed,
    StepDone,
    parse_event,
)
from jlorax.training.process import JobFile, command, environment
from jlorax.training.records import write_json_lines


@dataclass(frozen=True)
class TrainedAdapter:
    """A version that is there for good: its name for requests, its PEFT folder, how it did."""

    adapter_id: str
    folder: Path
    metrics: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """How it was made: configuration, data and their digest, seed, versions, every loss."""
        found: dict[str, Any] = json.loads((self.folder / "training.json").read_text())
        return found

    def __str__(self) -> str:
        return self.adapter_id


class FinetuneJob:
    """A training that runs. Its events are kept: any number of watchers see all of them."""

    def __init__(self, config: TrainConfig, cache_dir: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="jlorax-train-")
        file = JobFile.of(config, cache_dir).write(Path(self._scratch.name) / "job.json")
        self._errors = (Path(self._scratch.name) / "stderr").open("w+b")
        self._process = subprocess.Popen(
            command(file),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )
        self._events: list[Event] = []
        self._news = threading.Condition()
        self._has_ended = False
        threading.Thread(target=self._listen, name="jlorax-train", daemon=True).start()

    def watch(self) -> Iterator[Event]:
        """Every event from the first on, as they come, until the training has ended."""
        seen = 0
        while fresh := self._after(seen):
            yield from fresh
            seen += len(fresh)

    def cancel(self) -> None:
        """Ends it within a step, with a checkpoint; the same call as before continues it."""
        self._process.terminate()

    @property
    def metrics(self) -> dict[str, float]:
        """The last step's loss and speed, and the last evaluation's loss."""
        told: dict[str, float] = {}
        with self._news:
            for event in self._events:
                if isinstance(event, StepDone):
                    told |= {
                        "step": event.step,
                        "loss": event.loss,
                        "tokens_per_s": event.tokens_per_s,
                    }
                elif isinstance(event, Evaluated):
                    told["validation_loss"] = event.loss
        return told

    def result(self) -> TrainedAdapter:
        """Waits for the end. RequestCancelled, or TrainingFailed with the reason, if there is no
        adapter."""
        for event in self.watch():
            match event:
                case Ended():
                    return TrainedAdapter(event.adapter_id, Path(event.folder), event.metrics)
                case Cancelled(step):
                    raise RequestCancelled(f"the training was cancelled after step {step}")
                case Failed(code, message):
                    raise TrainingFailed(code, message)
        raise TrainingFailed("internal", self._last_words())

    def _after(self, seen: int) -> list[Event]:
        """Waits for more; none: it has ended."""
        with self._news:
            self._news.wait_for(lambda: len(self._events) > seen or self._has_ended)
            return self._events[seen:]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._events.append(parse_event(line))
                self._news.notify_all()
        self._process.wait()
        with self._news:
            self._has_ended = True
            self._news.notify_all()

    def _last_words(self) -> str:
        self._errors.seek(0)
        words = self._errors.read()[-2000:].decode(errors="replace").strip()
        return f"its process ended with status {self._process.returncode}: {words}"


def start_finetune(
    base: str | None = None,
    dataset: Any = None,
    *,
    cache_dir: str | Path | None = None,
    **settings: Any,
) -> FinetuneJob:
    """Starts a training and returns its job; ``finetune`` says what the arguments are."""
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir(os.environ)
    if dataset is not None and not isinstance(dataset, str | Path):
        dataset = _kept_rows(dataset, cache)
    given = {"base": base, "dataset": dataset, **settings}
    named = {key: _plain(value) for key, value in given.items() if value is not None}
    return FinetuneJob(config_from_mapping(named), cache)


def finetune(
    base: str | None = None,
    dataset: Any = None,
    *,
    cache_dir: str | Path | None = None,
    **settings: Any,
) -> TrainedAdapter:
    """Trains a LoRA and returns it when it is there.

    base: a folder, a GGUF file, a hub id; None: the embedded model. dataset: a JSONL, JSON, CSV or
    Parquet file, a list of dicts, or a DataFrame, with the columns ``prompt`` and ``completion``,
    ``messages``, or ``text``. settings: any key of a configuration (``name``, ``rank``,
    ``epochs``, ``output_root``, ...).

    Bars on a terminal's standard error show how it goes. Raises ConfigError before anything is
    started, TrainingFailed with the reason afterwards. Run again after an interruption, it
    continues.
    """
    job = start_finetune(base, dataset, cache_dir=cache_dir, **settings)
    try:
        with TrainingBars(Console(stderr=True)) as bars:
            for event in job.watch():
                bars(event)
        return job.result()
    except BaseException:
        job.cancel()
        raise


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _kept_rows(rows: Any, cache_dir: Path) -> str:
    """Rows in memory as a file that is named after its content, so that a training that is started
    again finds the same data."""
    folder = cache_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        written = Path(file.name)
    try:
        write_json_lines(rows, written)
        digest = hashlib.sha256(written.read_bytes()).hexdigest()
        return str(written.replace(folder / f"{digest[:32]}.jsonl"))
    finally:
        written.unlink(missing_ok=True)
