"""Keeps other people's web pages away from a server that only this machine may reach.

A page in a browser here can send requests to 127.0.0.1 (its ``Origin`` tells), and a name that
its owner points at 127.0.0.1 makes them same-origin (DNS rebinding; then ``Host`` tells).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from aiohttp import hdrs, web

from jlorax.config import CorsConfig
from jlorax.errors import JLoraxError
from servers.serving import CONFIG

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/]+))(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)")


class ForeignHost(JLoraxError):
    """The request came by a name or from a page that is not this machine's: 403."""

    code = "forbidden"


@web.middleware
async def refuse_foreign(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    # A server that listens elsewhere cannot know its own names: there Host is not checked.
    config = request.app[CONFIG]
    if is_loopback(config.host):
        _check(request, config.cors)
    return await handler(request)


def is_loopback(host: str) -> bool:
    """``localhost``, 127.0.0.0/8 or ::1; no other name, whatever it resolves to."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check(request: web.Request, cors: CorsConfig) -> None:
    """No Host at all passes: HTTP/1.0 tools may leave it out, browsers never do. Pages that the
    owner named pass too."""
    for host in request.headers.getall(hdrs.HOST, ()):
        if not _names_loopback(host):
            raise ForeignHost(
                f"the Host header is {host[:64]!r}, but this server listens on this machine only: "
                "use localhost or 127.0.0.1, or start it with another --host"
            )
    for origin in request.headers.getall(hdrs.ORIGIN, ()):
        match = _ORIGIN.fullmatch(origin)
        is_ours = match is not None and _names_loopback(match[1])
        if not is_ours and not cors.allows(origin):
            raise ForeignHost(
                f"pages of the origin {origin[:64]!r} may not use this server, which listens on "
                "this machine only"
            )


def _names_loopback(authority: str) -> bool:
    """Of ``host``, ``host:port`` or ``[address]:port``."""
    match = _AUTHORITY.fullmatch(authority)
    return match is not None and is_loopback(match[1] or match[2])
