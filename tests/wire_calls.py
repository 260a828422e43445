"""Bodies of /v1 as tests of ``jlorax.wire`` parse them."""

from __future__ import annotations

from typing import Any

from jlorax.types import GenerateRequest
from jlorax.wire.call import Call, Limits
from jlorax.wire.openai import parse_chat, parse_completion

LIMITS = Limits(model_id="tiny/base", vocab_size=1000, max_prompts=8)
USER = {"role": "user", "content": "hi"}


def completion_call(**fields: Any) -> Call:
    return parse_completion({"model": "", "prompt": "hi", **fields}, LIMITS)


def completion(**fields: Any) -> GenerateRequest:
    return completion_call(**fields).requests[0]


def chat(**fields: Any) -> Call:
    return parse_chat({"model": "", "messages": [USER], **fields}, LIMITS)


def tool(name: str = "look_up", **function: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"word": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, **function},
    }
