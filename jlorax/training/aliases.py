"""A training's configuration from a YAML file or a mapping: in our keys, Ludwig's or axolotl's.

Every key means here what it means there, or is an error: nothing is passed over. What a file does
not name has our own default. Plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from jlorax.errors import ConfigError
from jlorax.training.config import TrainConfig, section_of_key
from jlorax.training.dialects import axolotl, ludwig
from jlorax.training.dialects.rules import Found, Rule, only, to
from jlorax.training.values import typed

MAX_FILE_BYTES = 1 << 20

_FLAT: dict[str, Rule] = {key: to(key) for key in ("base", *section_of_key())}
_NESTED: dict[str, Rule] = {
    f"{section}.{key}": to(key) for key, section in section_of_key().items()
}
_BOTH: dict[str, Rule] = {  # Ludwig's and axolotl's
    "model_type": only(
        *("llm", "AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
        *("FalconForCausalLM",),
        reason="the base model's config.json says what it is",
    )
}
_RULES = {**ludwig.RULES, **axolotl.RULES, **_BOTH, **_FLAT, **_NESTED}


def read_config(path: Path) -> TrainConfig:
    """A YAML file's. ConfigError says which key is wrong, and why."""
    return config_from_mapping(read_mapping(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's keys, not looked at yet."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: more than {MAX_FILE_BYTES} bytes: is no configuration")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is {type(content).__name__}, not a mapping of keys")
    return content


def config_from_mapping(
    mapping: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """``overrides``: our own keys, as flags give them; they win over what the mapping says."""
    found = Found()
    for where, value in _leaves(mapping):
        _RULES[where](found, where, value)
    ludwig.read_together(found, mapping)
    return found.config({key: typed(key, value, key) for key, value in (overrides or {}).items()})


def _leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that is given. null and an empty mapping give nothing, but are spelt
    as something that is known."""
    for name, value in mapping.items():
        where = f"{prefix}{name}"
        if where not in _RULES and not _is_section(where):
            raise _unknown(where)
        if value is None or value == {}:
            continue
        if isinstance(value, Mapping) and _is_section(where):
            yield from _leaves(value, f"{where}.")
        elif where in _RULES:
            yield where, value
        else:
            raise ConfigError(f"{where} is {value!r}; a mapping of keys is needed")


def _is_section(where: str) -> bool:
    return any(known.startswith(f"{where}.") for known in _RULES)


def _unknown(where: str) -> ConfigError:
    close = get_close_matches(where, _RULES, 1) or get_close_matches(where, _sections(), 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(_FLAT)}"
    return ConfigError(f"unknown key {where!r}; {hint}")


def _sections() -> set[str]:
    return {known.rpartition(".")[0] for known in _RULES} - {""}
