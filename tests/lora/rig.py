"""One engine over one tiny model with all its adapters; every log-probability passes its door."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlorax.config import AdapterConfig, StepConfig
from jlorax.device import sampling
from jlorax.engine import Engine
from jlorax.types import GenerateRequest
from tests.lora.cases import Family
from tests.lora.oracle import logits_of, write_adapter
from tests.models.tiny import VOCAB_SIZE, engine_for, load_truth

MAX_BATCH = 16
MAX_SLOTS = 8  # fewer than a family has adapters: pages are written over again and again
_BANK_BYTES = 24 << 20


@dataclass(frozen=True)
class Ask:
    """A prompt, and the adapter that answers it: None is the base model."""

    adapter: str | None
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """tokens [n], and log-probabilities before each: [n, V], or [n, 0] when nobody asked."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Rig:
    engine: Engine
    runner: asyncio.Runner
    base: Any
    folders: dict[str, Path]

    def answer(self, asks: list[Ask], num_tokens: int, *, logprobs: bool) -> list[Answer]:
        """All of them at once, in the batches that the engine makes of them."""

        async def together() -> list[Answer]:
            return list(
                await asyncio.gather(*(self._one(ask, num_tokens, logprobs) for ask in asks))
            )

        return self.runner.run(together())

    async def _one(self, ask: Ask, num_tokens: int, logprobs: bool) -> Answer:
        width = VOCAB_SIZE if logprobs else 0
        request = GenerateRequest(
            ask.prompt,
            adapter_id=ask.adapter,
            max_new_tokens=num_tokens,
            ignore_eos=True,
            num_top_logprobs=width,
        )
        tokens = [event.token async for event in self.engine.generate(request)]
        rows = np.zeros((len(tokens), width))
        for row, token in zip(rows, tokens, strict=True):
            row[[a.id for a in token.alternatives]] = [a.logprob for a in token.alternatives]
        return Answer(tuple(t.id for t in tokens), rows)

    def truth(self, ask: Ask, tokens: tuple[int, ...]) -> np.ndarray:
        """PEFT's logits before each of ``tokens``, which follow the prompt: f32[n, V].

        Its argmax is the token at every place exactly when PEFT's greedy answer is ``tokens``.
        """
        folder = None if ask.adapter is None else self.folders[ask.adapter]
        logits = logits_of(self.base, folder, [ask.prompt + tokens[:-1]])[0]
        return logits[len(ask.prompt) - 1 :]


@contextmanager
def open_rig(family: Family, folder: Path) -> Iterator[Rig]:
    base = load_truth(family.model.save(folder / "model"))
    folders = {name: folder / f"adapter-{i}" for i, name in enumerate(family.cases)}
    for i, (name, case) in enumerate(family.cases.items()):
        write_adapter(base, folders[name], case.changes, case.dtype, seed=i)
    adapters = AdapterConfig(
        named=tuple(folders.items()), bank_bytes=_BANK_BYTES, max_slots=MAX_SLOTS, max_rank=256
    )
    opening = engine_for(
        folder / "model",
        folder / "cache",
        steps=StepConfig((MAX_BATCH,), (64,), tile=8),
        max_batch=MAX_BATCH,
        adapters=adapters,
    )
    with asyncio.Runner() as runner:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "NUM_ALTERNATIVES", VOCAB_SIZE)
            engine = runner.run(opening.__aenter__())
        try:
            yield Rig(engine, runner, base, folders)
        finally:
            runner.run(engine.stop())
