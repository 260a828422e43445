"""What jlorax's own client asks OpenAI's routes for, and how it reads their answers."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.types import GenerateRequest
from jlorax.wire.call import ToolCall
from jlorax.wire.native_client import shared_fields
from jlorax.wire.options import Message, Prompt


@dataclass(frozen=True)
class ChatAnswer:
    """``text`` is what the model said beside its calls; ``finish_reason`` "stop", "length" or
    "tool_calls"."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int

    def message(self) -> dict[str, Any]:
        """As the conversation's next message."""
        said: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            said["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return said


def render_chat(messages: Sequence[Message], request: GenerateRequest) -> dict[str, Any]:
    """The body of /v1/chat/completions. InvalidParameter for what that route cannot do."""
    _refuse_native(request)
    fields: dict[str, Any] = {
        **shared_fields(request),
        "model": request.adapter_id or "",
        "messages": [dict(message) for message in messages],
        "top_k": request.sampling.top_k,
        "max_tokens": request.max_new_tokens,
        "min_tokens": request.min_new_tokens,
        "ignore_eos": request.ignore_eos,
        "include_stop_str_in_output": request.include_stop_text,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_native(request: GenerateRequest) -> None:
    """What only the native routes give."""
    given = {
        "truncate": request.truncate is not None,
        "num_top_logprobs": request.num_top_logprobs > 0,
        "prompt_logprobs": request.prompt_logprobs,
    }
    for name, is_given in given.items():
        if is_given:
            raise InvalidParameter(name, "is not supported in a chat with tools")


def read_chat(body: Mapping[str, Any]) -> ChatAnswer:
    (choice,) = body["choices"]
    message = choice["message"]
    return ChatAnswer(
        text=message.get("content") or "",
        tool_calls=tuple(
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ),
        finish_reason=choice["finish_reason"],
        num_prompt_tokens=body["usage"]["prompt_tokens"],
        num_tokens=body["usage"]["completion_tokens"],
    )


def render_embed(prompts: Sequence[Prompt], adapter_id: str | None) -> dict[str, Any]:
    texts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    return {"model": adapter_id or "", "input": texts, "encoding_format": "base64"}


def read_embed(body: Mapping[str, Any]) -> list[tuple[float, ...]]:
    return [_unpacked(item["embedding"]) for item in body["data"]]


def _unpacked(text: str) -> tuple[float, ...]:
    """base64 of little-endian float32 values."""
    values = array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)
