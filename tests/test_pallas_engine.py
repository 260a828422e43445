"""The whole engine on packed steps and Pallas kernels, interpreted, against the same engine on XLA.

What only a GPU runs in earnest: blocks of rows and queries, steps without adapters, fused products,
scored prompts.
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
from jlorax.types import EmbedRequest, GenerateRequest, SamplingParams
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
        executable_dir=folders / "executables",
    )


def requests() -> list[GenerateRequest]:
    """Mixed batches, a batch of the base alone, a drawn one and one with rules."""
    adapters = ("a0", None, "a1", "a0", "a2", None)
    mixed = [
        GenerateRequest(
            prompt=PROMPTS[i % 4], adapter_id=adapter, max_new_tokens=9, ignore_eos=True
        )
        for i, adapter in enumerate(adapters)
    ]
    drawn = GenerateRequest(prompt=PROMPTS[1], adapter_id="a1", sampling=SAMPLED, max_new_tokens=8)
    ruled = GenerateRequest(
        prompt=PROMPTS[2],
        adapter_id="a2",
        logit_bias=((tiny_llama.EOS, 100.0), (5, 90.0)),
        min_new_tokens=3,
        max_new_tokens=8,
    )
    return [*mixed, drawn, ruled]


async def answers(config: EngineConfig) -> list[list[int]]:
    async def one(engine: Engine, request: GenerateRequest) -> list[int]:
        return [event.token.id async for event in engine.generate(request)]

    async with await Engine.start(config) as engine:
        together = [one(engine, request) for request in requests()]
        found: Sequence[list[int]] = await asyncio.gather(*together)
        alone = await one(engine, requests()[1])
        assert alone == found[1]
        assert found[-1] == [5, 5, 5, tiny_llama.EOS]
        assert engine.stats().executables_compiled_after_ready == 0
        return list(found)


@pytest.mark.slow
def test_pallas_gives_the_tokens_of_xla(folders: Path) -> None:
    ours, xla = (
        asyncio.run(answers(config(folders, kernels))) for kernels in ("pallas_interpret", "xla")
    )
    assert ours == xla
    assert len({tuple(tokens) for tokens in ours}) > 4  # adapters and prompts make a difference


def scores_of(config: EngineConfig) -> tuple[list[float], list[list[float]]]:
    """Every log-probability of scored prompts, and embeddings, of the base and adapters."""
    asked = [(PROMPTS[i % 4], adapter) for i, adapter in enumerate(("a0", None, "a1", "a2", "a0"))]

    async def scored(engine: Engine, prompt: tuple[int, ...], adapter: str | None) -> list[float]:
        request = GenerateRequest(
            prompt, adapter_id=adapter, max_new_tokens=2, prompt_logprobs=True, num_top_logprobs=3
        )
        events = [event async for event in engine.generate(request)]
        result = events[-1].result
        assert result is not None
        rest = result.prompt_tokens[1:]
        alternatives = [a.logprob for token in rest for a in token.alternatives]
        assert len(alternatives) == 3 * len(rest) == 3 * (len(prompt) - 1)
        return [*(token.logprob or 0.0 for token in rest), *alternatives]

    async def all_of_them() -> tuple[list[float], list[list[float]]]:
        async with await Engine.start(config) as engine:
            found = await asyncio.gather(*(scored(engine, *one) for one in asked))
            requests = [EmbedRequest(prompt, adapter_id=adapter) for prompt, adapter in asked]
            embedded = await asyncio.gather(*(engine.embed(request) for request in requests))
            return [x for part in found for x in part], [list(e.embedding) for e in embedded]

    return asyncio.run(all_of_them())


@pytest.mark.slow
def test_pallas_scores_prompts_as_xla(folders: Path) -> None:
    (ours, our_means), (theirs, their_means) = (
        scores_of(config(folders, kernels)) for kernels in ("pallas_interpret", "xla")
    )
    assert ours == pytest.approx(theirs, abs=1e-3)
    for ours, theirs in zip(our_means, their_means, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
