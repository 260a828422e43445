"""Tiny random models in Hugging Face's folders, an engine over one, and transformers' answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402

from jlorax.config import (  # noqa: E402
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine  # noqa: E402
from jlorax.models.config import read_config  # noqa: E402
from jlorax.types import GenerateRequest  # noqa: E402

VOCAB_SIZE = 320  # no multiple of 128, so padded lanes are at work
PAGE_SIZE = 8
WEIGHT_STD = 0.08  # at transformers' 0.02 the logits are flat and prove nothing
torch.set_num_threads(1)  # more of them cost a tiny model far more than they bring
# one layer where the second would add nothing: compiling is what these tests cost
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_FALCON = {
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
_DEFAULTS: dict[str, dict[str, Any]] = {"llama": _LLAMA, "mistral": _LLAMA, "falcon": _FALCON}


@dataclass(frozen=True)
class TinyModel:
    """What to make: an architecture, what differs from its default, and how its files look."""

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_sharded: bool = False
    old_keys: bool = False  # config.json as transformers 4 wrote it
    seed: int = 0

    def save(self, folder: Path) -> Path:
        """Weights, config and tokenizer, as a download would look."""
        config = transformers.AutoConfig.for_model(
            self.architecture,
            vocab_size=VOCAB_SIZE,
            bos_token_id=None,
            eos_token_id=None,
            **{**_DEFAULTS[self.architecture], **self.changes},
        )
        torch.manual_seed(self.seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _randomise(model)
        model.save_pretrained(folder, max_shard_size="200KB" if self.is_sharded else "50GB")
        assert (folder / "model.safetensors.index.json").exists() == self.is_sharded
        if self.old_keys:
            _write_old_keys(folder / "config.json")
        save_tokenizer(folder)
        return folder


def _randomise(model: Any) -> None:
    """Every parameter is moved, norms and biases too: an ignored one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, WEIGHT_STD)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def _write_old_keys(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.30.0"
    path.write_text(json.dumps(config))


def save_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A word a token: "w17" is 17."""
    words = {f"w{i}": i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    random = np.random.default_rng((seed, num_tokens))
    return tuple(random.integers(0, VOCAB_SIZE, num_tokens).tolist())


@asynccontextmanager
async def engine_for(
    folder: Path,
    cache_dir: Path,
    *,
    max_seq_len: int = 128,
    steps: StepConfig | None = None,
    max_batch: int = 4,
    adapters: AdapterConfig | None = None,
    num_pages: int | None = None,
) -> AsyncIterator[Engine]:
    """A whole engine on small shapes: pages of 8 tokens, chunks of at most 32."""
    shape = read_config(folder).shape
    page_bytes = 2 * shape.num_layers * shape.num_kv_heads * PAGE_SIZE * shape.head_dim * 4
    cache_bytes = None if num_pages is None else num_pages * page_bytes
    config = EngineConfig(
        cache_dir=cache_dir,
        model=ModelSource(str(folder)),
        steps=steps or StepConfig((4,), (32,), tile=8),
        scheduler=SchedulerConfig(max_batch=max_batch),
        kv=KVConfig(max_seq_len=max_seq_len, page_size=PAGE_SIZE, cache_bytes=cache_bytes),
        adapters=adapters or AdapterConfig(bank_bytes=1 << 20, max_slots=2, max_rank=8),
        executable_dir=cache_dir / "executables",
    )
    async with await Engine.start(config) as engine:
        yield engine


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and before each the log-probabilities of the whole vocabulary."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray  # f32[tokens, V], NaN where nobody asked


async def ask(
    engine: Engine, prompt: tuple[int, ...], num_tokens: int, num_top_logprobs: int = 0
) -> Answer:
    request = GenerateRequest(
        prompt, max_new_tokens=num_tokens, ignore_eos=True, num_top_logprobs=num_top_logprobs
    )
    tokens = [event.token async for event in engine.generate(request)]
    logprobs = np.full((len(tokens), VOCAB_SIZE), np.nan, np.float32)
    for row, token in zip(logprobs, tokens, strict=True):
        for alternative in token.alternatives:
            row[alternative.id] = alternative.logprob
    return Answer(tuple(token.id for token in tokens), logprobs)


async def ask_all(
    engine: Engine, prompts: Iterable[tuple[int, ...]], num_tokens: int, num_top_logprobs: int = 0
) -> list[Answer]:
    """All at once: they share batches, and those beyond the batch join as rows come free."""
    asked = (ask(engine, prompt, num_tokens, num_top_logprobs) for prompt in prompts)
    return list(await asyncio.gather(*asked))


@dataclass(frozen=True)
class Truth:
    """What transformers' generate makes of a prompt alone."""

    tokens: tuple[int, ...]
    logits: np.ndarray  # f32[tokens, V]

    @property
    def logprobs(self) -> np.ndarray:
        return np.asarray(torch.log_softmax(torch.from_numpy(self.logits), -1).numpy())

    @property
    def largest(self) -> float:
        return float(np.abs(self.logits).max())

    def is_tie(self, i: int) -> bool:
        """The best two of token i are too near to tell in f32."""
        second, best = np.sort(self.logits[i])[-2:]
        return bool(best - second < 1e-4 * self.largest)


def load_truth(folder: Path) -> Any:
    """With sdpa, its default: eager Falcon adds ALiBi twice, by the mask and by the scores."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def truth(model: Any, prompt: tuple[int, ...], num_tokens: int) -> Truth:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = tuple(made.sequences[0, len(prompt) :].tolist())
    return Truth(tokens, torch.cat(made.logits).numpy())
