"""OpenAI's /v1/responses, out: a response object, and the events that build it in a stream.

One writer makes both: the items that its events built are the items of the whole response.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jlorax.types import FinishReason, GenerateResult, Token
from jlorax.wire.openai_answers import TokenText, chat_logprobs
from jlorax.wire.tools import CallArguments, CallBegun, Piece, TextPiece

Event = dict[str, Any]
"""One event; its name stands in ``type``."""


@dataclass
class ResponseWriter:
    """One response as it grows. ``echo`` is what it repeats of its request; ``token_text`` None:
    no log-probabilities are shown."""

    model: str
    created_s: int  # Unix time
    echo: Mapping[str, Any]
    token_text: TokenText | None = None
    id: str = field(default_factory=lambda: _new_id("resp"))
    _output: list[dict[str, Any]] = field(default_factory=list)
    _is_open: bool = False  # the last item
    _unshown: list[Token] = field(default_factory=list)  # their text is still to come
    _num_events: int = 0

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def add(self, tokens: Sequence[Token], pieces: Iterable[Piece]) -> Iterator[Event]:
        """``pieces``: what ``tokens`` let be said."""
        self._unshown += tokens
        for piece in pieces:
            match piece:
                case TextPiece(text):
                    yield from self._add_text(text)
                case CallBegun(_, call_id, name):
                    yield from self._begin_call(call_id, name)
                case CallArguments(_, text):
                    yield from self._add_arguments(text)

    def end(self, result: GenerateResult) -> Iterator[Event]:
        """The last event carries the whole response."""
        status = "incomplete" if result.finish_reason is FinishReason.LENGTH else "completed"
        if not self._output:
            yield from self._begin_message()
        yield from self._close_item(status)
        yield self._event(f"response.{status}", response=self.whole(result))

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        is_cut = result.finish_reason is FinishReason.LENGTH
        details = {"reason": "max_output_tokens"} if is_cut else None
        num_in, num_out = len(result.prompt_token_ids), len(result.tokens)
        usage = {
            "input_tokens": num_in,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_out,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_in + num_out,
        }
        status = "incomplete" if is_cut else "completed"
        return self._response(status, usage=usage, incomplete_details=details)

    def failed(self, error: Mapping[str, Any]) -> Event:
        """The event of an error in the middle, in the words of ``render_openai_error``."""
        return self._event("error", **error["error"], error=error["error"])

    def _response(self, status: str, **changes: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": list(self._output),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self.echo,
            **changes,
        }

    def _event(self, kind: str, **values: Any) -> Event:
        self._num_events += 1
        return {**values, "type": kind, "sequence_number": self._num_events - 1}

    def _item_event(self, kind: str, **values: Any) -> Event:
        """About the last item."""
        place = len(self._output) - 1
        return self._event(kind, output_index=place, item_id=self._output[place]["id"], **values)

    def _begin_item(self, item: dict[str, Any]) -> Iterator[Event]:
        if self._is_open:
            yield from self._close_item("completed")
        self._output.append(item)
        self._is_open = True
        place = len(self._output) - 1
        shown = {**item, "content": []} if item["type"] == "message" else dict(item)
        yield self._event("response.output_item.added", output_index=place, item=shown)

    def _begin_message(self) -> Iterator[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._begin_item(
            {
                "id": _new_id("msg"),
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [part],
            }
        )
        yield self._item_event(
            "response.content_part.added", content_index=0, part=dict(part, logprobs=[])
        )

    def _begin_call(self, call_id: str, name: str) -> Iterator[Event]:
        self._unshown.clear()  # OpenAI's calls carry no log-probabilities
        yield from self._begin_item(
            {
                "id": _new_id("fc"),
                "type": "function_call",
                "call_id": call_id,
                "name": name,
                "arguments": "",
                "status": "in_progress",
            }
        )

    def _add_text(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if not self._is_open or self._output[-1]["type"] != "message":
            yield from self._begin_message()
        part = self._output[-1]["content"][0]
        logprobs = self._logprobs()
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._item_event(
            "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
        )

    def _logprobs(self) -> list[dict[str, Any]]:
        tokens, self._unshown = self._unshown, []
        if self.token_text is None:
            return []
        content: list[dict[str, Any]] = chat_logprobs(tokens, self.token_text)["content"]
        return content

    def _add_arguments(self, text: str) -> Iterator[Event]:
        self._output[-1]["arguments"] += text
        yield self._item_event("response.function_call_arguments.delta", delta=text)

    def _close_item(self, status: str) -> Iterator[Event]:
        item = self._output[-1]
        item["status"] = status
        self._is_open = False
        closing = self._closing_message if item["type"] == "message" else self._closing_call
        yield from closing(item)
        place = len(self._output) - 1
        yield self._event("response.output_item.done", output_index=place, item=dict(item))

    def _closing_message(self, item: Mapping[str, Any]) -> Iterator[Event]:
        (part,) = item["content"]
        yield self._item_event(
            "response.output_text.done",
            content_index=0,
            text=part["text"],
            logprobs=part["logprobs"],
        )
        yield self._item_event("response.content_part.done", content_index=0, part=part)

    def _closing_call(self, item: Mapping[str, Any]) -> Iterator[Event]:
        yield self._item_event(
            "response.function_call_arguments.done",
            name=item["name"],
            arguments=item["arguments"],
        )


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
