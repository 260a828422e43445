"""The adapter API: our routes, and vLLM's two with their own words."""

from __future__ import annotations

from aiohttp import web

from jlorax.errors import InvalidParameter
from jlorax.types import AdapterInfo
from jlorax.wire.adapters import (
    LoadAdapter,
    parse_load_adapter,
    parse_load_lora,
    parse_unload_lora,
    render_adapter,
)
from jlorax.wire.fields import checked_adapter_id
from servers.serving import ENGINE, json_response, limits_of, notes_of, read_call, tenant_of


def routes() -> list[web.RouteDef]:
    one = "/v1/adapters/{adapter_id:.+}"
    return [
        web.get("/v1/adapters", adapters),
        web.post("/v1/adapters", load_adapter),
        web.post(f"{one}/prefetch", prefetch_adapter),
        web.post(f"{one}/pin", pin_adapter),
        web.delete(f"{one}/pin", unpin_adapter),
        web.delete(one, unload_adapter),
        web.post("/v1/load_lora_adapter", load_lora_adapter),
        web.post("/v1/unload_lora_adapter", unload_lora_adapter),
    ]


async def adapters(request: web.Request) -> web.Response:
    infos = await request.app[ENGINE].adapters(tenant_of(request))
    return json_response({"object": "list", "data": [render_adapter(info) for info in infos]})


async def load_adapter(request: web.Request) -> web.Response:
    """201 once its weights are in RAM and were found to be good."""
    limits = limits_of(request.app)
    load = await read_call(request, lambda body: parse_load_adapter(body, limits))
    return json_response(render_adapter(await _load(request, load)), status=201)


async def prefetch_adapter(request: web.Request) -> web.Response:
    """200 once it is in RAM."""
    return _shown(await request.app[ENGINE].prefetch_adapter(_named(request), tenant_of(request)))


async def pin_adapter(request: web.Request) -> web.Response:
    """200 once it is on the device, where it stays."""
    return _shown(await request.app[ENGINE].pin_adapter(_named(request), tenant_of(request)))


async def unpin_adapter(request: web.Request) -> web.Response:
    engine, tenant = request.app[ENGINE], tenant_of(request)
    return _shown(await engine.pin_adapter(_named(request), tenant, pinned=False))


async def unload_adapter(request: web.Request) -> web.Response:
    """204. ``?force=true`` also while requests use it, which are answered all the same."""
    adapter_id = _named(request)
    force = request.query.get("force", "false")
    if force not in ("true", "false"):
        raise InvalidParameter("force", "must be true or false")
    await request.app[ENGINE].unload_adapter(adapter_id, tenant_of(request), force == "true")
    return web.Response(status=204)


async def load_lora_adapter(request: web.Request) -> web.Response:
    """vLLM's: https://docs.vllm.ai/en/stable/features/lora.html#dynamically-serving-lora-adapters"""
    limits = limits_of(request.app)
    load = await read_call(request, lambda body: parse_load_lora(body, limits))
    await _load(request, load)
    return web.Response(text=f"Success: LoRA adapter '{load.adapter_id}' added successfully.")


async def unload_lora_adapter(request: web.Request) -> web.Response:
    limits = limits_of(request.app)
    adapter_id = await read_call(request, lambda body: parse_unload_lora(body, limits))
    notes_of(request).adapter_id = adapter_id
    await request.app[ENGINE].unload_adapter(adapter_id, tenant_of(request))
    return web.Response(text=f"Success: LoRA adapter '{adapter_id}' removed successfully.")


async def _load(request: web.Request, load: LoadAdapter) -> AdapterInfo:
    notes_of(request).adapter_id = load.adapter_id
    engine, tenant = request.app[ENGINE], tenant_of(request)
    return await engine.load_adapter(load.adapter_id, load.folder, tenant, load.replace)


def _named(request: web.Request) -> str:
    adapter_id = checked_adapter_id(request.match_info["adapter_id"])
    notes_of(request).adapter_id = adapter_id
    return adapter_id


def _shown(info: AdapterInfo) -> web.Response:
    return json_response(render_adapter(info))
