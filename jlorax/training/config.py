"""What to train, on what and how: frozen, checked when built. Plain.

A configuration travels between processes and is recorded with the adapter, so it is JSON: see
``TrainConfig.to_dict``.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from jlorax.adapters.registry import check_id
from jlorax.config import DTYPES
from jlorax.errors import ConfigError, InvalidAdapterId

Mode = Literal["auto", "completion", "chat", "text", "template", "alpaca"]
OnLong = Literal["truncate", "drop", "error"]
Schedule = Literal["cosine", "linear", "constant"]
ALL_LINEAR: Literal["all-linear"] = "all-linear"
MAX_RANK = 256
MAX_EPOCHS = 10_000
MAX_STEPS = 10_000_000
MAX_ROWS = 4096  # of a micro-batch
SEQ_LENS = (8, 1 << 20)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _in(name: str, value: float, low: float, high: float) -> None:
    _require(
        isinstance(value, int | float) and math.isfinite(value) and low <= value <= high,
        f"{name} is {value}; allowed are {low:g} to {high:g}",
    )


def _whole(name: str, value: float, low: int, high: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    _require(is_whole, f"{name} is {value!r}; a whole number is needed")
    _in(name, value, low, high)


def _one_of(name: str, value: object, allowed: Any) -> None:
    choices = get_args(allowed) or allowed
    _require(value in choices, f"{name} is {value!r}; allowed are: {', '.join(map(str, choices))}")


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """(text, the column that stands after it), in order. ``{column}`` alone is understood, and
    ``{{`` as a brace: nothing else of Python's format is looked up or run."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"template {template!r}: {error}; a brace itself is {{{{ or }}}}"
        ) from None
    for _, column, spec, conversion in parts:
        if column is not None and (spec or conversion or not column):
            raise ConfigError(
                f"template has {{{column}...}}: only {{column}} is understood; a brace itself is "
                "{{ or }}"
            )
    return [(text, column) for text, column, _, _ in parts]


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from, and how a row becomes one.

    ``mode`` "auto": by the columns that are there: ``messages``, else ``prompt`` and
    ``completion``, else ``text``, else Alpaca's ``instruction``, ``input``, ``output``; a
    ``template`` over the row's columns makes the prompt itself. ``use_chat_template`` None:
    prompts and completions are a user's and the assistant's where the model has a chat template.
    ``root``: paths outside it are refused.
    """

    dataset: str
    validation: str | None = None
    validation_fraction: float = 0.05
    mode: Mode = "auto"
    template: str | None = None
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    text_column: str = "text"
    system: str | None = None
    use_chat_template: bool | None = None
    train_on_prompt: bool = False
    max_seq_len: int = 1024
    on_long: OnLong = "truncate"
    packing: bool = True
    root: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.dataset), "dataset is empty: it names a file of examples")
        _in("validation_fraction", self.validation_fraction, 0, 0.9)
        _one_of("mode", self.mode, Mode)
        _one_of("on_long", self.on_long, OnLong)
        _whole("max_seq_len", self.max_seq_len, *SEQ_LENS)
        self._check_template()

    def _check_template(self) -> None:
        if self.template is None:
            _require(self.mode != "template", 'mode is "template", but there is no template')
            return
        _require(
            self.mode in ("auto", "template"),
            f"mode is {self.mode!r}: a template has no place there",
        )
        columns = [column for _, column in template_parts(self.template) if column is not None]
        _require(bool(columns), "template names no {column}: all prompts would be the same")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter, by PEFT's words. ``alpha`` None: twice the rank. ``targets``: projections'
    names, or "all-linear": all but the head."""

    rank: int = 16
    alpha: float | None = None
    targets: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, rank in {"rank": self.rank, **_named("rank_pattern", self.rank_pattern)}.items():
            _whole(name, rank, 1, MAX_RANK)
        alphas = {"alpha": self.effective_alpha, **_named("alpha_pattern", self.alpha_pattern)}
        for name, alpha in alphas.items():
            _in(name, alpha, 1e-6, 1e6)
        _require(bool(self.targets), "targets is empty: nothing would be trained")
        _require(
            self.targets == ALL_LINEAR or isinstance(self.targets, tuple),
            f"targets is {self.targets!r}; it is {ALL_LINEAR!r} or a list of projections' names",
        )
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}; allowed are 0 to below 1")

    @property
    def effective_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


