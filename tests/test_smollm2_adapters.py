"""Every adapter that ships, over SmolLM2 in one mixed batch, against transformers + peft."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.demo import DEMO_ADAPTERS, DEMO_PROMPT
from jlorax.engine import Engine
from jlorax.types import GenerateRequest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

_NUM_TOKENS = 64
_TIE = 1e-4  # of the largest logit
_MOST_OTHERS_IN_BFLOAT16 = 0.02  # of all tokens, each after the float32 answer so far
_EVERY = 4  # of an answer's places
_PROMPTS = (
    DEMO_PROMPT,
    *(demo.prompt for demo in DEMO_ADAPTERS),
    "Write a short poem about the sea.",
    "What is the capital of France, and what is it known for?",
    "Table planets(name, mass, moons).\nHow many planets have more than 2 moons?",
    "I loved every minute of it, even the long ones.",
    "My name is Jonas Berg, I am 27, I live in Oslo and I work as a pilot.",
)
assert len(_PROMPTS) == 10
_Row = tuple[str | None, tuple[int, ...]]


def _config(folder: Path, dtype: str = "float32") -> EngineConfig:
    """Two executables, kept in the user's cache: compiling them takes longer than the test."""
    cache_dir = Path(os.environ.get("JLORAX_CACHE_DIR", "~/.cache/jlorax")).expanduser()
    return EngineConfig(
        cache_dir=cache_dir,
        model=ModelSource(str(folder), dtype),
        steps=StepConfig((8,), (64,)),
        scheduler=SchedulerConfig(max_batch=8),
        kv=KVConfig(max_seq_len=256),
        adapters=AdapterConfig(
            named=tuple((demo.name, demo.folder) for demo in DEMO_ADAPTERS),
            bank_bytes=64 << 20,
            max_slots=len(DEMO_ADAPTERS),
            max_rank=16,
        ),
        executable_dir=cache_dir / "executables",
    )


async def _answers(folder: Path, prompts: tuple[str, ...]) -> dict[_Row, list[int]]:
    """Base and adapters at once: (adapter, prompt's ids) -> greedy tokens."""
    async with await Engine.start(_config(folder)) as engine:

        async def one(adapter: str | None, prompt: tuple[int, ...]) -> list[int]:
            request = GenerateRequest(
                prompt, adapter_id=adapter, max_new_tokens=_NUM_TOKENS, ignore_eos=True
            )
            return [event.token.id async for event in engine.generate(request)]

        chats = [engine.tokenizer.encode_chat([{"role": "user", "content": p}]) for p in prompts]
        names = [None, *(demo.name for demo in DEMO_ADAPTERS)]
        rows: list[_Row] = [(name, tuple(chat)) for chat in chats for name in names]
        return dict(zip(rows, await asyncio.gather(*(one(*row) for row in rows)), strict=True))


def _check(folder: Path, prompts: tuple[str, ...]) -> None:
    answers = asyncio.run(_answers(folder, prompts))
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    for (adapter, prompt), tokens in answers.items():
        if adapter is None:
            _check_greedy(model, adapter, prompt, tokens)
    for demo in DEMO_ADAPTERS:
        adapted = peft.PeftModel.from_pretrained(model, str(demo.folder)).eval()
        for (adapter, prompt), tokens in answers.items():
            if adapter == demo.name:
                _check_greedy(adapted, adapter, prompt, tokens)
                assert tokens != answers[None, prompt], f"{adapter} answers as the base does"
        model = adapted.unload()


def _check_greedy(
    model: Any, adapter: str | None, prompt: tuple[int, ...], tokens: list[int]
) -> None:
    """One pass over prompt and answer: each token is its place's argmax exactly when the greedy
    answer is the same, token for token."""
    assert len(tokens) == _NUM_TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 :].numpy()
    for i in np.flatnonzero(logits.argmax(-1) != tokens):
        margin = logits[i].max() - logits[i, tokens[i]]
        assert margin < _TIE * np.abs(logits[i]).max(), (adapter, i, margin)
        print(f"{adapter}: token {i} is a tie, margin {margin:.1e}")


@pytest.mark.slow
def test_one_prompt(smollm2_dir: Path) -> None:
    _check(smollm2_dir, _PROMPTS[:1])


@pytest.mark.slow
def test_ten_prompts(smollm2_dir: Path) -> None:
    _check(smollm2_dir, _PROMPTS)


@pytest.mark.slow
def test_bfloat16_seldom_chooses_another_token(smollm2_dir: Path) -> None:
    answers = asyncio.run(_answers(smollm2_dir, _PROMPTS))
    places = [
        (adapter, (*prompt, *tokens[:i]), tokens[i])
        for (adapter, prompt), tokens in answers.items()
        for i in range(0, _NUM_TOKENS, _EVERY)
    ]
    chosen = asyncio.run(_next_tokens(smollm2_dir, [place[:2] for place in places]))
    others = sum(token != place[2] for token, place in zip(chosen, places, strict=True))
    print(f"{others} of {len(places)} tokens differ")
    assert others < _MOST_OTHERS_IN_BFLOAT16 * len(places)


async def _next_tokens(folder: Path, rows: list[_Row]) -> list[int]:
    """What the engine in bfloat16 says first after each of these."""
    config = _config(folder, "bfloat16")
    async with await Engine.start(config) as engine:
        at_once = asyncio.Semaphore(config.scheduler.max_batch)

        async def one(adapter: str | None, prompt: tuple[int, ...]) -> int:
            request = GenerateRequest(prompt, adapter_id=adapter, max_new_tokens=1, ignore_eos=True)
            async with at_once:
                events = [event async for event in engine.generate(request)]
            return events[0].token.id

        return list(await asyncio.gather(*(one(*row) for row in rows)))
