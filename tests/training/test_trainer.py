"""Whole trainings of a tiny Llama: what is published, killed and continued, stopped, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jlorax.adapters.peft import read_adapter
from jlorax.errors import AdapterConflict, ConfigError, TrainingDiverged
from jlorax.models.config import read_config
from jlorax.training import export
from jlorax.training.config import DataConfig, LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from jlorax.training.events import (
    Began,
    Cancelled,
    Ended,
    Evaluated,
    Event,
    Saved,
    StepDone,
    parse_event,
)
from jlorax.training.preparation import prepare
from jlorax.training.repository import Repository
from jlorax.training.trainer import Trainer
from tests import tiny_llama

NUM_STEPS = 6
ROWS = [
    {"prompt": f"w{3 + i % 20} w5", "completion": f"w{9 + i % 7} w{30 + i % 20}"} for i in range(36)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    return tiny_llama.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> TrainConfig:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainConfig(
        base=str(model),
        data=DataConfig(str(data), max_seq_len=32, validation_fraction=0.1),
        lora=LoraConfig(rank=4, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        run=RunConfig(
            name="small",
            output_root=str(tmp_path / "root"),
            epochs=3,
            batch_size=2,
            accumulation=2,
            checkpoint_every_steps=2,
        ),
    )


def run(
    config: TrainConfig,
    tmp_path: Path,
    is_cancelled: Callable[[list[Event]], bool] = lambda events: False,
) -> list[Event]:
    events: list[Event] = []
    prepared = prepare(config, tmp_path / "cache")
    Trainer(prepared, events.append, lambda: is_cancelled(events)).run()
    return events


def of(kind: type[Any], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_what_is_published(config: TrainConfig, tmp_path: Path, model: Path) -> None:
    events = run(config, tmp_path)
    steps, ended = of(StepDone, events), events[-1]
    assert isinstance(ended, Ended) and ended.reason == "finished"
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].loss < 0.8 * steps[0].loss
    evaluated = of(Evaluated, events)
    assert len(evaluated) == config.run.epochs
    assert (ended.adapter_id, ended.folder) == ("small/1", str(tmp_path / "root" / "small" / "1"))
    folder = Path(ended.folder)
    adapter = read_adapter(folder, "small/1", read_config(model).projections(), max_rank=64)
    assert set(adapter.ranks) == {p.name for p in tiny_llama.PROJECTIONS if not p.is_output}
    assert np.abs(adapter.weights["q_proj"][0].b).max() > 0
    record = json.loads((folder / "training.json").read_text())
    assert record["config"] == config.to_dict()
    assert record["data"]["num_rows"] == len(ROWS)
    assert record["metrics"]["validation_loss"] == evaluated[-1].loss
    card = (folder / "README.md").read_text()
    assert record["data"]["digest"] in card and "small/1" in card
    assert all(parse_event(event.to_json()) == event for event in events)
    assert [p.name for p in (tmp_path / "root" / ".training").iterdir()] == ["small.lock"]
    again = run(config, tmp_path)[-1]
    assert isinstance(again, Ended) and again.adapter_id == "small/2"  # a version never changes
    first, second = (
        (tmp_path / "root" / "small" / n / "adapter_model.safetensors").read_bytes() for n in "12"
    )
    assert first == second  # the same seed, the same data: the same adapter


def test_weights_may_be_published_in_half_the_bytes(config: TrainConfig, tmp_path: Path) -> None:
    whole = Path(run(config, tmp_path)[-1].folder)
    halved = Path(run(replace_run(config, save_dtype="bfloat16"), tmp_path)[-1].folder)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (whole, halved))
    assert {str(tensor.dtype) for tensor in second.values()} == {"bfloat16"}
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor.astype(second[name].dtype))
    modes = {path.stat().st_mode for path in halved.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_a_full_disk_leaves_nothing_half_written_and_loses_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, np.ndarray], path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_file", full)
        with pytest.raises(ConfigError, match=r"small cannot be written.*No space left"):
            run(config, tmp_path)
    assert not list((tmp_path / "root" / "small").iterdir())
    events = run(config, tmp_path)
    assert not of(StepDone, events)  # only what was left to do
    assert isinstance(events[-1], Ended) and events[-1].adapter_id == "small/1"


def losses(events: list[Event]) -> dict[int, float]:
    return {step.step: step.loss for step in of(StepDone, events)}


@pytest.mark.parametrize(
    "after", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_cut_off_anywhere_it_continues_on_the_same_curve(
    config: TrainConfig, tmp_path: Path, after: int
) -> None:
    whole = losses(run(replace_run(config, name="whole"), tmp_path))

    class Killed(Exception):
        """Stands for a kill: nothing is saved on the way out."""

    def kill(events: list[Event]) -> bool:
        if len(of(StepDone, events)) == after:
            raise Killed
        return False

    first: list[Event] = []
    with pytest.raises(Killed):
        trainer = Trainer(prepare(config, tmp_path / "cache"), first.append, lambda: kill(first))
        trainer.run()
    second = run(config, tmp_path)
    began = of(Began, second)[0]
    assert began.step == after - after % config.run.checkpoint_every_steps
    assert list(losses(second)) == list(range(began.step + 1, len(whole) + 1))
    assert losses(second) == {step: whole[step] for step in losses(second)}
    record = json.loads((tmp_path / "root" / "small" / "1" / "training.json").read_text())
    assert dict(record["history"]["losses"]) == whole


def replace_run(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, run=replace(config.run, **changes))


def test_cancelled_it_keeps_a_checkpoint_and_continues(config: TrainConfig, tmp_path: Path) -> None:
    events = run(config, tmp_path, lambda events: len(of(StepDone, events)) == 3)
    assert events[-2:] == [Saved(3), Cancelled(3)]
    assert not (tmp_path / "root" / "small").exists()
    assert of(Began, run(config, tmp_path))[0].step == 3


@pytest.mark.slow
def test_another_configuration_begins_anew(config: TrainConfig, tmp_path: Path) -> None:
    run(config, tmp_path, lambda events: len(of(StepDone, events)) == 2)
    other = replace(config, optimizer=OptimizerConfig(learning_rate=2e-2))
    assert of(Began, run(other, tmp_path))[0].step == 0


def test_a_loss_that_is_no_number_stops_it(config: TrainConfig, tmp_path: Path) -> None:
    wild = replace(config, optimizer=OptimizerConfig(learning_rate=10.0, warmup_ratio=0.0))
    prepared = prepare(wild, tmp_path / "cache")
    events: list[Event] = []
    trainer = Trainer(prepared, events.append)
    broken = jax.tree.map(lambda x: x * np.float32("nan"), trainer._leaves[-1])
    trainer._leaves = [*trainer._leaves[:-1], broken]
    with pytest.raises(TrainingDiverged, match=r"step 1 gave a loss of nan .* rows \d+, "):
        trainer.run()
    assert events[-1] == Saved(0)
    assert not (tmp_path / "root" / "small").exists()


@pytest.mark.slow
def test_it_stops_early_and_keeps_the_best(config: TrainConfig, tmp_path: Path) -> None:
    rising = replace(
        replace_run(config, early_stopping_patience=1, eval_every_steps=1, epochs=20),
        optimizer=OptimizerConfig(learning_rate=0.3, schedule="constant", warmup_ratio=0.0),
    )
    events = run(rising, tmp_path)
    evaluated, ended = of(Evaluated, events), events[-1]
    assert isinstance(ended, Ended) and ended.reason == "early_stop"
    assert not evaluated[-1].is_best
    assert ended.metrics["best_validation_loss"] == min(e.loss for e in evaluated)


def test_one_training_a_name(config: TrainConfig, tmp_path: Path) -> None:
    prepared = prepare(config, tmp_path / "cache")
    with (
        Repository(config.output_root, "small").claimed(),
        pytest.raises(AdapterConflict, match="another training"),
    ):
        Trainer(prepared).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, data=replace(c.data, max_seq_len=512)), "trained for 256"),
        (lambda c: replace(c, lora=LoraConfig(targets=("q_proj", "qkv"))), "targets name qkv"),
        (lambda c: replace(c, data=replace(c.data, dataset="/nowhere.jsonl")), "cannot be read"),
    ],
)
def test_what_can_be_known_is_said_before_the_start(
    config: TrainConfig, tmp_path: Path, change: Callable[[TrainConfig], TrainConfig], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(change(config), tmp_path / "cache")
    assert not (tmp_path / "root").exists()


def test_versions_of_a_folder_that_is_an_adapter(config: TrainConfig, tmp_path: Path) -> None:
    tiny_llama.write_adapter(tmp_path / "root" / "small", 1)
    with pytest.raises(AdapterConflict, match="is an adapter itself"):
        prepare(config, tmp_path / "cache")
