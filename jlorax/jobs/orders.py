"""What a client asks to be trained, as a configuration that stays where trainings may be. Plain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jlorax.adapters.files import CONFIG_FILE
from jlorax.errors import ConfigError, InvalidParameter, TrainingConflict
from jlorax.jobs.types import JobOrder
from jlorax.training.aliases import config_from_mapping
from jlorax.training.config import DataConfig, OptimizerConfig, TrainConfig, section_of_key

# paths, names and the base are the server's to decide
_SERVERS_OWN = {"dataset", "validation", "root", "name", "output_root", "log_dir"}
OPEN_KEYS = tuple(key for key in section_of_key() if key not in _SERVERS_OWN)
_DEFAULT_RATE = OptimizerConfig().learning_rate
_DEFAULT_LENGTH = DataConfig("any").max_seq_len


def train_config(
    order: JobOrder,
    *,
    name: str,
    base: str | None,
    data_root: Path,
    data: Path,
    validation: Path | None,
    output_root: Path,
    max_rank: int,
    max_seq_len: int,
) -> TrainConfig:
    """``max_rank`` and ``max_seq_len``: what the server serves; the latter is the default's limit.

    Raises InvalidParameter with the key and the number that are wrong.
    """
    _check_place(output_root, name)
    settings = {
        "max_seq_len": min(_DEFAULT_LENGTH, max_seq_len),
        **_settings(order),
        "base": base,
        "dataset": str(data),
        "validation": None if validation is None else str(validation),
        "root": str(data_root),
        "name": name,
        "output_root": str(output_root),
    }
    try:
        config = config_from_mapping(settings)
    except ConfigError as error:
        raise InvalidParameter("training", f"cannot be: {error}") from None
    for rank in (config.lora.rank, *config.lora.rank_pattern.values()):
        if rank > max_rank:
            raise InvalidParameter(
                "training.rank", f"is {rank}; this server serves adapters of at most {max_rank}"
            )
    return config


def open_settings(config: TrainConfig) -> dict[str, Any]:
    """What a client may see of it, by key; plain values."""
    sections = config.to_dict()
    found = {key: sections[section_of_key()[key]][key] for key in OPEN_KEYS}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def rate_multiplier(config: TrainConfig) -> float:
    return config.optimizer.learning_rate / _DEFAULT_RATE


def _settings(order: JobOrder) -> dict[str, Any]:
    """Our keys, from both ways to say them; what is said twice must be the same."""
    for key in order.training:
        if key not in OPEN_KEYS:
            raise InvalidParameter(f"training.{key[:64]}", _why_not(key))
    multiplier = order.learning_rate_multiplier
    other: Mapping[str, Any] = {
        "seed": order.seed,
        "epochs": order.num_epochs,
        "batch_size": order.batch_size,
        "learning_rate": None if multiplier is None else multiplier * _DEFAULT_RATE,
    }
    settings = {key: value for key, value in order.training.items() if value is not None}
    for key, value in other.items():
        if value is not None and settings.setdefault(key, value) != value:
            raise InvalidParameter(
                f"training.{key}", f"is {settings[key]!r}, but the job says {value!r} elsewhere"
            )
    return settings


def _why_not(key: str) -> str:
    if key in _SERVERS_OWN or key == "base":
        return "is for the server to decide"
    close = get_close_matches(key, OPEN_KEYS, 1)
    return f"is unknown; {f'did you mean {close[0]!r}?' if close else _known()}"


def _known() -> str:
    return f"known are: {', '.join(OPEN_KEYS)}"


def _check_place(root: Path, name: str) -> None:
    """A version is never changed, and an adapter is no folder of others."""
    parts = name.split("/")
    for end in range(1, len(parts) + 1):
        taken = "/".join(parts[:end])
        if (root / taken / CONFIG_FILE).exists():
            raise TrainingConflict(f"{taken!r} is an adapter itself: this one needs another name")
