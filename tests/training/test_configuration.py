"""Configurations: our keys, Ludwig's and axolotl's; ranges; what is unknown or not done here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from jlorax.errors import ConfigError
from jlorax.training.aliases import config_from_mapping, read_config
from jlorax.training.config import (
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    section_of_key,
)

LUDWIG = """
model_type: llm
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
adapter: {type: lora, r: 8, alpha: 32, dropout: 0.1}
prompt:
  template: "Question: {question}"
input_features: [{name: question, type: text}]
output_features: [{name: answer, type: text}]
trainer:
  type: finetune
  epochs: 2
  batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 0.0003
"""
AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
adapter: lora
datasets: [{path: data.jsonl, type: chat_template}]
lora_r: 8
lora_alpha: 32
lora_dropout: 0.1
lora_target_linear: true
sequence_len: 512
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 2
learning_rate: 3e-4
lr_scheduler: cosine
val_set_size: 0.1
output_dir: out/support
load_in_8bit: true
"""


def test_it_survives_json() -> None:
    config = TrainConfig(
        DataConfig("x.jsonl", mode="text"),
        lora=LoraConfig(targets=("q_proj",), rank_pattern={"q_proj": 4}),
        run=RunConfig(max_steps=3),
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_flat_and_nested_keys_mean_the_same() -> None:
    flat = {"dataset": "x.jsonl", "rank": 8, "epochs": 2, "learning_rate": "1e-3"}
    nested = {
        "data": {"dataset": "x.jsonl"},
        "lora": {"rank": 8},
        "run": {"epochs": 2},
        "optimizer": {"learning_rate": 1e-3},
    }
    assert config_from_mapping(flat) == config_from_mapping(nested)
    assert config_from_mapping(flat, {"rank": "4"}).lora.rank == 4


def test_every_key_is_one_of_a_section() -> None:
    sections = {"data": DataConfig, "lora": LoraConfig, "optimizer": OptimizerConfig}
    keys = section_of_key()
    assert {key for key, section in keys.items() if section == "run"} == set(
        RunConfig.__dataclass_fields__
    )
    for section, kind in sections.items():
        assert {k for k, s in keys.items() if s == section} == set(kind.__dataclass_fields__)


def test_ludwig_s(tmp_path: Path) -> None:
    file = tmp_path / "ludwig.yaml"
    file.write_text(LUDWIG + "dataset: data.csv\n")
    config = read_config(file)
    assert config.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32, 0.1)
    assert (config.data.template, config.data.completion_column) == (
        "Question: {question}",
        "answer",
    )
    run = config.run
    assert (run.epochs, run.batch_size, run.accumulation) == (2, 4, 2)
    assert config.optimizer.learning_rate == 3e-4


def test_axolotl_s() -> None:
    config = config_from_mapping(yaml.safe_load(AXOLOTL))
    assert (config.data.dataset, config.data.mode) == ("data.jsonl", "chat")
    assert (config.data.max_seq_len, config.data.packing) == (512, True)
    assert (config.lora.rank, config.lora.targets) == (8, "all-linear")
    assert (config.run.output_root, config.run.name) == ("out", "support")
    assert (config.run.base_quantization, config.optimizer.schedule) == ("int8", "cosine")
    assert config.data.validation_fraction == 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rnk": 8}, "unknown key 'rnk'; did you mean 'rank'"),
        ({"lora": {"rnak": 8}}, "unknown key 'lora.rnak'; did you mean 'lora.rank'"),
        ({"trainer": {"epoch": 3}}, "unknown key 'trainer.epoch'; did you mean"),
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"adapter": "qlora"}, "qlora"),
        ({"rank": 0}, "rank is 0; allowed are 1 to 256"),
        ({"rank": 10**6}, "rank is 1000000; allowed are 1 to 256"),
        ({"rank": "eight"}, "rank is 'eight'"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"learning_rate": 100}, "learning_rate is 100"),
        ({"epochs": 10**9}, "epochs is 1000000000; allowed are 1 to 10000"),
        ({"max_seq_len": 10**7}, "max_seq_len is 10000000"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"name": "../up"}, "name: .* is no adapter id"),
        ({"template": "no column"}, "template names no"),
        ({"template": "{a!r}"}, "template has"),
        ({"targets": "q"}, None),
        ({"early_stopping_patience": 1, "validation_fraction": 0}, "needs validation data"),
        ({"rank": 8, "lora_r": 4}, "both mean rank"),
    ],
)
def test_what_is_wrong_is_said_with_its_numbers(
    given: Mapping[str, Any], message: str | None
) -> None:
    whole = {"dataset": "x.jsonl", **given}
    if message is None:
        assert config_from_mapping(whole).lora.targets == ("q",)
        return
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(whole)


def test_a_dataset_is_needed_and_a_file_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is missing"):
        config_from_mapping({"rank": 8})
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="not a mapping"):
        read_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
