"""The HTTP server: routes, middleware, and the life of a process that serves them."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal

from aiohttp import web

from jlorax.config import ServerConfig
from jlorax.errors import ConfigError
from jlorax.jobs.service import TrainingJobs
from servers import (
    adapters,
    embeddings,
    files,
    fine_tuning,
    models,
    native,
    openai,
    openapi,
    responses,
    tokens,
)
from servers.auth import authorize
from servers.cors import add_cors_headers, answer_preflights
from servers.failures import answer_errors
from servers.hosts import refuse_foreign
from servers.serving import CONFIG, ENGINE, SSE_COMMENT, SSE_COMMENT_S, ServedEngine
from servers.trainings import add_trainings, begin_close

log = logging.getLogger("jlorax.http")

_FAMILIES = (
    native,
    tokens,
    openai,
    responses,
    embeddings,
    models,
    adapters,
    files,
    fine_tuning,
    openapi,
)

OBJECTS_PER_COLLECTION = 20_000  # Python's 700 are a few hundred tokens; jax joins in each
CLOSE_DEADLINE_S = 2.0
_CUT_OFF_S = 0.1  # for each running handler to end, when nobody wants to wait
_BACKLOG = 1024  # connections that come at once; one that finds no room tries again after a second
LINGER_S = 1.0  # what a refused body may still send, so that its sender reads the refusal


def create_app(
    engine: ServedEngine,
    config: ServerConfig,
    sse_comment_s: float = SSE_COMMENT_S,
    jobs: TrainingJobs | None = None,
) -> web.Application:
    """The routes over an engine that somebody else opens and closes; trainings, if there are any,
    live as long as the app."""
    app = web.Application(
        middlewares=[answer_errors, answer_preflights, authorize, refuse_foreign],
        client_max_size=config.max_body_bytes,
    )
    app[ENGINE] = engine
    app[CONFIG] = config
    app[SSE_COMMENT] = sse_comment_s
    app.on_response_prepare.append(add_cors_headers)
    for family in _FAMILIES:
        app.add_routes(family.routes())
    if jobs is not None:
        add_trainings(app, jobs)
    return app


class _WithoutBytes(logging.Filter):
    """A protocol error quotes the bytes that it choked on, and those may be a prompt."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return True


_protocol_log = logging.getLogger("jlorax.http.protocol")
_protocol_log.addFilter(_WithoutBytes())


def create_runner(app: web.Application) -> web.AppRunner:
    """``handler_cancellation``: a client that goes away cancels its handler, so its request.

    Bodies are never decompressed: a small gzip could hold gigabytes (it gets a 415 instead).
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=_protocol_log,
        auto_decompress=False,
        lingering_time=LINGER_S,
        shutdown_timeout=CLOSE_DEADLINE_S,
        keepalive_timeout=app[CONFIG].keep_alive_s,
    )


async def run_server(
    app: web.Application, host: str, port: int, listening: asyncio.Event | None = None
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns; ``listening`` is set when up.

    A second signal ends the drain at once.
    """
    stop, cut_off = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (cut_off if stop.is_set() else stop).set())
    runner = create_runner(app)
    await runner.setup()
    try:
        site = await _listen(runner, host, port)
        log.info("serving on http://%s:%d", host, bound_port(runner))
        if listening is not None:
            listening.set()
        await stop.wait()
        begin_close(app)
        await site.stop()
        if not await _drained(app[ENGINE], app[CONFIG].drain_s, cut_off):
            await _cut_off(runner)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await runner.cleanup()


def bound_port(runner: web.AppRunner) -> int:
    """The port that the system chose for port 0."""
    port: int = runner.addresses[0][1]
    return port


async def _listen(runner: web.AppRunner, host: str, port: int) -> web.TCPSite:
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(_why_not(error, host, port)) from error
    return site


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another process: choose another --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs rights that this process lacks: use 1024 or above"
    return f"cannot listen on {host} port {port}: {error.strerror or error}"


async def _drained(engine: ServedEngine, deadline_s: float, cut_off: asyncio.Event) -> bool:
    """Waits until running requests have ended, or the deadline; False when told to cut them off."""
    log.info("draining: waiting up to %.0f s for running requests", deadline_s)
    drain = asyncio.create_task(engine.drain())
    told = asyncio.create_task(cut_off.wait())
    try:
        await asyncio.wait([drain, told], timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if drain.done():
            drain.result()
            log.info("drained")
        return drain.done() or not told.done()
    finally:
        drain.cancel()
        told.cancel()


async def _cut_off(runner: web.AppRunner) -> None:
    log.warning("a second signal: running requests are cut off")
    assert runner.server is not None
    await runner.server.shutdown(_CUT_OFF_S)
