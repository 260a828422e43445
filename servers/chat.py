"""A chat becomes token ids: its messages, tools and options through the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jlorax.wire.call import Call
from jlorax.wire.tools import as_text, offered


class ChatTokenizer(Protocol):
    """What a chat needs of a tokenizer."""

    def chat_reads(self, name: str) -> bool: ...
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]: ...


def chat_ids(tokenizer: ChatTokenizer, call: Call) -> tuple[int, ...]:
    """Templates that read no tools get them, and all about them, as text (``wire.tools``)."""
    assert call.messages is not None
    messages, chat = call.messages, call.chat
    tools = offered(chat.tools, call.tool_choice)
    if not tokenizer.chat_reads("tools"):
        messages, tools = as_text(messages, tools), ()
    return tuple(
        tokenizer.encode_chat(
            [message.to_template() for message in messages],
            list(tools) or None,
            chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            documents=list(chat.documents) or None,
            variables=chat.variables,
        )
    )


def chat_size(call: Call) -> int:
    """Characters, roughly: enough to know whether it takes long."""
    chat = call.chat
    said = sum(
        len(message.content) + sum(len(made.arguments) for made in message.tool_calls)
        for message in call.messages or ()
    )
    return said + 1000 * (len(chat.tools) + len(chat.documents) + len(chat.variables))
