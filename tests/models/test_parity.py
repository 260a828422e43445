"""Base models against transformers in f32, through the whole engine: paged, chunked, batched.

Prompts are longer than a page (8), than a window (16) and than a prefill chunk (32); five of them
share a batch of four, so the last joins while the others run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from jlorax.config import StepConfig
from jlorax.device import sampling
from tests.models import tiny
from tests.models.tiny import Answer, TinyModel, Truth

NUM_TOKENS = 64
PROMPTS = tuple(tiny.prompt(length) for length in (5, 21, 45, 60, 9))


def rope(kind: str, **params: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **params}}


TWO_LAYERS = {"num_hidden_layers": 2}
_NEW_DECODER = {"new_decoder_architecture": True, "num_kv_heads": 2}
_WINDOW = {"sliding_window": 16}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_RW = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "num_attention_heads": 12,  # beyond a power of two, ALiBi's slopes interleave
}
MODELS = {
    "llama-mha": TinyModel("llama", TWO_LAYERS | {"num_key_value_heads": 4}, is_sharded=True),
    "llama-gqa-tied": TinyModel("llama", {"tie_word_embeddings": True}, old_keys=True),
    "llama-biases": TinyModel("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": TinyModel("llama", {"head_dim": 24}),
    "llama-linear": TinyModel("llama", rope("linear", factor=4.0), old_keys=True),
    "llama-dynamic": TinyModel(
        "llama",
        rope("dynamic", factor=4.0) | {"max_position_embeddings": 32} | TWO_LAYERS,
        old_keys=True,
    ),
    "llama-llama3": TinyModel("llama", rope("llama3", **_LLAMA3)),
    "llama-yarn": TinyModel("llama", rope("yarn", **_YARN), old_keys=True),
    "llama-yarn-factor": TinyModel("llama", rope("yarn", **_YARN, attention_factor=1.3)),
    "mistral": TinyModel("mistral", TWO_LAYERS | _WINDOW | {"head_dim": 24}, is_sharded=True),
    "mistral-old": TinyModel("mistral", _WINDOW, old_keys=True),
    "falcon-7b": TinyModel("falcon", {"tie_word_embeddings": False}),
    "falcon-40b": TinyModel("falcon", TWO_LAYERS | _NEW_DECODER, is_sharded=True),
    "falcon-11b": TinyModel(
        "falcon", _NEW_DECODER | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}
    ),
    "falcon-rw": TinyModel("falcon", _RW),
    "falcon-sequential": TinyModel("falcon", {"parallel_attn": False}, old_keys=True),
}


@dataclass(frozen=True)
class Outcome:
    ours: list[Answer]
    theirs: list[Truth]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def all_logprobs() -> Iterator[None]:
    """The stream's alternatives become the whole vocabulary: every logit passes the public door."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUM_ALTERNATIVES", tiny.VOCAB_SIZE)
        yield


_BY_DEFAULT = ("llama-dynamic", "mistral", "falcon-40b")
_SHAPES = [
    pytest.param(name, marks=() if name in _BY_DEFAULT else pytest.mark.slow) for name in MODELS
]


@pytest.fixture(scope="module", params=_SHAPES)
def folder(request: pytest.FixtureRequest, cache_dir: Path) -> Path:
    return MODELS[request.param].save(cache_dir / request.param)


@pytest.fixture(scope="module")
def outcome(folder: Path, cache_dir: Path, all_logprobs: None) -> Outcome:
    return Outcome(asyncio.run(_ours(folder, cache_dir)), _theirs(folder))


async def _ours(folder: Path, cache_dir: Path) -> list[Answer]:
    async with tiny.engine_for(folder, cache_dir) as engine:
        answers = await tiny.ask_all(engine, PROMPTS, NUM_TOKENS, tiny.VOCAB_SIZE)
        assert engine.stats().executables_compiled_after_ready == 0
    return answers


def _theirs(folder: Path) -> list[Truth]:
    """A model a prompt: dynamic RoPE remembers the longest sequence it saw."""
    return [tiny.truth(tiny.load_truth(folder), prompt, NUM_TOKENS) for prompt in PROMPTS]


def test_tokens(outcome: Outcome) -> None:
    for ours, theirs in zip(outcome.ours, outcome.theirs, strict=True):
        assert len(theirs.tokens) == NUM_TOKENS
        assert_same_tokens(ours, theirs)


def test_logits(outcome: Outcome) -> None:
    """As log-probabilities; f32 leaves a tenth of what is asked for, 1e-3 of the largest logit."""
    for ours, theirs in zip(outcome.ours, outcome.theirs, strict=True):
        num_same = _num_same_tokens(ours, theirs) + 1  # beyond a tie the prompts differ
        error = np.abs(ours.logprobs[:num_same] - theirs.logprobs[:num_same]).max()
        assert error < 1e-4 * theirs.largest


def assert_same_tokens(ours: Answer, theirs: Truth) -> None:
    first = _num_same_tokens(ours, theirs)
    if first == len(theirs.tokens):
        return
    message = f"token {first}: {ours.tokens[first]}, transformers chose {theirs.tokens[first]}"
    assert theirs.is_tie(first), message
    print("a tie:", message)


def _num_same_tokens(ours: Answer, theirs: Truth) -> int:
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs.tokens))


def test_preemption(cache_dir: Path) -> None:
    """With too few pages, so that answers are cut and computed anew.

    Dynamic RoPE is the model to try it on: a recomputed key must get its own length again.
    """
    model = MODELS["llama-dynamic"]
    folder = model.save(cache_dir / "few-pages")
    prompts = PROMPTS[:4]

    async def ours() -> list[Answer]:
        steps = StepConfig((4,), (32,), tile=8)
        async with tiny.engine_for(
            folder, cache_dir / "greedy", steps=steps, num_pages=24
        ) as engine:
            answers = await tiny.ask_all(engine, prompts, NUM_TOKENS)
            assert engine._policy.num_preemptions > 0
        return answers

    for prompt, answer in zip(prompts, asyncio.run(ours()), strict=True):
        assert_same_tokens(answer, tiny.truth(tiny.load_truth(folder), prompt, NUM_TOKENS))
