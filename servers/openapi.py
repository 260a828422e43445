"""The OpenAPI document of what is served, and a page that shows it.

``openapi_parts`` has the words, ``openapi_shared`` the fields of both families, one file a family
the routes. The tests compare it with the routes and with the fields that parsers read.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from aiohttp import web

from jlorax.version import own_version
from jlorax.wire.strict_json import dumps
from servers import (
    openapi_adapters,
    openapi_fine_tuning,
    openapi_native,
    openapi_shared,
    openapi_v1,
)
from servers.openapi_parts import JSON, Schema, answer, operation

_FAMILIES = (openapi_native, openapi_v1, openapi_adapters, openapi_fine_tuning)
_PAGE = Path(__file__).with_name("docs.html")
# its own script and style, and nothing of anybody else's
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> list[web.RouteDef]:
    return [
        web.get("/openapi.json", show_document),
        web.get("/api-doc/openapi.json", show_document),
        web.get("/docs", show_page),
    ]


async def show_document(request: web.Request) -> web.Response:
    return web.Response(text=_document_text(), content_type=JSON)


async def show_page(request: web.Request) -> web.Response:
    headers = {"Content-Security-Policy": _PAGE_POLICY}
    return web.Response(text=_page(), content_type="text/html", headers=headers)


def document() -> dict[str, Any]:
    """OpenAPI 3.1: https://spec.openapis.org/oas/v3.1.1.html"""
    paths: dict[str, Schema] = dict(_OWN_PATHS)
    schemas = dict(openapi_shared.SCHEMAS)
    for family in _FAMILIES:
        paths |= family.PATHS
        schemas |= family.SCHEMAS
    keys = {"bearer": {"type": "http", "scheme": "bearer"}}
    keys["key"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "JLoRAX",
            "version": own_version(),
            "description": "Many fine-tuned LLMs for the price of one: LoRAX's, TGI's, OpenAI's "
            "and vLLM's routes. A key is needed where the server was started with --api-keys.",
        },
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
    }


def _shown(summary: str, media: str) -> Schema:
    kind = "object" if media == JSON else "string"
    answers = {200: answer("It.", (media, {"type": kind}))}
    return {"get": operation("Documents", summary, answers, error="Error")}


_OWN_PATHS: dict[str, Schema] = {
    "/openapi.json": _shown("This document", JSON),
    "/api-doc/openapi.json": _shown("This document, at LoRAX's place", JSON),
    "/docs": _shown("A page that shows it", "text/html"),
}


@cache
def _document_text() -> str:
    return dumps(document())


@cache
def _page() -> str:
    return _PAGE.read_text(encoding="utf-8")
