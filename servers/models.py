"""/v1/models: the base model, and the adapters that a tenant may use."""

from __future__ import annotations

import time

from aiohttp import web

from jlorax.errors import AdapterNotFound
from jlorax.wire.adapters import ModelCard, render_model
from jlorax.wire.call import parse_adapter_id
from servers.serving import ENGINE, json_response, limits_of, tenant_of


def routes() -> list[web.RouteDef]:
    return [web.get("/v1/models", models), web.get("/v1/models/{model_id:.+}", model)]


async def models(request: web.Request) -> web.Response:
    """The base model, then the tenant's own adapters and those of all, the base as ``parent``."""
    base = request.app[ENGINE].model_info.model_id
    infos = await request.app[ENGINE].adapters(tenant_of(request))
    cards = [ModelCard(base, None), *(ModelCard(info.adapter_id, base) for info in infos)]
    return json_response({"object": "list", "data": [_rendered(request, card) for card in cards]})


async def model(request: web.Request) -> web.Response:
    """One of them; the base model also by its other names."""
    base = request.app[ENGINE].model_info.model_id
    adapter_id = parse_adapter_id(request.match_info["model_id"], limits_of(request.app))
    if adapter_id is None:
        return json_response(_rendered(request, ModelCard(base, None)))
    infos = await request.app[ENGINE].adapters(tenant_of(request))
    if adapter_id not in {info.adapter_id for info in infos}:
        raise AdapterNotFound(adapter_id)
    return json_response(_rendered(request, ModelCard(adapter_id, base)))


def _rendered(request: web.Request, card: ModelCard) -> dict[str, object]:
    max_model_len = request.app[ENGINE].model_info.max_seq_len
    return render_model(card, int(time.time()), max_model_len)
