"""/v1/fine_tuning/jobs: adapters are made through the server, in OpenAI's shapes."""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from jlorax.errors import InvalidParameter, JLoraxError
from jlorax.jobs.types import TrainingJob
from jlorax.wire.fine_tuning import (
    parse_create_job,
    parse_page,
    render_event,
    render_job,
    render_page,
)
from servers.failures import error_body
from servers.serving import (
    check_unknown,
    json_response,
    limits_of,
    read_call,
    tenant_of,
)
from servers.sse import SseStream
from servers.streaming import stream_answer
from servers.trainings import jobs_of

JOBS_A_PAGE, EVENTS_A_PAGE = 20, 20
MAX_A_PAGE = 1_000


def routes() -> list[web.RouteDef]:
    one = "/v1/fine_tuning/jobs/{job_id}"
    return [
        web.post("/v1/fine_tuning/jobs", create_job),
        web.get("/v1/fine_tuning/jobs", jobs),
        web.get(one, job),
        web.post(f"{one}/cancel", cancel_job),
        web.get(f"{one}/events", job_events),
    ]


async def create_job(request: web.Request) -> web.Response:
    """200 once it is queued; what is wrong with its data shows when that is read."""
    trainings, limits = jobs_of(request), limits_of(request.app)
    asked = await read_call(request, lambda body: parse_create_job(body, limits))
    check_unknown(request.app, asked.unknown_fields)
    return _shown(trainings.create(tenant_of(request), asked.order))


async def jobs(request: web.Request) -> web.Response:
    """The newest first; ``metadata[KEY]=VALUE`` keeps those that have it."""
    found = jobs_of(request).jobs(tenant_of(request))
    page = parse_page(request.query, JOBS_A_PAGE, MAX_A_PAGE)
    wanted = {
        name[9:-1]: value
        for name, value in request.query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    shown = [render_job(job) for job in found if wanted.items() <= job.metadata.items()]
    return json_response(render_page(shown, page))


async def job(request: web.Request) -> web.Response:
    return _shown(jobs_of(request).job(tenant_of(request), request.match_info["job_id"]))


async def cancel_job(request: web.Request) -> web.Response:
    """200 once it has ended, with what became of it."""
    trainings, job_id = jobs_of(request), request.match_info["job_id"]
    return _shown(await trainings.cancel(tenant_of(request), job_id))


async def job_events(request: web.Request) -> web.StreamResponse:
    """The newest first, by pages; with ``stream=true`` the oldest first, and all that follow until
    the job has ended."""
    said = request.query.get("stream", "false")
    if said not in ("true", "false"):
        raise InvalidParameter("stream", "must be true or false")
    if said == "true":
        return await _stream(request)
    page = parse_page(request.query, EVENTS_A_PAGE, MAX_A_PAGE)
    job_id = request.match_info["job_id"]
    events = jobs_of(request).events(tenant_of(request), job_id)
    shown = [render_event(job_id, event) for event in reversed(events)]
    return json_response(render_page(shown, page))


async def _stream(request: web.Request) -> web.StreamResponse:
    trainings, tenant = jobs_of(request), tenant_of(request)
    job_id = request.match_info["job_id"]

    async def send(stream: SseStream) -> None:
        async with aclosing(trainings.watch(tenant, job_id)) as events:
            async for event in events:
                await stream.send(render_event(job_id, event))
        await stream.send_done()

    async def send_failure(stream: SseStream, failure: JLoraxError) -> None:
        await stream.send(error_body(failure, openai=True)[1])

    return await stream_answer(request, {}, send, send_failure)


def _shown(job: TrainingJob) -> web.Response:
    return json_response(render_job(job))
