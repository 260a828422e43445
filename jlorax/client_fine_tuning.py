"""A training on a server, as its client sees it. No jax, no engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from jlorax.client_http import Body, Exchange, data_lines
from jlorax.errors import RequestCancelled, TrainingConflict, TrainingFailed, Unavailable
from jlorax.jobs.types import JobStatus, TrainingJob
from jlorax.loop_thread import LoopThread
from jlorax.training.events import Event, parse_event
from jlorax.training.records import checked_path, write_json_lines
from jlorax.wire.failures import read_error
from jlorax.wire.fine_tuning import PURPOSE, read_job, render_create_job

Ask = Callable[[str, str, Body | None], Awaitable[Any]]  # method, path, body -> JSON
Open = Callable[[str, str, Body | None], Exchange]

JOBS = "/v1/fine_tuning/jobs"
_JOBS_A_PAGE = 1_000


@dataclass(frozen=True)
class FinetunedAdapter:
    """A version that is there for good: its name for requests, and how it did."""

    adapter_id: str
    metrics: Mapping[str, Any]

    def __str__(self) -> str:
        return self.adapter_id


class AsyncFinetuneJob:
    """A training that a server queues or runs. It goes on when its client leaves."""

    def __init__(self, job_id: str, ask: Ask, open_: Open) -> None:
        self.job_id = job_id
        self._path = f"{JOBS}/{job_id}"
        self._ask = ask
        self._open = open_

    async def state(self) -> TrainingJob:
        return read_job(await self._ask("GET", self._path, None))

    async def watch(self) -> AsyncGenerator[Event, None]:
        """Every event that the server still has and all that follow, until the job has ended."""
        path = f"{self._path}/events?stream=true"
        async with (
            self._open("GET", path, None) as answer,
            aclosing(data_lines(answer)) as lines,
        ):
            async for line in lines:
                if line == b"[DONE]":
                    return
                if (event := _read_event(json.loads(line), answer.status)) is not None:
                    yield event
        raise Unavailable(f"the server ended its events before the job {self.job_id} ended")

    async def cancel(self) -> TrainingJob:
        """Ends it within a step, with a checkpoint; the same call as before continues it. Returns
        what became of it; TrainingConflict when it had ended before."""
        return read_job(await self._ask("POST", f"{self._path}/cancel", None))

    async def result(self) -> FinetunedAdapter:
        """Waits for the end. RequestCancelled, or TrainingFailed with the reason, if there is no
        adapter."""
        async with aclosing(self.watch()) as events:
            async for _ in events:
                pass
        return _result(await self.state())


class FinetuneJob:
    """The same, blocking."""

    def __init__(self, job: AsyncFinetuneJob, thread: LoopThread) -> None:
        self.job_id = job.job_id
        self._job = job
        self._thread = thread

    def state(self) -> TrainingJob:
        return self._thread.run(self._job.state())

    def watch(self) -> Iterator[Event]:
        return self._thread.iterate(self._job.watch())

    def cancel(self) -> TrainingJob:
        return self._thread.run(self._job.cancel())

    def result(self) -> FinetunedAdapter:
        return self._thread.run(self._job.result())


async def start_job(
    ask: Ask,
    open_: Open,
    dataset: Any,
    *,
    name: str | None,
    validation: Any,
    training: Mapping[str, Any],
) -> AsyncFinetuneJob:
    """Sends the data and queues the job."""
    data = await _send(ask, dataset)
    held_out = None if validation is None else await _send(ask, validation)
    said = await ask("POST", JOBS, render_create_job(data, held_out, name, training))
    return AsyncFinetuneJob(read_job(said).job_id, ask, open_)


async def finished(job: AsyncFinetuneJob) -> FinetunedAdapter:
    """``result``; who gives up waiting cancels the job."""
    try:
        return await job.result()
    except asyncio.CancelledError:
        with suppress(TrainingConflict):  # it ended in the meantime
            await job.cancel()
        raise


async def list_jobs(ask: Ask) -> list[TrainingJob]:
    """All pages; the newest first."""
    path = f"{JOBS}?limit={_JOBS_A_PAGE}"
    page = await ask("GET", path, None)
    found = list(page["data"])
    while page["has_more"]:
        page = await ask("GET", f"{path}&after={page['last_id']}", None)
        found += page["data"]
    return [read_job(job) for job in found]


async def _send(ask: Ask, dataset: Any) -> str:
    """The id of a file, a list of dicts or a DataFrame, once it is there."""
    with ExitStack() as opened:
        form = await asyncio.to_thread(_form, dataset, opened)
        file_id: str = (await ask("POST", "/v1/files", form))["id"]
        return file_id


def _form(dataset: Any, opened: ExitStack) -> aiohttp.FormData:
    if isinstance(dataset, str | Path):
        path = checked_path(str(dataset))
    else:
        path = Path(opened.enter_context(TemporaryDirectory(prefix="jlorax-"))) / "data.jsonl"
        write_json_lines(dataset, path)
    form = aiohttp.FormData()
    form.add_field("purpose", PURPOSE)
    form.add_field("file", opened.enter_context(path.open("rb")), filename=path.name)
    return form


def _read_event(body: Mapping[str, Any], status: int) -> Event | None:
    """None: what the server says of its own."""
    if "error" in body:
        raise read_error(status, body)
    told = body["event"]
    return None if told is None else parse_event(json.dumps(told))


def _result(job: TrainingJob) -> FinetunedAdapter:
    if job.error is not None:
        raise TrainingFailed(job.error.code, job.error.message)
    if job.adapter_id is None:
        assert job.status is JobStatus.CANCELLED
        raise RequestCancelled(f"the job {job.job_id} was cancelled")
    return FinetunedAdapter(job.adapter_id, job.metrics)
