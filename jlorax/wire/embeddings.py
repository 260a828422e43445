"""/v1/embeddings: OpenAI's body and answer, and LoRAX's key ``embeddings`` beside ``data``.

``model`` names the adapter, as everywhere under /v1; LoRAX's ``parameters`` may name it instead.
``dimensions`` may only be what the model has: a shorter vector would need a model trained for it.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.types import EmbedRequest, EmbedResult
from jlorax.wire.call import Limits, parse_adapter_id, parse_adapter_source
from jlorax.wire.fields import INT32_MAX, Fields
from jlorax.wire.openai import parse_model, parse_prompts, read_without_effect
from jlorax.wire.strict_json import dumps

_FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbedCall:
    """One HTTP call: a request for each input."""

    requests: tuple[EmbedRequest, ...]
    is_base64: bool
    dimensions: int | None
    model: str  # as the answer names it
    unknown_fields: tuple[str, ...] = ()


def parse_embeddings(body: Mapping[str, Any], limits: Limits) -> EmbedCall:
    fields = Fields(body)
    model = parse_model(fields)
    read_without_effect(fields)
    request = _parse_adapter(fields, model, limits)
    special = fields.flag("add_special_tokens", default=True)
    call = EmbedCall(
        requests=tuple(
            replace(request, prompt=prompt, add_special_tokens=special and isinstance(prompt, str))
            for prompt in parse_prompts(fields, "input", limits)
        ),
        is_base64=_parse_format(fields) == "base64",
        dimensions=fields.integer("dimensions", 1, INT32_MAX),
        model=request.adapter_id or limits.model_id,
    )
    return replace(call, unknown_fields=fields.unknown())


def _parse_adapter(fields: Fields, model: str, limits: Limits) -> EmbedRequest:
    parameters = Fields(fields.mapping("parameters") or {}, prefix="parameters.")
    parameters.refuse("merged_adapters")
    parameters.text("api_token", max_chars=4096)
    named = parse_adapter_id(model, limits)
    inner = parse_adapter_id(parameters.text("adapter_id"), limits)
    if named is not None and inner is not None and named != inner:
        raise parameters.wrong("adapter_id", f"is {inner!r}, but `model` is {named!r}")
    adapter_id = named or inner
    source = parse_adapter_source(fields, adapter_id)
    return EmbedRequest(
        prompt="",
        adapter_id=adapter_id,
        adapter_source=source or parse_adapter_source(parameters, adapter_id),
        truncate=fields.integer("truncate_prompt_tokens", 1, INT32_MAX),
    )


def _parse_format(fields: Fields) -> str:
    word = fields.text("encoding_format", max_chars=64) or "float"
    if word not in _FORMATS:
        raise fields.wrong(
            "encoding_format", f"must be one of {', '.join(_FORMATS)}. Given: {word!r}"
        )
    return word


def check_dimensions(call: EmbedCall, results: Sequence[EmbedResult]) -> None:
    """Known once there is a vector."""
    size = len(results[0].embedding)
    if call.dimensions not in (None, size):
        raise InvalidParameter(
            "dimensions", f"is {call.dimensions}, but this model's embeddings have {size}"
        )


def render_embeddings(call: EmbedCall, results: Sequence[EmbedResult]) -> str:
    """The answer's JSON, made of a piece for each vector: long ones leave room for other threads,
    and both keys share the text."""
    data = "[" + ",".join(_rendered(call, i, result) for i, result in enumerate(results)) + "]"
    num_tokens = sum(result.num_tokens for result in results)
    usage = dumps({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
    return (
        f'{{"object":"list","data":{data},"embeddings":{data},'
        f'"model":{dumps(call.model)},"usage":{usage}}}'
    )


def _rendered(call: EmbedCall, index: int, result: EmbedResult) -> str:
    vector = _packed(result) if call.is_base64 else list(result.embedding)
    return dumps({"object": "embedding", "index": index, "embedding": vector})


def _packed(result: EmbedResult) -> str:
    """base64 of the little-endian float32 values."""
    values = array("f", result.embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")
