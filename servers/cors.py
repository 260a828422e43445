"""Lets the web pages that the owner named use this server from a browser: CORS, as the Fetch
standard has it (https://fetch.spec.whatwg.org/#http-cors-protocol). Without origins it does
nothing, and browsers keep other pages from reading answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from jlorax.config import CorsConfig
from servers.serving import CONFIG

_PREFLIGHT_MAX_AGE_S = 600


@web.middleware
async def answer_preflights(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Before keys are checked: a browser asks without one whether the page may send it."""
    cors = request.app[CONFIG].cors
    asks = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    if request.method != hdrs.METH_OPTIONS or not asks or not _is_allowed(request, cors):
        return await handler(request)
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(cors.methods),
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join(cors.headers),
        hdrs.ACCESS_CONTROL_MAX_AGE: str(_PREFLIGHT_MAX_AGE_S),
    }
    return web.Response(status=204, headers=headers)


async def add_cors_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For ``on_response_prepare``: every answer has them, errors and streams too."""
    cors = request.app[CONFIG].cors
    if not cors.origins:
        return
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    if not _is_allowed(request, cors):
        return
    every = "*" in cors.origins
    response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if every else _origin_of(request)
    if cors.allow_credentials:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
    if cors.exposed:
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = ", ".join(cors.exposed)


def _is_allowed(request: web.Request, cors: CorsConfig) -> bool:
    return hdrs.ORIGIN in request.headers and cors.allows(_origin_of(request))


def _origin_of(request: web.Request) -> str:
    return request.headers[hdrs.ORIGIN]
