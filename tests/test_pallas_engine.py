"""The whole engine on packed steps and Pallas kernels, interpreted, against the same engine on XLA.

What only a GPU runs in earnest: blocks of rows and queries, steps without adapters, fused products.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine
from jlorax.types import GenerateRequest, SamplingParams
from tests import tiny_llama

NUM_ADAPTERS = 3
PROMPTS = tuple(tuple(3 + (7 * i + j) % 60 for j in range(n)) for i, n in enumerate((1, 9, 30, 17)))
SAMPLED = SamplingParams(temperature=0.9, top_k=20, seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_llama.write_model(root / "model")
    for i in range(NUM_ADAPTERS):
        tiny_llama.write_adapter(root / f"a{i}", seed=i)
    return root


def config(folders: Path, kernels: str) -> EngineConfig:
    return EngineConfig(
        cache_dir=folders / "cache",
        model=ModelSource(str(folders / "model")),
        steps=StepConfig((4,), extend_buckets=(32,), kernels=kernels),
        scheduler=SchedulerConfig(max_batch=4),
        kv=KVConfig(max_seq_len=64, page_size=8),
        adapters=AdapterConfig(
            named=tuple((f"a{i}", folders / f"a{i}") for i in range(NUM_ADAPTERS)),
            bank_bytes=1 << 20,
            max_slots=2,
            max_rank=16,
        ),
    )


def requests() -> list[GenerateRequest]:
    """Mixed batches, a batch of the base alone, and a drawn one."""
    adapters = ("a0", None, "a1", "a0", "a2", None)
    mixed = [
        GenerateRequest(
            prompt=PROMPTS[i % 4], adapter_id=adapter, max_new_tokens=9, ignore_eos=True
        )
        for i, adapter in enumerate(adapters)
    ]
    drawn = GenerateRequest(prompt=PROMPTS[1], adapter_id="a1", sampling=SAMPLED, max_new_tokens=8)
    return [*mixed, drawn]


async def answers(config: EngineConfig) -> list[list[int]]:
    async def one(engine: Engine, request: GenerateRequest) -> list[int]:
        return [event.token.id async for event in engine.generate(request)]

    async with await Engine.start(config) as engine:
        together = [one(engine, request) for request in requests()]
        found: Sequence[list[int]] = await asyncio.gather(*together)
        alone = await one(engine, requests()[1])
        assert alone == found[1]
        assert engine.stats().executables_compiled_after_ready == 0
        return list(found)


def test_pallas_gives_the_tokens_of_xla(folders: Path) -> None:
    ours, xla = (
        asyncio.run(answers(config(folders, kernels))) for kernels in ("pallas_interpret", "xla")
    )
    assert ours == xla
    assert len({tuple(tokens) for tokens in ours}) > 4  # adapters and prompts make a difference
