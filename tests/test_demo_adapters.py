"""The adapters that ship: each reads, is what it says it is, and all together stay small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jlorax.demo
from jlorax.adapters.peft import read_adapter
from jlorax.adapters.peft_config import MAX_RANK
from jlorax.demo import DEMO_ADAPTERS, DEMO_PROMPT, DemoAdapter
from jlorax.models.config import parse_config
from jlorax.models.embedded import EMBEDDED_HUB_ID
from jlorax.training.aliases import config_from_mapping, read_mapping
from jlorax.training.config import TrainConfig
from jlorax.types import Projection

MAX_TOTAL_BYTES = 7_000_000
CONFIGS = Path(jlorax.demo.__file__).parent / "configs"

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def projections() -> tuple[Projection, ...]:
    return parse_config(SMOLLM2, "SmolLM2-135M-Instruct").projections()


@pytest.mark.parametrize("demo", DEMO_ADAPTERS, ids=lambda demo: demo.name)
def test_reads_as_declared(demo: DemoAdapter, projections: tuple[Projection, ...]) -> None:
    adapter = read_adapter(demo.folder, demo.name, projections, MAX_RANK)
    assert adapter.ranks == dict.fromkeys(demo.targets, demo.rank)
    for layers in adapter.weights.values():
        assert sorted(layers) == list(range(30))
        assert all(layer.b.any() for layer in layers.values())  # trained: B starts as zeros


@pytest.mark.parametrize("demo", DEMO_ADAPTERS, ids=lambda demo: demo.name)
def test_names_its_base_model(demo: DemoAdapter) -> None:
    config = json.loads((demo.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == EMBEDDED_HUB_ID
    assert (config["inference_mode"], config["lora_dropout"]) == (True, 0.0)
    assert demo.prompt.split("\n")[0] in (demo.folder / "README.md").read_text()


@pytest.mark.parametrize("demo", DEMO_ADAPTERS, ids=lambda demo: demo.name)
def test_was_made_as_its_configuration_says(demo: DemoAdapter) -> None:
    """Of those that anybody can run again: `jlorax train` with this file."""
    file = CONFIGS / f"{demo.name}.yaml"
    record = json.loads((demo.folder / "training.json").read_text())
    assert TrainConfig.from_dict(record["config"]) == config_from_mapping(read_mapping(file), {})
    assert record["platform"] == "cpu"
    assert record["metrics"]["train_loss"] < record["metrics"]["first_train_loss"] / 2


def test_together_they_are_small() -> None:
    files = [path for demo in DEMO_ADAPTERS for path in demo.folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL_BYTES


def test_ranks_and_targets_differ() -> None:
    assert len(DEMO_ADAPTERS) >= 3
    assert len({(demo.rank, demo.targets) for demo in DEMO_ADAPTERS}) == len(DEMO_ADAPTERS)
    assert len({demo.targets for demo in DEMO_ADAPTERS}) == len(DEMO_ADAPTERS)
    assert DEMO_PROMPT
