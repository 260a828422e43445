"""How one call's answers are shown in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jlorax.types import GenerateRequest, GenerateResult, TokenEvent
from jlorax.version import own_version
from jlorax.wire import openai_answers as wire
from jlorax.wire.call import Call
from jlorax.wire.strict_json import dumps
from jlorax.wire.tools import CallArguments, CallBegun, Piece, TextPiece, gathered
from servers.serving import ServedEngine, count_prompt_tokens, prompt_text
from servers.tools import AnswerReader, has_tools


class Show(ABC):
    """Shows one call's answers; while streaming it counts what it has shown."""

    kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, engine: ServedEngine, call: Call) -> None:
        self.engine = engine
        self.call = call
        self.token_text = engine.tokenizer.token_text
        self.envelope = wire.Envelope(
            id=f"{self.id_prefix}-{uuid.uuid4().hex}",
            created_s=int(time.time()),
            model=call.model,
            fingerprint=f"jlorax-{own_version()}",
        )
        show = call.show
        # whether chunks in the middle of an answer differ in more than their text
        self._is_detailed = show.logprobs or show.return_token_ids or show.continuous_usage
        self._results: dict[int, GenerateResult] = {}
        self._num_tokens: dict[int, int] = {}
        self._frames: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def _choice(self, index: int, result: GenerateResult) -> dict[str, Any]:
        """One whole answer; ``index`` is its place among those that are shown."""

    @abstractmethod
    def _deltas(self, index: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        """What one token adds to the answer of request ``index``."""

    def whole(self, results: Sequence[GenerateResult]) -> dict[str, Any]:
        choices = [self._choice(i, result) for i, result in enumerate(self.call.shown(results))]
        return self.envelope.around(self.kind, choices, usage=self._usage(results))

    def chunks(self, index: int, event: TokenEvent) -> list[str]:
        """JSON, one chunk a token.

        Chunks in the middle of an answer differ in their text alone, so they are built once.
        """
        first = index not in self._num_tokens
        self._num_tokens[index] = self._num_tokens.get(index, 0) + 1
        if first or event.result is not None or self._is_detailed:
            return [dumps(chunk) for chunk in self._whole_chunks(index, event, first)]
        if index not in self._frames:
            self._frames[index] = self._frame(index, event)
        head, tail = self._frames[index]
        return [head + dumps(event.token.text) + tail]

    def usage_chunk(self) -> dict[str, Any]:
        results = [self._results[index] for index in range(len(self.call.requests))]
        return self.envelope.around(self.chunk_kind, [], usage=self._usage(results))

    def _usage(self, results: Sequence[GenerateResult]) -> dict[str, int]:
        return wire.usage(
            count_prompt_tokens(results, self.call.num_prompts),
            sum(len(result.tokens) for result in results),
        )

    def _frame(self, index: int, event: TokenEvent) -> tuple[str, str]:
        """What stands before and after the text."""
        mark = uuid.uuid4().hex  # no name of a model can be it
        marked = replace(event, token=replace(event.token, text=mark))
        (chunk,) = self._whole_chunks(index, marked, first=False)
        head, tail = dumps(chunk).split(dumps(mark))
        return head, tail

    def _whole_chunks(self, index: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        if event.result is not None:
            self._results[index] = event.result
        return [self._chunk(shown) for shown in self._deltas(index, event, first)]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        show = self.call.show
        more: dict[str, Any] = {"usage": None} if show.include_usage else {}
        if show.continuous_usage:
            more = {"usage": self._usage_so_far()}
        return self.envelope.around(self.chunk_kind, [choice], **more)

    def _usage_so_far(self) -> dict[str, int]:
        """Prompts are token ids here: serving.tokenized saw to it."""
        prompt_tokens = sum(len(request.prompt) for request in self.call.prompts)
        return wire.usage(prompt_tokens, sum(self._num_tokens.values()))


class CompletionShow(Show):
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, engine: ServedEngine, call: Call) -> None:
        super().__init__(engine, call)
        self._num_chars: dict[int, int] = {}

    def _choice(self, index: int, result: GenerateResult) -> dict[str, Any]:
        num_shown = self.call.num_best or self.call.num_samples
        echoed = self._echoed(self.call.prompts[index // num_shown])
        return wire.completion_choice(index, result, self.call.show, echoed, self.token_text)

    def _deltas(self, index: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        """With echo the prompt comes as a chunk of its own before the first token."""
        echoed = self._echoed(self.call.requests[index]) if first else ""
        offset = self._num_chars.get(index, len(echoed))
        self._num_chars[index] = offset + len(event.token.text)
        shown = [] if not echoed else [wire.echo_delta(index, echoed)]
        delta = wire.completion_delta(
            index, event.token, event.result, self.call.show, offset, self.token_text
        )
        return [*shown, delta]

    def _echoed(self, request: GenerateRequest) -> str:
        return prompt_text(self.engine, request) if self.call.show.echo else ""


class ChatShow(Show):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, engine: ServedEngine, call: Call) -> None:
        super().__init__(engine, call)
        self._readers = [AnswerReader(engine, call) for _ in call.requests]
        self._is_detailed |= has_tools(call)

    def _choice(self, index: int, result: GenerateResult) -> dict[str, Any]:
        content, calls = gathered(AnswerReader(self.engine, self.call).read(result))
        return wire.chat_choice(index, result, self.call.show, content, calls, self.token_text)

    def _deltas(self, index: int, event: TokenEvent, first: bool) -> list[dict[str, Any]]:
        """An answer ends with an empty delta of its own, as OpenAI's does. A token that says
        nothing yet, because a call may be beginning, has a chunk only for its details."""
        show, result = self.call.show, event.result
        reader = self._readers[index]
        pieces = reader.push(event.token, is_last=result is not None)
        deltas = [_delta(piece) for piece in pieces]
        if not deltas and (first or show.logprobs or show.return_token_ids):
            deltas = [{"content": ""}]
        if first:
            deltas[0] = {"role": "assistant", **deltas[0]}
        shown = [
            wire.chat_delta(index, delta, () if place else (event.token,), show, self.token_text)
            for place, delta in enumerate(deltas)
        ]
        if result is None:
            return shown
        return [*shown, wire.chat_end(index, result, show, reader.has_called)]


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case TextPiece(text):
            return {"content": text}
        case CallBegun(place, call_id, name):
            return wire.call_begun(place, call_id, name)
        case CallArguments(place, text):
            return wire.call_continued(place, text)
