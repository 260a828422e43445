"""vLLM's /tokenize and /detokenize: a prompt or a chat to token ids, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jlorax.types import GenerateRequest
from jlorax.wire.call import Call, Limits, parse_messages
from jlorax.wire.fields import MAX_TOKENIZED_CHARS, Fields
from jlorax.wire.openai import parse_chat_options
from jlorax.wire.tools import parse_tools


def is_vllm_tokenize(body: Mapping[str, Any]) -> bool:
    """LoRAX's body has ``inputs`` instead."""
    return "prompt" in body or "messages" in body


def parse_tokenize_call(body: Mapping[str, Any]) -> tuple[Call, bool]:
    """The prompt or the messages, as a call that asks for nothing; and whether the tokens' texts
    are wanted too."""
    fields = Fields(body)
    fields.text("model")
    wants_texts = fields.flag("return_token_strs")
    if fields.get("messages") is None:
        prompt = fields.text("prompt", max_chars=MAX_TOKENIZED_CHARS)
        if prompt is None:
            raise fields.wrong("prompt", "must be a string, not null")
        special = fields.flag("add_special_tokens", default=True)
        return Call((GenerateRequest(prompt, add_special_tokens=special),)), wants_texts
    if fields.get("prompt") is not None:
        raise fields.wrong("prompt", "excludes `messages`")
    fields.refuse("add_special_tokens", False)  # the template writes them
    fields.refuse("chat_template")
    call = Call(
        (GenerateRequest(""),),
        messages=parse_messages(fields, "messages"),
        chat=replace(parse_chat_options(fields), tools=parse_tools(fields)),
    )
    return call, wants_texts


def render_tokens(
    ids: Sequence[int], max_model_len: int, texts: Sequence[str] | None
) -> dict[str, Any]:
    return {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": list(ids),
        "token_strs": None if texts is None else list(texts),
    }


def parse_detokenize(body: Mapping[str, Any], limits: Limits) -> tuple[int, ...]:
    fields = Fields(body)
    fields.text("model")
    if fields.items("tokens") is None:
        raise fields.wrong("tokens", "must be a list of token ids")
    return fields.token_ids("tokens", limits.vocab_size)
