"""The engine against arrays that transformers and peft computed (make_golden.py), without torch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
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
from jlorax.device import sampling
from jlorax.engine import Engine
from jlorax.types import GenerateRequest

DATA = Path(__file__).parent / "data"
FAMILIES = sorted(path.name for path in DATA.iterdir())
_TOLERANCE = 1e-3  # of the largest logit, in float32
_MAX_BATCH = 8


@dataclass(frozen=True)
class Row:
    """prompt i32[n]   tokens i32[m]: greedy   logits f32[k, V]: before the first k tokens."""

    adapter: str | None
    prompt: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray


def rows_of(family: str) -> list[Row]:
    with np.load(DATA / family / "answers.npz") as file:
        count = sum(name.startswith("prompt_") for name in file)
        return [
            Row(
                str(file[f"adapter_{i}"]) or None,
                *(file[f"{key}_{i}"] for key in ("prompt", "tokens", "logits")),
            )
            for i in range(count)
        ]


def config_for(family: str, cache_dir: Path) -> EngineConfig:
    folder = DATA / family
    named = tuple((p.name, p) for p in sorted(folder.iterdir()) if p.is_dir() and p.name != "model")
    return EngineConfig(
        cache_dir=cache_dir,
        model=ModelSource(str(folder / "model")),
        steps=StepConfig((_MAX_BATCH,), (32,), tile=8),
        scheduler=SchedulerConfig(max_batch=_MAX_BATCH),
        kv=KVConfig(page_size=8),
        adapters=AdapterConfig(named=named, bank_bytes=1 << 20, max_slots=2, max_rank=32),
    )


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))


async def answer(engine: Engine, row: Row) -> tuple[list[int], np.ndarray]:
    """Tokens, and the log-probabilities of the whole vocabulary before each of the first k."""
    request = GenerateRequest(
        tuple(row.prompt.tolist()),
        adapter_id=row.adapter,
        max_new_tokens=len(row.tokens),
        ignore_eos=True,
        num_top_logprobs=row.logits.shape[1],
    )
    tokens = [event.token async for event in engine.generate(request)]
    logprobs = np.zeros(row.logits.shape)
    for line, token in zip(logprobs, tokens, strict=False):
        line[[a.id for a in token.alternatives]] = [a.logprob for a in token.alternatives]
    return [token.id for token in tokens], logprobs


async def answer_all(
    family: str, cache_dir: Path, rows: list[Row]
) -> list[tuple[list[int], np.ndarray]]:
    """Base and adapters in one batch."""
    async with await Engine.start(config_for(family, cache_dir)) as engine:
        return list(await asyncio.gather(*(answer(engine, row) for row in rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(family)
    monkeypatch.setattr(sampling, "NUM_ALTERNATIVES", rows[0].logits.shape[1])
    assert {row.adapter for row in rows} > {None}
    answers = asyncio.run(answer_all(family, tmp_path, rows))
    for row, (tokens, logprobs) in zip(rows, answers, strict=True):
        np.testing.assert_allclose(
            logprobs,
            log_probabilities(row.logits),
            rtol=0,
            atol=_TOLERANCE * np.abs(row.logits).max(),
        )
        assert tokens == row.tokens.tolist(), row.adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_far_from_the_base(family: str) -> None:
    """Or a golden file that proves nothing would pass."""
    by_length: dict[int, dict[str | None, Row]] = {}
    for row in rows_of(family):
        by_length.setdefault(len(row.prompt), {})[row.adapter] = row
    for rows in by_length.values():
        base = rows.pop(None)
        assert rows
        for row in rows.values():
            moved = np.abs(row.logits[0] - base.logits[0]).max()
            assert moved >= 100 * _TOLERANCE * np.abs(row.logits).max()
