"""Runs trainings beside a server: one at a time, each in a process of its own. Async.

Clients -> create, cancel -> the queue -> one ``Training`` -> its events -> the book -> watchers.
Jobs are kept in memory: a restart forgets them, but neither the data nor what was trained.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from jlorax.adapters.registry import DEFAULT_TENANT
from jlorax.config import FineTuningConfig
from jlorax.errors import Forbidden, NotFound, Overloaded, TrainingConflict
from jlorax.jobs.book import JobBook
from jlorax.jobs.files import FileStore
from jlorax.jobs.orders import open_settings, rate_multiplier, train_config
from jlorax.jobs.training import Training
from jlorax.jobs.types import JobEvent, JobOrder, TrainingJob
from jlorax.training.config import TrainConfig
from jlorax.training.events import Cancelled, Event, Failed

log = logging.getLogger("jlorax.jobs")

MAX_QUEUED = 64
CANCEL_DEADLINE_S = 60.0  # a step of a large model, and its checkpoint
CLOSE_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Served:
    """What trainings must know of the server."""

    model_id: str
    max_rank: int
    max_seq_len: int


class _Bell:
    """Wakes whoever waits, each time that it is rung."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait(self) -> None:
        await self._rung.wait()


class TrainingJobs:
    """The owner of jobs and of the data that was sent for them. ``run`` it as a task."""

    def __init__(
        self, config: FineTuningConfig, served: Served, clock: Callable[[], float] = time.time
    ) -> None:
        self.files = FileStore(config.files_dir)
        self.max_file_bytes = config.max_file_bytes
        self._config = config
        self._served = served
        self._clock = clock
        self._book = JobBook(clock)
        self._queue: deque[tuple[str, TrainConfig]] = deque()
        self._running: tuple[str, Training] | None = None
        self._is_closing = False
        self._bell = _Bell()

    # ---- for clients

    def create(self, tenant: str, order: JobOrder) -> TrainingJob:
        """Queues it. Raises InvalidParameter, NotFound for a file, Forbidden,
        TrainingConflict, Overloaded."""
        self._check_able(tenant)
        job_id = f"ftjob-{secrets.token_hex(12)}"
        name = order.name or f"ft-{job_id[-24:-16]}"
        self._check_free(name)
        config = self._train_config(tenant, order, name)
        job = TrainingJob(
            job_id=job_id,
            tenant=tenant,
            base=self._served.model_id,
            name=name,
            training_file=order.training_file,
            validation_file=order.validation_file,
            learning_rate_multiplier=rate_multiplier(config),
            training=open_settings(config),
            metadata=order.metadata,
            created_s=int(self._clock()),
        )
        self._book.add(job)
        self._queue.append((job_id, config))
        self._bell.ring()
        return job

    def job(self, tenant: str, job_id: str) -> TrainingJob:
        job = self._book.find(job_id)
        if job.tenant != tenant:
            raise NotFound("job", job_id)
        return job

    def jobs(self, tenant: str) -> list[TrainingJob]:
        """The newest first."""
        return [job for job in self._book.jobs() if job.tenant == tenant]

    def events(self, tenant: str, job_id: str) -> list[JobEvent]:
        """The oldest first."""
        return self._book.events(self.job(tenant, job_id).job_id)

    async def watch(self, tenant: str, job_id: str) -> AsyncGenerator[JobEvent, None]:
        """Every event that is kept and all that follow, until the job has ended."""
        seen = 0
        while True:
            fresh = [e for e in self.events(tenant, job_id) if e.number > seen]
            for event in fresh:
                yield event
                seen = event.number
            if not fresh and self.job(tenant, job_id).status.is_final:
                return
            if not fresh:
                await self._bell.wait()

    async def cancel(self, tenant: str, job_id: str) -> TrainingJob:
        """Returns when the job has ended: cancelled, unless it had its adapter first."""
        job = self.job(tenant, job_id)
        if job.status.is_final:
            raise TrainingConflict(f"the job {job_id} has ended already: {job.status.value}")
        if self._running is not None and self._running[0] == job_id:
            self._running[1].stop(CANCEL_DEADLINE_S)
        else:
            self._queue = deque(queued for queued in self._queue if queued[0] != job_id)
            self._take(job_id, Cancelled(0))
        while not (job := self.job(tenant, job_id)).status.is_final:
            await self._bell.wait()
        return job

    def delete_file(self, tenant: str, file_id: str) -> None:
        """TrainingConflict while a job needs it."""
        for job in self._book.open_jobs():
            if job.tenant == tenant and file_id in (job.training_file, job.validation_file):
                raise TrainingConflict(f"the file {file_id} is in use by the job {job.job_id}")
        self.files.delete(tenant, file_id)

    # ---- its life

    async def run(self) -> None:
        """Until ``close``."""
        await asyncio.to_thread(self.files.sweep)
        while not self._is_closing:
            if self._queue:
                await self._run_next(*self._queue.popleft())
            else:
                await self._bell.wait()

    def begin_close(self) -> None:
        """No new jobs; what runs ends with a checkpoint, or is killed. Again does no harm."""
        self._is_closing = True
        while self._queue:
            self._take(self._queue.popleft()[0], Cancelled(0))
        if self._running is not None:
            self._running[1].stop(CLOSE_DEADLINE_S)
        self._bell.ring()

    async def _run_next(self, job_id: str, config: TrainConfig) -> None:
        job = self._book.find(job_id)
        training = Training(config, self._config.cache_dir, self._config.device_share)
        self._running = job_id, training
        self._book.start(job_id)
        try:
            await training.run(lambda event: self._take(job_id, by_file_id(event, job, config)))
        except Exception as error:
            log.exception("the training of %s could not be run", job_id)
            self._take(job_id, Failed("internal", f"it could not be run: {error}"))
        finally:
            self._running = None

    def _take(self, job_id: str, event: Event) -> None:
        self._book.take(job_id, event)
        self._bell.ring()

    def _check_able(self, tenant: str) -> None:
        config, num_queued = self._config, len(self._queue)
        if config.adapter_root is None:
            raise TrainingConflict(
                "this server has nowhere to put an adapter: start it with --adapter-root DIR"
            )
        if config.is_shared and tenant != DEFAULT_TENANT:
            raise Forbidden(
                f"adapters that are made here are for all tenants, so tenant {DEFAULT_TENANT!r} "
                f"alone may make them, not {tenant!r}"
            )
        if config.is_on_gpu and config.device_share is None:
            raise TrainingConflict(
                "this server keeps no GPU memory for trainings: start it with --train-memory-bytes"
            )
        if self._is_closing:
            raise TrainingConflict("this server is being stopped")
        if num_queued >= MAX_QUEUED:
            raise Overloaded(f"{num_queued} jobs wait, as many as are allowed", 60.0)

    def _check_free(self, name: str) -> None:
        for job in self._book.open_jobs():
            if job.name == name:
                raise TrainingConflict(f"the job {job.job_id} trains {name!r}, and has not ended")

    def _train_config(self, tenant: str, order: JobOrder, name: str) -> TrainConfig:
        config, files = self._config, self.files
        assert config.adapter_root is not None
        validation = order.validation_file
        return train_config(
            order,
            name=name,
            base=config.base,
            data_root=files.folder_of(tenant),
            data=files.path(tenant, order.training_file),
            validation=None if validation is None else files.path(tenant, validation),
            output_root=Path(config.adapter_root).absolute(),
            max_rank=self._served.max_rank,
            max_seq_len=self._served.max_seq_len,
        )


def by_file_id(event: Event, job: TrainingJob, config: TrainConfig) -> Event:
    """A client knows its data by id, and the server's paths not at all."""
    if not isinstance(event, Failed):
        return event
    message = event.message.replace(config.data.dataset, job.training_file)
    if config.data.validation is not None and job.validation_file is not None:
        message = message.replace(config.data.validation, job.validation_file)
    return Failed(event.code, message)
