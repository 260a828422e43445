"""The adapter API's JSON, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlorax.errors import AdapterConflict
from jlorax.types import AdapterInfo, Tier
from jlorax.wire.call import Limits, parse_adapter_id
from jlorax.wire.fields import Fields


@dataclass(frozen=True)
class LoadAdapter:
    adapter_id: str
    folder: str  # under the server's adapter root
    replace: bool = False  # the name may be taken: a new generation of it


@dataclass(frozen=True)
class ModelCard:
    """One line of /v1/models; ``parent`` is the base model's id for an adapter."""

    id: str
    parent: str | None


def parse_load_adapter(body: Mapping[str, Any], limits: Limits) -> LoadAdapter:
    fields = Fields(body)
    folder = _checked_folder(fields, fields.text("folder", max_chars=4096))
    return LoadAdapter(_new_id(fields, "adapter_id", limits), folder, fields.flag("replace"))


def parse_load_lora(body: Mapping[str, Any], limits: Limits) -> LoadAdapter:
    """vLLM's body. ``lora_path`` may be absolute: the owner of the disk sees that it lies under the
    adapter root."""
    fields = Fields(body)
    adapter_id = _new_id(fields, "lora_name", limits)
    folder = fields.text("lora_path", max_chars=4096)
    if not folder or not folder.isprintable():
        raise fields.wrong("lora_path", "must name a folder under the server's adapter root")
    return LoadAdapter(adapter_id, folder, fields.flag("load_inplace"))


def parse_unload_lora(body: Mapping[str, Any], limits: Limits) -> str:
    return _new_id(Fields(body), "lora_name", limits)


def _new_id(fields: Fields, key: str, limits: Limits) -> str:
    name = fields.text(key)
    if name is None:
        raise fields.wrong(key, "must be a string")
    adapter_id = parse_adapter_id(name, limits)
    if adapter_id is None:
        raise AdapterConflict(f"{name!r} names the base model: an adapter needs another id")
    return adapter_id


def _checked_folder(fields: Fields, folder: str | None) -> str:
    """Only its form: that it lies under the adapter root is for the owner of the disk to see."""
    if not folder or not folder.isprintable():
        raise fields.wrong("folder", "must name a folder under the server's adapter root")
    parts = folder.replace("\\", "/").split("/")
    if parts[0] == "" or ":" in parts[0] or ".." in parts:
        raise fields.wrong(
            "folder", f"must be a relative path without '..'. Given: {folder[:64]!r}"
        )
    return folder


def render_adapter(info: AdapterInfo) -> dict[str, Any]:
    return {
        "adapter_id": info.adapter_id,
        "tenant": info.tenant,
        "generation": info.generation,
        "source": info.source,
        "tier": info.tier.value,
        "rank": info.rank,
        "target_modules": list(info.target_modules),
        "size_bytes": info.size_bytes,
        "num_requests": info.num_requests,
        "last_used_s": info.last_used_s,
        "pinned": info.pinned,
    }


def read_adapter(body: Mapping[str, Any]) -> AdapterInfo:
    return AdapterInfo(
        adapter_id=body["adapter_id"],
        tenant=body["tenant"],
        generation=body["generation"],
        source=body["source"],
        tier=Tier(body["tier"]),
        rank=body["rank"],
        target_modules=tuple(body["target_modules"]),
        size_bytes=body["size_bytes"],
        num_requests=body["num_requests"],
        last_used_s=body["last_used_s"],
        pinned=body["pinned"],
    )


def render_model(card: ModelCard, created_s: int, max_model_len: int) -> dict[str, Any]:
    """``root`` is the base model's id, also where that is the ``parent``."""
    return {
        "id": card.id,
        "object": "model",
        "created": created_s,
        "owned_by": "jlorax",
        "root": card.parent or card.id,
        "parent": card.parent,
        "max_model_len": max_model_len,
    }


def read_model(body: Mapping[str, Any]) -> ModelCard:
    return ModelCard(body["id"], body.get("parent"))
