"""/v1/embeddings: a vector for each text."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from aiohttp import web

from jlorax.together import together
from jlorax.wire.embeddings import check_dimensions, parse_embeddings, render_embeddings
from servers.serving import (
    ENGINE,
    check_unknown,
    limits_of,
    notes_of,
    read_call,
    tenant_of,
)


def routes() -> list[web.RouteDef]:
    return [web.post("/v1/embeddings", embeddings)]


async def embeddings(request: web.Request) -> web.Response:
    limits, tenant = limits_of(request.app), tenant_of(request)
    call = await read_call(request, lambda body: parse_embeddings(body, limits))
    check_unknown(request.app, call.unknown_fields)
    notes = notes_of(request)
    notes.adapter_id = call.requests[0].adapter_id
    embed = request.app[ENGINE].embed
    results = await together([embed(replace(asked, tenant=tenant)) for asked in call.requests])
    notes.prompt_tokens = sum(result.num_tokens for result in results)
    check_dimensions(call, results)
    text = await asyncio.to_thread(render_embeddings, call, results)
    return web.Response(text=text, content_type="application/json")
