"""/v1/files: data for trainings, in OpenAI's shapes. It is streamed to disk, never held in RAM."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TypeVar

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import MultipartReader

from jlorax.errors import InvalidParameter
from jlorax.jobs.files import IncomingFile
from jlorax.jobs.service import TrainingJobs
from jlorax.jobs.types import UploadedFile
from jlorax.wire.fine_tuning import PURPOSE, parse_page, render_file, render_page
from jlorax.wire.strict_json import MalformedBody
from servers.serving import BODY_DEADLINE_S, BodyTimeout, NotJson, json_response, tenant_of
from servers.trainings import jobs_of

T = TypeVar("T")

MAX_FILES_A_PAGE = 10_000
_CHUNK_BYTES = 1 << 18
_PURPOSE_BYTES = 64
_FORM_BYTES = 1 << 16  # of a form beside its file


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/files", create_file),
        web.get("/v1/files", files),
        web.get("/v1/files/{file_id}", file),
        web.delete("/v1/files/{file_id}", delete_file),
        web.get("/v1/files/{file_id}/content", file_content),
    ]


async def create_file(request: web.Request) -> web.Response:
    """200 once it is whole on disk. 413 above the limit, as soon as that is known."""
    jobs = jobs_of(request)
    _check_form(request, jobs)
    return json_response(render_file(await _Form(request, jobs).read()))


async def files(request: web.Request) -> web.Response:
    jobs, query = jobs_of(request), request.query
    page = parse_page(query, MAX_FILES_A_PAGE, MAX_FILES_A_PAGE)
    if query.get("purpose", PURPOSE) != PURPOSE:
        raise InvalidParameter("purpose", f"must be {PURPOSE!r}: there are no other files")
    found = await asyncio.to_thread(jobs.files.files, tenant_of(request))
    if _order(query.get("order", "desc")) == "asc":
        found.reverse()
    return json_response(render_page([render_file(one) for one in found], page))


async def file(request: web.Request) -> web.Response:
    found = jobs_of(request).files.find(tenant_of(request), request.match_info["file_id"])
    return json_response(render_file(found))


async def delete_file(request: web.Request) -> web.Response:
    file_id = request.match_info["file_id"]
    jobs_of(request).delete_file(tenant_of(request), file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


async def file_content(request: web.Request) -> web.FileResponse:
    path = jobs_of(request).files.path(tenant_of(request), request.match_info["file_id"])
    headers = {"Content-Type": "application/octet-stream", "X-Content-Type-Options": "nosniff"}
    return web.FileResponse(path, headers=headers)


def _order(said: str) -> str:
    if said not in ("asc", "desc"):
        raise InvalidParameter("order", f"must be 'asc' or 'desc', not {said[:16]!r}")
    return said


def _check_form(request: web.Request, jobs: TrainingJobs) -> None:
    kind, size = request.content_type, request.content_length
    if kind != "multipart/form-data":
        raise NotJson(f"the Content-Type must be multipart/form-data, not {kind[:64]!r}")
    if size is not None and size > jobs.max_file_bytes + _FORM_BYTES:
        raise web.HTTPRequestEntityTooLarge(jobs.max_file_bytes, size)


class _Form:
    """One multipart form as it arrives: ``purpose`` and ``file``, in any order."""

    def __init__(self, request: web.Request, jobs: TrainingJobs) -> None:
        self._request = request
        self._jobs = jobs
        self._purpose: str | None = None
        self._incoming: IncomingFile | None = None

    async def read(self) -> UploadedFile:
        with ExitStack() as opened:
            parts = await _opened(self._request)
            while (part := await _next(parts)) is not None:
                await self._take(part, opened)
            if self._purpose is None:
                raise InvalidParameter("purpose", f"is missing; it must be {PURPOSE!r}")
            if self._incoming is None:
                raise InvalidParameter("file", "is missing")
            return await asyncio.to_thread(self._incoming.keep)

    async def _take(self, part: BodyPartReader, opened: ExitStack) -> None:
        match part.name:
            case "purpose" if self._purpose is None:
                self._purpose = await _purpose(part)
            case "file" if self._incoming is None:
                store, tenant = self._jobs.files, tenant_of(self._request)
                receiving = store.receiving(tenant, part.filename or "upload")
                self._incoming = opened.enter_context(receiving)
                await self._receive(part, self._incoming)
            case name:
                raise InvalidParameter(str(name)[:64], "is no field of this form, or stands twice")

    async def _receive(self, part: BodyPartReader, incoming: IncomingFile) -> None:
        limit = self._jobs.max_file_bytes
        while chunk := await _in_time(part.read_chunk(_CHUNK_BYTES)):
            if incoming.num_bytes + len(chunk) > limit:
                raise web.HTTPRequestEntityTooLarge(limit, incoming.num_bytes + len(chunk))
            await asyncio.to_thread(incoming.write, chunk)


async def _opened(request: web.Request) -> MultipartReader:
    try:
        return await request.multipart()
    except (ValueError, AssertionError) as error:
        raise MalformedBody(f"the body is no multipart form: {error}") from None


async def _next(parts: MultipartReader) -> BodyPartReader | None:
    part = await _in_time(parts.next())
    if isinstance(part, MultipartReader):
        raise MalformedBody("a part of the form is a form itself")
    return part


async def _purpose(part: BodyPartReader) -> str:
    said = ""
    while len(said) <= len(PURPOSE) and (chunk := await _in_time(part.read_chunk(_PURPOSE_BYTES))):
        said += chunk.decode(errors="replace")
    if said != PURPOSE:
        raise InvalidParameter("purpose", f"must be {PURPOSE!r}, not {said!r}")
    return said


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await reading
    except TimeoutError:
        raise BodyTimeout(f"nothing of the body came for {BODY_DEADLINE_S:.0f} s") from None
    except (ValueError, HttpProcessingError) as error:  # of the form's lines
        raise MalformedBody(f"the body is no multipart form: {error}") from None