def _named(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in values.items()}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. ``warmup_ratio`` of all steps; ``lora_plus_ratio``: B's learning rate over A's."""

    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        _in("learning_rate", self.learning_rate, 1e-12, 10)
        _one_of("schedule", self.schedule, Schedule)
        _in("warmup_ratio", self.warmup_ratio, 0, 1)
        _in("weight_decay", self.weight_decay, 0, 10)
        for name in ("beta1", "beta2"):
            _in(name, getattr(self, name), 0, 0.999999)
        _in("eps", self.eps, 1e-30, 1)
        _in("max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        _in("lora_plus_ratio", self.lora_plus_ratio, 1e-3, 1e3)


@dataclass(frozen=True)
class RunConfig:
    """One run. ``name``: versions of the adapter appear below it in ``output_root``.

    A step takes ``accumulation`` times ``batch_size`` rows. None: ``dtype`` bfloat16 on a GPU and
    float32 elsewhere; ``gradient_checkpointing`` on a GPU; ``eval_every_steps`` once an epoch.
    ``early_stopping_patience``: evaluations without a better one. ``save_dtype``: of the published
    weights; they are trained in float32.
    """

    name: str = "adapter"
    output_root: str = "adapters"
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    dtype: str | None = None
    base_quantization: str | None = None
    gradient_checkpointing: bool | None = None
    seed: int = 0
    eval_every_steps: int | None = None
    early_stopping_patience: int | None = None
    checkpoint_every_steps: int = 50
    objective: str = "sft"
    resume: bool = True
    log_dir: str | None = None
    save_dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            check_id(self.name)
        except InvalidAdapterId as error:
            raise ConfigError(f"name: {error}") from None
        _whole("epochs", self.epochs, 1, MAX_EPOCHS)
        _whole("batch_size", self.batch_size, 1, MAX_ROWS)
        _whole("accumulation", self.accumulation, 1, MAX_ROWS)
        _whole("seed", self.seed, 0, 2**31 - 1)
        _whole("checkpoint_every_steps", self.checkpoint_every_steps, 1, MAX_STEPS)
        for name in ("max_steps", "eval_every_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, MAX_STEPS)
        _one_of("dtype", self.dtype, (None, *DTYPES))
        _one_of("save_dtype", self.save_dtype, DTYPES)
        _one_of("base_quantization", self.base_quantization, (None, "int8"))
        _one_of("objective", self.objective, ("sft",))


@dataclass(frozen=True)
class TrainConfig:
    """The whole. ``base``: a folder, a GGUF file, a hub id; None: the embedded model."""

    data: DataConfig
    base: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        has_validation = self.data.validation is not None or self.data.validation_fraction > 0
        _require(
            self.run.early_stopping_patience is None or has_validation,
            "early_stopping_patience needs validation data: give `validation` or a fraction",
        )

    @property
    def output_root(self) -> Path:
        return Path(self.run.output_root).expanduser()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` gives an equal config back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        sections = {section: dict(values.get(section, {})) for section in SECTIONS}
        targets = sections["lora"].get("targets")
        if isinstance(targets, list):
            sections["lora"]["targets"] = tuple(targets)
        made = {name: kind(**sections[name]) for name, kind in SECTIONS.items()}
        return cls(base=values.get("base"), **made)


SECTIONS: Mapping[str, type[Any]] = {
    "data": DataConfig,
    "lora": LoraConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}


def section_of_key() -> dict[str, str]:
    """Every key that a configuration may have -> its section. No key is in two."""
    return {f.name: section for section, kind in SECTIONS.items() for f in fields(kind)}
