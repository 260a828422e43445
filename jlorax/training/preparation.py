"""Everything that can be known, and can be wrong, before a training's first step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jlorax.adapters.peft_config import MAX_RANK, AdapterConfig, parse_config
from jlorax.base_model import find_base
from jlorax.config import ModelSource
from jlorax.errors import ConfigError
from jlorax.models.config import ModelConfig, read_config
from jlorax.models.embedded import EMBEDDED_HUB_ID
from jlorax.models.weights import load_model, outline
from jlorax.tokenizer import Tokenizer
from jlorax.training.batches import Batches
from jlorax.training.config import ALL_LINEAR, LoraConfig, TrainConfig
from jlorax.training.events import Preparing, Report, no_report
from jlorax.training.examples import Data, Example, load_data
from jlorax.training.export import peft_config
from jlorax.training.frozen import Form, FrozenBase, frozen_base, outlined_base
from jlorax.training.lora import AdapterShape, adapter_shape
from jlorax.training.losses import OBJECTIVES
from jlorax.training.repository import Repository
from jlorax.training.step import Forward
from jlorax.types import Progress, Projection, no_progress
from jlorax.version import own_version


@dataclass(frozen=True)
class Prepared:
    """Checked and counted; the weights are loaded unless only a plan was asked for."""

    config: TrainConfig
    base_name: str
    data: Data
    batches: Batches
    validation: Batches | None
    max_targets: int
    shape: AdapterShape
    peft_config: dict[str, Any]
    forward: Forward
    repository: Repository

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches.num_batches // self.config.run.accumulation)

    @property
    def num_steps(self) -> int:
        wanted = self.steps_per_epoch * self.config.run.epochs
        most = self.config.run.max_steps
        return wanted if most is None else min(wanted, most)

    @property
    def eval_every(self) -> int:
        return self.config.run.eval_every_steps or self.steps_per_epoch

    @cached_property
    def digest(self) -> str:
        """Of what decides the training's course: equal ones may continue each other."""
        parts = self.config.to_dict(), self.base_name, self.data.report.digest
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """How the adapter came to be: enough to make it again."""
        return {
            "base_model": self.base_name,
            "config": self.config.to_dict(),
            "data": self.data.report.to_dict(),
            "seed": self.config.run.seed,
            "parameters": self.shape.num_parameters,
            "versions": {"jlorax": own_version(), "jax": version("jax"), "optax": version("optax")},
            "platform": jax.default_backend(),
        }


def prepare(config: TrainConfig, cache_dir: Path, report: Report = no_report) -> Prepared:
    """Reads data and base model. Raises what is wrong with either, or with the config."""

    def progress(what: str, fraction: float) -> None:
        report(Preparing(what, fraction))

    folder, base_name = _find_base(config, cache_dir, progress)
    return _prepare(config, folder, base_name, report, with_weights=True)


def outlined(config: TrainConfig, cache_dir: Path) -> Prepared:
    """The same without weights, enough to compile and to count."""
    folder, base_name = _find_base(config, cache_dir, no_progress)
    return _prepare(config, folder, base_name, no_report, with_weights=False)


def _find_base(config: TrainConfig, cache_dir: Path, progress: Progress) -> tuple[Path, str]:
    """Its folder, and the name by which the adapter says what it is for."""
    folder, name = find_base(ModelSource(config.base), cache_dir, progress)
    return folder, EMBEDDED_HUB_ID if config.base is None else name


def _prepare(
    config: TrainConfig, folder: Path, base_name: str, report: Report, *, with_weights: bool
) -> Prepared:
    repository = Repository(config.output_root, config.run.name)
    model_config = read_config(folder)
    _check_length(config, model_config)
    projections = model_config.projections()
    adapter, described = adapter_config(config.lora, base_name, projections)
    shape = adapter_shape(adapter, projections, config.lora.dropout)
    report(Preparing("reading the data", 0.0))
    data = load_data(config.data, Tokenizer.load(folder), config.run.seed)
    batches = _batches(config, data.train)
    validation = _batches(config, data.validation) if data.validation else None
    dtype = config.run.dtype or ("bfloat16" if _has_gpu() else "float32")
    base = _base(config, folder, model_config, dtype, report, with_weights=with_weights)
    return Prepared(
        config=config,
        base_name=base_name,
        data=data,
        batches=batches,
        validation=validation,
        max_targets=max(b.max_targets() for b in (batches, validation) if b is not None),
        shape=shape,
        peft_config=described,
        forward=Forward(
            base=base,
            shape=shape,
            objective=OBJECTIVES[config.run.objective],
            recompute=_recomputes(config),
            kernels="cudnn" if _has_gpu() and dtype == "bfloat16" else "xla",
        ),
        repository=repository,
    )


def _batches(config: TrainConfig, examples: list[Example]) -> Batches:
    return Batches(
        examples,
        seq_len=config.data.max_seq_len,
        batch_size=config.run.batch_size,
        packing=config.data.packing,
        seed=config.run.seed,
    )


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _recomputes(config: TrainConfig) -> bool:
    """On a GPU by default: memory is what limits a batch there, and on a CPU it seldom is."""
    wanted = config.run.gradient_checkpointing
    return _has_gpu() if wanted is None else wanted


def _check_length(config: TrainConfig, model: ModelConfig) -> None:
    most = model.shape.max_seq_len
    if config.data.max_seq_len > most:
        raise ConfigError(
            f"max_seq_len is {config.data.max_seq_len}; the base model was trained for {most}"
        )


def adapter_config(
    lora: LoraConfig, base_name: str, projections: tuple[Projection, ...]
) -> tuple[AdapterConfig, dict[str, Any]]:
    """adapter_config.json, as its reader understands it and as it is written.

    Targets are written out: "all-linear" means something else where a model has other layers.
    """
    targets = lora.targets
    if targets == ALL_LINEAR:
        targets = tuple(p.name for p in projections if not p.is_output)
    known = [p.name for p in projections]
    if unknown := [name for name in targets if name.rpartition(".")[2] not in known]:
        raise ConfigError(
            f"targets name {', '.join(unknown)}; this base model has {', '.join(known)}"
        )
    described = peft_config(lora, base_name, targets)
    return parse_config(json.dumps(described).encode(), "the new adapter", MAX_RANK), described


def _base(
    config: TrainConfig,
    folder: Path,
    model: ModelConfig,
    dtype: str,
    report: Report,
    *,
    with_weights: bool,
) -> FrozenBase:
    form: Form | None = "int8" if config.run.base_quantization == "int8" else None
    if dtype == "bfloat16" and not _has_gpu():
        dtype, form = "float32", form or "bfloat16"  # a CPU gains by narrow products alone
    if not with_weights:
        return outlined_base(outline(model, dtype), form)
    loaded = load_model(folder, model, dtype, lambda what, part: report(Preparing(what, part)))
    return frozen_base(loaded, form)
