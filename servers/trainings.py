"""The trainings beside a server, as its routes see them: whether there are any, and their life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from jlorax.errors import TrainingConflict
from jlorax.jobs.service import TrainingJobs

log = logging.getLogger("jlorax.http")

JOBS: web.AppKey[TrainingJobs] = web.AppKey("jobs")


def jobs_of(request: web.Request) -> TrainingJobs:
    jobs = request.app.get(JOBS)
    if jobs is None:
        raise TrainingConflict("this server takes no trainings; one of `jlorax serve` does")
    return jobs


def add_trainings(app: web.Application, jobs: TrainingJobs) -> None:
    """They run as long as the app does. Its end cancels them, before its last answers go out."""
    app[JOBS] = jobs
    app.cleanup_ctx.append(_run)
    app.on_shutdown.append(_close)


def begin_close(app: web.Application) -> None:
    """Tells them that the end is near: they keep checkpoints while requests are drained."""
    if (jobs := app.get(JOBS)) is not None:
        jobs.begin_close()


_LIFE: web.AppKey[asyncio.Task[None]] = web.AppKey("jobs_life")


async def _run(app: web.Application) -> AsyncIterator[None]:
    app[_LIFE] = asyncio.create_task(app[JOBS].run(), name="jlorax-trainings")
    yield
    app[_LIFE].cancel()
    await asyncio.wait([app[_LIFE]])


async def _close(app: web.Application) -> None:
    """Bounded by the time that a training gets to end."""
    begin_close(app)
    await asyncio.wait([app[_LIFE]])
