"""A tiny model with an adapter, once as peft has it and once as ours; rows for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jlorax.adapters.peft_config import parse_config  # noqa: E402
from jlorax.models.config import read_config  # noqa: E402
from jlorax.models.weights import load_model  # noqa: E402
from jlorax.training.frozen import Form, FrozenBase, frozen_base  # noqa: E402
from jlorax.training.lora import (  # noqa: E402
    Adapter,
    AdapterShape,
    LoraWeights,
    adapter_shape,
    initial_adapter,
)
from jlorax.training.step import Rows  # noqa: E402
from tests.models.tiny import VOCAB_SIZE, TinyModel  # noqa: E402

LENGTH = 64


@dataclass(frozen=True)
class Pair:
    """``theirs`` and ``adapter`` hold the same weights."""

    theirs: Any
    base: FrozenBase
    shape: AdapterShape
    adapter: Adapter

    def gradient(self, module: str, side: str) -> np.ndarray:
        """peft's, in our layout."""
        weight = self.theirs.get_parameter(f"{_weight(module, side)}")
        gradient: np.ndarray = weight.grad.numpy()
        return gradient if side == "a" else gradient.T


def _weight(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side.upper()}.default.weight"


def make_pair(
    model: TinyModel, folder: Path, targets: Sequence[str], *, form: Form | None = None, **lora: Any
) -> Pair:
    model.save(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), **lora}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    config = read_config(folder)
    described = {"peft_type": "LORA", "base_model_name_or_path": "base", **settings}
    parsed = parse_config(json.dumps(described).encode(), "pair", 256)
    shape = adapter_shape(parsed, config.projections())
    adapter = {
        module: LoraWeights(*(jnp.asarray(_numbers(theirs, module, side)) for side in ("a", "b")))
        for module in initial_adapter(shape, 0)
    }
    num_theirs = sum("lora_A" in name for name, _ in theirs.named_parameters())
    assert len(adapter) == num_theirs
    return Pair(theirs, frozen_base(load_model(folder, config, "float32"), form), shape, adapter)


def _numbers(theirs: Any, module: str, side: str) -> np.ndarray:
    numbers: np.ndarray = theirs.get_parameter(_weight(module, side)).detach().numpy()
    return numbers if side == "a" else numbers.T


def sequences(lengths: Sequence[int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB_SIZE, length) for length in lengths]


def first_target(ids: np.ndarray) -> int:
    """The second half of each sequence is learnt."""
    return len(ids) // 2


def packed_row(given: Sequence[np.ndarray], num_unused: int = 5) -> Rows:
    """All sequences in one row, and some places for targets that nobody needs."""
    tokens, segments, positions = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
    places: list[int] = []
    targets: list[int] = []
    at = 0
    for segment, ids in enumerate(given, 1):
        part = slice(at, at + len(ids))
        tokens[0, part], segments[0, part] = ids, segment
        positions[0, part] = np.arange(len(ids))
        for i in range(first_target(ids), len(ids) - 1):
            places.append(at + i)
            targets.append(int(ids[i + 1]))
        at = part.stop
    places += [0] * num_unused
    targets += [-1] * num_unused
    arrays = tokens, segments, positions, np.array(places, np.int32), np.array(targets, np.int32)
    return Rows(*map(jnp.asarray, arrays))


def their_loss(theirs: Any, given: Sequence[np.ndarray]) -> Any:
    """The mean over all targets, each sequence by itself."""
    total, num = 0, 0
    for ids in given:
        logits = theirs(torch.tensor(ids[None])).logits[0]
        first = first_target(ids)
        likely = torch.log_softmax(logits[first:-1], -1)
        total = total - likely.gather(1, torch.tensor(ids[first + 1 :, None])).sum()
        num += len(ids) - 1 - first
    return total / num
