"""What crosses the borders of trainings that a server runs. Frozen, plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class UploadedFile:
    """Data that a tenant sent. The id follows from name and content: sent again, it is the same."""

    file_id: str
    filename: str  # the sender's, for its ending
    num_bytes: int
    created_s: int  # Unix time


class JobStatus(Enum):
    """OpenAI's words. A job that waits for another is queued."""

    QUEUED = "queued"
    VALIDATING = "validating_files"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True)
class JobOrder:
    """What a client asks for. None: as our own defaults have it. ``training``: keys of a
    configuration, not looked at yet."""

    training_file: str
    validation_file: str | None = None
    name: str | None = None
    seed: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None  # over the default learning rate
    training: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobError:
    code: str
    message: str


@dataclass(frozen=True)
class TrainingJob:
    """One job as it stands now. ``training``: the keys of its configuration, defaults included."""

    job_id: str
    tenant: str
    base: str  # its name for clients
    name: str  # of the adapter
    training_file: str
    validation_file: str | None
    learning_rate_multiplier: float
    training: Mapping[str, Any]
    metadata: Mapping[str, str]
    created_s: int
    status: JobStatus = JobStatus.QUEUED
    finished_s: int | None = None
    estimated_finish_s: int | None = None
    adapter_id: str | None = None
    num_trained_tokens: int | None = None
    error: JobError | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobEvent:
    """``number`` counts from 1. ``data``: the figures of a step or evaluation, else None; ``told``:
    what the training itself said, as JSON of ``jlorax.training.events``, or None."""

    number: int
    created_s: int
    level: str  # "info", "warn", "error"
    message: str
    data: Mapping[str, Any] | None = None
    told: Mapping[str, Any] | None = None
