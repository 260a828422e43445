"""The front-end benchmark's stand-ins for an engine: no model, tokens on a clock.

The text of a token says when its request arrived and when the token was due, in microseconds of the
machine's monotonic clock, so that a load on the same machine can tell the front end's time from the
stand-in's.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from jlorax.tokenizer import Tokenizer
from jlorax.types import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    Token,
    TokenEvent,
)

MAX_SEQ_LEN = 8192
_A_TOKEN_ID = 100


_STAMP = re.compile(rb"<(\d+) (\d+)>")


class Stamp(NamedTuple):
    """What the text of a token says, in microseconds; ``end`` is where it ends in an answer."""

    arrived_us: int
    due_us: int
    end: int


def stamps_in(answer: bytes) -> list[Stamp]:
    return [Stamp(int(m[1]), int(m[2]), m.end()) for m in _STAMP.finditer(answer)]


class StandInEngine(ABC):
    """The part of ``ServedEngine`` that the measured routes use. Every request is greedy."""

    def __init__(self, tokenizer: Tokenizer, model_id: str) -> None:
        self.tokenizer = tokenizer
        self.model_info = ModelInfo(
            model_id=model_id,
            architecture="none",
            dtype="none",
            device="none",
            vocab_size=tokenizer.vocab_size,
            max_seq_len=MAX_SEQ_LEN,
            max_batch=1024,
            max_rank=64,
            max_slots=1,
            eos_token_ids=tokenizer.eos_token_ids,
        )
        self._num_open = 0
        self._state = "ready"

    @abstractmethod
    async def run(self) -> None:
        """The clock: a task of the caller's."""

    @abstractmethod
    def _dues(self, arrived_s: float) -> AsyncGenerator[int, None]:
        """Gives each token when it is due, and says which microsecond that was."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        arrived_s = asyncio.get_running_loop().time()
        arrived_us = round(arrived_s * 1e6)
        num_tokens = request.max_new_tokens or MAX_SEQ_LEN
        tokens: list[Token] = []
        self._num_open += 1
        try:
            async with aclosing(self._dues(arrived_s)) as dues:
                async for due_us in dues:
                    tokens.append(Token(_A_TOKEN_ID, f"<{arrived_us} {due_us}>", -1.0, False))
                    is_last = len(tokens) == num_tokens
                    whole = self._result(request, tokens) if is_last else None
                    yield TokenEvent(tokens[-1], len(tokens) - 1, whole)
                    if is_last:
                        return
        finally:
            self._num_open -= 1

    async def chat_tokenizer(self, request: GenerateRequest) -> Tokenizer:
        return self.tokenizer

    def _result(self, request: GenerateRequest, tokens: list[Token]) -> GenerateResult:
        prompt = request.prompt
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        text = "".join(token.text for token in tokens)
        return GenerateResult(text, FinishReason.LENGTH, tuple(tokens), ids, seed=None)

    def stats(self) -> EngineStats:
        return EngineStats(self._state, 0, self._num_open, 1, 1, 0, 0, 0)

    async def drain(self) -> None:
        """Waits for nothing: the benchmark has ended."""
        self._state = "draining"


class DelayEngine(StandInEngine):
    """All tokens of an answer are due ``delay_s`` after it was asked for."""

    def __init__(self, tokenizer: Tokenizer, model_id: str, delay_s: float) -> None:
        super().__init__(tokenizer, model_id)
        self._delay_s = delay_s

    async def run(self) -> None:
        """Every request has a timer of its own."""

    async def _dues(self, arrived_s: float) -> AsyncGenerator[int, None]:
        due_s = arrived_s + self._delay_s
        await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        while True:
            yield round(due_s * 1e6)


class StepEngine(StandInEngine):
    """Every ``step_s`` all open requests get a token at the same moment, as a device's step hands
    them out."""

    def __init__(self, tokenizer: Tokenizer, model_id: str, step_s: float) -> None:
        super().__init__(tokenizer, model_id)
        self._step_s = step_s
        self._inboxes: dict[asyncio.Queue[int], None] = {}

    async def run(self) -> None:
        """A step that came late moves none of the later ones."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s += self._step_s
            await asyncio.sleep(due_s - loop.time())
            due_us = round(due_s * 1e6)
            for inbox in self._inboxes:
                inbox.put_nowait(due_us)

    async def _dues(self, arrived_s: float) -> AsyncGenerator[int, None]:
        inbox: asyncio.Queue[int] = asyncio.Queue()
        self._inboxes[inbox] = None
        try:
            while True:
                yield await inbox.get()
        finally:
            del self._inboxes[inbox]
