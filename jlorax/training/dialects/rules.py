"""What a key of a configuration means in our own: the parts that every dialect's table is made of.

A rule takes what was found so far, where a value was given, and the value. Plain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jlorax.errors import ConfigError
from jlorax.training.config import SECTIONS, TrainConfig, section_of_key
from jlorax.training.values import typed


class Found:
    """Values of our own keys, and where each was given."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._implied: dict[str, Any] = {}

    def give(self, key: str, value: Any, where: str) -> None:
        value = typed(key, value, where)
        if key in self._values and self._values[key] != value:
            raise ConfigError(
                f"{where} is {value!r}, but {self._where[key]} is {self._values[key]!r}: "
                f"both mean {key}"
            )
        self._values[key] = value
        self._where[key] = where

    def imply(self, key: str, value: Any) -> None:
        """What another key says besides; the key itself wins."""
        self._implied[key] = value

    def config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        given = {**self._implied, **self._values, **overrides}
        if "dataset" not in given:
            raise ConfigError("dataset is missing: it names a file of examples")
        sections: dict[str, Any] = {name: {} for name in SECTIONS}
        for key, value in given.items():
            if key != "base":
                sections[section_of_key()[key]][key] = value
        made = {name: kind(**sections[name]) for name, kind in SECTIONS.items()}
        return TrainConfig(base=given.get("base"), **made)


Rule = Callable[[Found, str, Any], None]
Change = Callable[[Any], Any]


def to(key: str, change: Change = lambda value: value) -> Rule:
    """The value, changed, is our own ``key``'s; a change to None gives nothing."""

    def rule(found: Found, where: str, value: Any) -> None:
        try:
            changed = change(value)
        except ValueError as error:
            raise ConfigError(f"{where} is {value!r}: {error}") from None
        if changed is not None:
            found.give(key, changed, where)

    return rule


def word(**meaning: Any) -> Change:
    """One of some words, as YAML reads them, and what each means."""

    def change(value: Any) -> Any:
        told = str(value).lower()
        if told not in meaning:
            raise ValueError(f"allowed are: {', '.join(meaning)}")
        return meaning[told]

    return change


def only(*allowed: Any, reason: str) -> Rule:
    """What is done here anyway may be said."""

    def rule(found: Found, where: str, value: Any) -> None:
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            shown = ", ".join(repr(one) for one in allowed)
            raise ConfigError(f"{where} is {value!r}; only {shown} is known here: {reason}")

    return rule


def refused(reason: str) -> Rule:
    """Known, and not done here; that it is off may be said."""

    def rule(found: Found, where: str, value: Any) -> None:
        is_off = str(value).lower() in ("none", "false", "0", "0.0", "", "[]", "{}")
        if not is_off:
            raise ConfigError(f"{where} is {value!r}; this is not done here: {reason}")

    return rule


def either(found: Found, where: str, value: Any) -> None:
    """Says how something is computed, not what: the adapter is the same."""


def with_others(found: Found, where: str, value: Any) -> None:
    """Is read together with others: see the dialect's ``read_together``."""
