"""Which status and words each error gets: one table per route family, decided here alone."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from jlorax import errors
from jlorax.errors import JLoraxError
from jlorax.wire.failures import render_native_error, render_openai_error
from jlorax.wire.strict_json import MalformedBody
from servers.hosts import ForeignHost
from servers.serving import NOTES, BodyTimeout, NotJson, RequestNotes, json_response

log = logging.getLogger("jlorax.http")

CLIENT_CLOSED = 499  # nginx's word for it; only ever logged

# The first row whose class fits decides, so subclasses stand before their parents.
# error, native (status, error_type), /v1 (status, type)
_TABLE: tuple[tuple[type[JLoraxError], tuple[int, str], tuple[int, str]], ...] = (
    (MalformedBody, (400, "bad_request"), (400, "invalid_request_error")),
    (NotJson, (415, "unsupported_media_type"), (415, "invalid_request_error")),
    (BodyTimeout, (408, "request_timeout"), (408, "invalid_request_error")),
    (ForeignHost, (403, "forbidden"), (403, "invalid_request_error")),
    (errors.Unauthorized, (401, "unauthorized"), (401, "invalid_request_error")),
    (errors.Forbidden, (403, "forbidden"), (403, "invalid_request_error")),
    (errors.InvalidRequest, (422, "validation"), (400, "invalid_request_error")),
    (errors.AdapterNotFound, (404, "adapter_not_found"), (404, "invalid_request_error")),
    (errors.AdapterChanged, (409, "adapter_changed"), (409, "invalid_request_error")),
    (errors.AdapterInvalid, (422, "adapter_invalid"), (422, "invalid_request_error")),
    (errors.AdapterConflict, (409, "adapter_conflict"), (409, "invalid_request_error")),
    (errors.NotFound, (404, "not_found"), (404, "invalid_request_error")),
    (errors.TrainingConflict, (409, "training_conflict"), (409, "invalid_request_error")),
    (errors.StorageFull, (507, "storage_full"), (507, "server_error")),
    (errors.Overloaded, (429, "overloaded"), (429, "rate_limit_error")),
    (errors.SourceUnavailable, (502, "source_unavailable"), (502, "server_error")),
    (errors.Unavailable, (503, "unavailable"), (503, "server_error")),
    (errors.RequestCancelled, (500, "incomplete_generation"), (500, "server_error")),
    (JLoraxError, (424, "generation"), (500, "server_error")),
)
_HTTP_WORDS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
}


class HttpFailure(JLoraxError):
    """What aiohttp refused before a handler ran: 404, 405, 413 ..."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def is_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def error_body(error: JLoraxError, openai: bool) -> tuple[int, dict[str, object]]:
    """The status and the body of an error, in the family's own shape."""
    _, native, v1 = next(row for row in _TABLE if isinstance(error, row[0]))
    status, word = v1 if openai else native
    render = render_openai_error if openai else render_native_error
    return status, render(error, word)


def error_response(error: JLoraxError, openai: bool) -> web.Response:
    status, body = error_body(error, openai)
    headers = {}
    if isinstance(error, errors.Overloaded | errors.Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, status, headers)


def unexpected(error: Exception) -> JLoraxError:
    """Our own fault, told without its text (which may quote the prompt)."""
    log.error("a handler failed", exc_info=error)
    return JLoraxError("internal error")


@web.middleware
async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every request gets an answer and a line in the log."""
    start_s = time.perf_counter()
    request[NOTES] = RequestNotes()
    status = CLIENT_CLOSED
    try:
        response = await _answered(request, handler)
        status = response.status
    except (asyncio.CancelledError, ConnectionError):
        raise
    finally:
        _log_request(request, status, time.perf_counter() - start_s)
    return response


async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    openai = is_openai(request.path)
    try:
        return await handler(request)
    except JLoraxError as error:
        return error_response(error, openai)
    except web.HTTPException as refusal:
        return _refused(request, refusal, openai)
    except ConnectionError:
        raise
    except Exception as error:
        return error_response(unexpected(error), openai)


def _refused(request: web.Request, refusal: web.HTTPException, openai: bool) -> web.Response:
    word = _HTTP_WORDS.get(refusal.status, "bad_request")
    failure = HttpFailure(_refusal_text(request, refusal), word)
    v1_type = "invalid_request_error"
    body = render_openai_error(failure, v1_type) if openai else render_native_error(failure, word)
    headers = {"Allow": refusal.headers["Allow"]} if "Allow" in refusal.headers else {}
    response = json_response(body, refusal.status, headers)
    if refusal.status == 413:
        response.force_close()  # the rest of the body is not worth reading
    return response


def _refusal_text(request: web.Request, refusal: web.HTTPException) -> str:
    if isinstance(refusal, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(refusal.allowed_methods))
        return f"{request.method} is not allowed here; allowed: {allowed}"
    if refusal.status == 404:
        return f"there is no route {request.path[:200]!r}"
    return refusal.text or refusal.reason


def _log_request(request: web.Request, status: int, took_s: float) -> None:
    """One line, without text: the route's pattern rather than the path, which a client makes."""
    notes = request[NOTES]
    resource = request.match_info.route.resource
    log.info(
        "%s %s %d %.1f ms adapter=%s prompt_tokens=%d generated_tokens=%d%s",
        request.method,
        resource.canonical if resource is not None else "(no route)",
        status,
        took_s * 1000,
        notes.adapter_id or "-",
        notes.prompt_tokens,
        notes.generated_tokens,
        f" failed={notes.failure}" if notes.failure else "",
    )
