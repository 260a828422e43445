"""The front-end benchmark's stand-in for an engine: no model, tokens on a fixed clock.

Every ``step_s`` each open request gets one token, all at the same moment, as a device's step hands
them out. The text of a token says when its request arrived and when the token was due, in
microseconds of the machine's monotonic clock, so that a load on the same machine can tell the front
end's time from the stand-in's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
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


class StandInEngine:
    """The part of ``ServedEngine`` that the measured routes use; every request is for ever greedy.

    ``run`` is its clock: a task of the caller's.
    """

    def __init__(self, tokenizer: Tokenizer, model_id: str, step_s: float) -> None:
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
        self._step_s = step_s
        self._open: dict[asyncio.Queue[int], None] = {}  # the microsecond each token is due

    async def run(self) -> None:
        """Hands out tokens on time; a step that came late moves none of the later ones."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s += self._step_s
            await asyncio.sleep(due_s - loop.time())
            due_us = round(due_s * 1e6)
            for inbox in self._open:
                inbox.put_nowait(due_us)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        arrived_us = round(asyncio.get_running_loop().time() * 1e6)
        inbox: asyncio.Queue[int] = asyncio.Queue()
        self._open[inbox] = None
        tokens: list[Token] = []
        num_tokens = request.max_new_tokens or MAX_SEQ_LEN
        try:
            while len(tokens) < num_tokens:
                text = f"<{arrived_us} {await inbox.get()}>"
                tokens.append(Token(_A_TOKEN_ID, text, -1.0, False))
                whole = self._result(request, tokens) if len(tokens) == num_tokens else None
                yield TokenEvent(tokens[-1], len(tokens) - 1, whole)
        finally:
            del self._open[inbox]

    def _result(self, request: GenerateRequest, tokens: list[Token]) -> GenerateResult:
        prompt = request.prompt
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        text = "".join(token.text for token in tokens)
        return GenerateResult(text, FinishReason.LENGTH, tuple(tokens), ids, seed=None)

    def stats(self) -> EngineStats:
        return EngineStats("ready", 0, len(self._open), 1, 1, 0, 0, 0)

    async def drain(self) -> None:
        """Nobody waits for the answers of a benchmark that has ended."""
