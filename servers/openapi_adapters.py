"""The adapter API in the OpenAPI document: our routes, and vLLM's two."""

from __future__ import annotations

from jlorax.types import Tier
from servers.openapi_parts import (
    BODY,
    ENGINE,
    JSON,
    TEXT,
    Schema,
    answer,
    flag,
    in_path,
    in_query,
    operation,
    ref,
    request_body,
    whole_obj,
)
from servers.openapi_shared import ADAPTER_ID

_TAG = "Adapters"
_FOLDER: Schema = {"type": "string", "minLength": 1, "maxLength": 4096}
_WORKS = (400, 404, 409, 422, 502, *ENGINE)

SCHEMAS: dict[str, Schema] = {
    "LoadAdapter": request_body(
        {
            "adapter_id": ADAPTER_ID,
            "folder": _FOLDER | {"description": "Under the server's adapter root."},
            "replace": flag("The name may be taken: running requests finish on what it was."),
        },
        ("adapter_id", "folder"),
    ),
    "LoadLora": request_body(
        {
            "lora_name": ADAPTER_ID,
            "lora_path": _FOLDER,
            "load_inplace": flag("The name may be taken."),
        },
        ("lora_name", "lora_path"),
    ),
    "UnloadLora": request_body({"lora_name": ADAPTER_ID}, ("lora_name",)),
    "Adapter": whole_obj(
        {
            "adapter_id": {"type": "string"},
            "tenant": {"type": "string"},
            "generation": {"type": "integer", "minimum": 0},
            "source": {"type": "string"},
            "tier": {"type": "string", "enum": [tier.value for tier in Tier]},
            "rank": {"type": "integer", "minimum": 0},
            "target_modules": {"type": "array", "items": {"type": "string"}},
            "size_bytes": {"type": ["integer", "null"]},
            "num_requests": {"type": "integer", "minimum": 0},
            "last_used_s": {"type": ["number", "null"], "description": "Unix time."},
            "pinned": {"type": "boolean"},
        }
    ),
    "AdapterList": whole_obj(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": ref("Adapter")},
        }
    ),
}

_ID = in_path("adapter_id", "Its slashes quoted as %2F, or not.")
_SHOWN = answer("What it is now.", (JSON, ref("Adapter")))
_SAID = answer("Done.", (TEXT, {"type": "string"}))


def _adapter(summary: str, ok: dict[int, Schema], *more: Schema) -> Schema:
    return operation(_TAG, summary, ok, _WORKS, error="OpenAIError", parameters=[_ID, *more])


def _post(summary: str, ok: dict[int, Schema], body: str) -> Schema:
    return operation(_TAG, summary, ok, (*BODY, *_WORKS), error="OpenAIError", body=body)


PATHS: dict[str, Schema] = {
    "/v1/adapters": {
        "get": operation(
            _TAG,
            "All that may be named",
            {200: answer("A list.", (JSON, ref("AdapterList")))},
            (500, 503),
            error="OpenAIError",
        ),
        "post": _post(
            "Register a folder and read it into RAM",
            {201: answer("It is in RAM.", (JSON, ref("Adapter")))},
            "LoadAdapter",
        ),
    },
    "/v1/adapters/{adapter_id}": {
        "delete": _adapter(
            "Free its memory and forget the name",
            {204: answer("Gone.")},
            in_query("force", "Also while requests use it.", ["true", "false"]),
        )
    },
    "/v1/adapters/{adapter_id}/prefetch": {"post": _adapter("Read it into RAM", {200: _SHOWN})},
    "/v1/adapters/{adapter_id}/pin": {
        "post": _adapter("Bring it to the device, to stay", {200: _SHOWN}),
        "delete": _adapter("Let it go when room is needed", {200: _SHOWN}),
    },
    "/v1/load_lora_adapter": {"post": _post("vLLM's: register a folder", {200: _SAID}, "LoadLora")},
    "/v1/unload_lora_adapter": {"post": _post("vLLM's: forget it", {200: _SAID}, "UnloadLora")},
}
