"""What is known of every job, and what a training's events make of it. Single writer: the service.
Plain."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jlorax.errors import NotFound
from jlorax.jobs.types import JobError, JobEvent, JobStatus, TrainingJob
from jlorax.training.events import (
    Began,
    Cancelled,
    Ended,
    Evaluated,
    Event,
    Failed,
    Preparing,
    Saved,
    StepDone,
)

MAX_JOBS = 1_000  # the oldest that have ended are forgotten
MAX_EVENTS = 1_000  # of a job, the newest


@dataclass
class _Entry:
    job: TrainingJob
    events: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    num_events: int = 0
    num_data_tokens: int = 0  # of an epoch
    preparing: str | None = None  # what was told last of its being prepared


class JobBook:
    """``clock``: Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    # ---- what is known

    def find(self, job_id: str) -> TrainingJob:
        return self._entry(job_id).job

    def jobs(self) -> list[TrainingJob]:
        """The newest first."""
        return [entry.job for entry in reversed(self._entries.values())]

    def open_jobs(self) -> list[TrainingJob]:
        """Those that have not ended."""
        return [job for job in self.jobs() if not job.status.is_final]

    def events(self, job_id: str) -> list[JobEvent]:
        """The oldest first."""
        return list(self._entry(job_id).events)

    # ---- what happens

    def add(self, job: TrainingJob) -> None:
        self._entries[job.job_id] = _Entry(job)
        ended = [id_ for id_, entry in self._entries.items() if entry.job.status.is_final]
        for job_id in ended[: max(0, len(self._entries) - MAX_JOBS)]:
            del self._entries[job_id]
        self._tell(job.job_id, f"the job {job.job_id} is created")

    def start(self, job_id: str) -> None:
        self._change(job_id, status=JobStatus.VALIDATING)
        self._tell(job_id, "the data is being read")

    def take(self, job_id: str, event: Event) -> None:
        """What its training says."""
        match event:
            case Preparing(what):
                self._prepare(job_id, what, event)
            case Began():
                self._entry(job_id).num_data_tokens = int(event.data.get("num_tokens", 0))
                self._change(job_id, status=JobStatus.RUNNING)
                self._tell(job_id, _beginning(event), told=event)
            case StepDone():
                self._step(job_id, event)
            case Evaluated(step, loss):
                data = {"step": step, "valid_loss": loss, "is_best": event.is_best}
                self._tell(job_id, f"step {step}: validation loss {loss:.4f}", data, event)
            case Saved(step):
                self._tell(job_id, f"a checkpoint of step {step} is kept", told=event)
            case Ended():
                self._succeed(job_id, event)
            case Cancelled(step):
                self._finish(job_id, JobStatus.CANCELLED)
                self._tell(job_id, f"cancelled after step {step}", told=event, level="warn")
            case Failed(code, message):
                self._finish(job_id, JobStatus.FAILED, error=JobError(code, message))
                self._tell(job_id, message, told=event, level="error")

    def _prepare(self, job_id: str, what: str, event: Event) -> None:
        """Once for each thing that is done, not for each part of it."""
        entry = self._entry(job_id)
        if entry.preparing != what:
            entry.preparing = what
            self._tell(job_id, what, told=event)

    def _step(self, job_id: str, event: StepDone) -> None:
        entry, now = self._entry(job_id), int(self._clock())
        self._change(
            job_id,
            num_trained_tokens=round(event.epoch * entry.num_data_tokens),
            estimated_finish_s=now + round(event.eta_s),
        )
        data = {
            "step": event.step,
            "train_loss": event.loss,
            "epoch": event.epoch,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens_per_s": event.tokens_per_s,
        }
        self._tell(job_id, f"step {event.step}: training loss {event.loss:.4f}", data, event)

    def _succeed(self, job_id: str, event: Ended) -> None:
        self._finish(
            job_id, JobStatus.SUCCEEDED, adapter_id=event.adapter_id, metrics=event.metrics
        )
        self._tell(job_id, f"the adapter {event.adapter_id} is there", told=_without_folder(event))

    def _finish(self, job_id: str, status: JobStatus, **changes: Any) -> None:
        now = int(self._clock())
        self._change(job_id, status=status, finished_s=now, estimated_finish_s=None, **changes)

    def _change(self, job_id: str, **changes: Any) -> None:
        entry = self._entry(job_id)
        entry.job = replace(entry.job, **changes)

    def _tell(
        self,
        job_id: str,
        message: str,
        data: Mapping[str, Any] | None = None,
        told: Event | None = None,
        level: str = "info",
    ) -> None:
        entry = self._entry(job_id)
        entry.num_events += 1
        said = None if told is None else json.loads(told.to_json())
        now = int(self._clock())
        entry.events.append(JobEvent(entry.num_events, now, level, message, data, said))

    def _entry(self, job_id: str) -> _Entry:
        if job_id not in self._entries:
            raise NotFound("job", job_id)
        return self._entries[job_id]


def _beginning(event: Began) -> str:
    whence = f"continued at step {event.step} of" if event.step else "begun:"
    return f"{whence} {event.num_steps} steps, {event.num_parameters} parameters"


def _without_folder(event: Ended) -> Ended:
    """Where it lies on the server is nobody's business."""
    return replace(event, folder="")
