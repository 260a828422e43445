"""/v1/embeddings: a vector for each text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from jlorax.types import EmbedRequest, EmbedResult
from jlorax.wire.embeddings import check_dimensions, parse_embeddings, render_embeddings
from servers.serving import (
    ENGINE,
    ServedEngine,
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
    requests = [replace(asked, tenant=tenant) for asked in call.requests]
    results = await _embedded(request.app[ENGINE], requests)
    notes.prompt_tokens = sum(result.num_tokens for result in results)
    check_dimensions(call, results)
    text = await asyncio.to_thread(render_embeddings, call, results)
    return web.Response(text=text, content_type="application/json")


async def _embedded(engine: ServedEngine, requests: Sequence[EmbedRequest]) -> list[EmbedResult]:
    """All of them together; one failure cancels the others."""
    tasks = [asyncio.ensure_future(engine.embed(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
