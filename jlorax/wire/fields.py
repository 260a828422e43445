"""Reads named, typed, bounded fields out of a JSON object; every refusal names the field.

JSON ``null`` always means "not given": lorax-client and langchain send every field, mostly null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jlorax.errors import InvalidAdapterId, InvalidParameter
from jlorax.wire.strict_json import kind_of

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARS = 1000
MAX_ADAPTER_ID_CHARS = 256
MAX_TOKENIZED_CHARS = 262_144  # of a text that is only cut into tokens: each becomes an object
INT32_MAX = 2**31 - 1

_ADAPTER_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:+=-]*")


class Fields:
    """One JSON object being read. Remembers what was asked for: the rest is ``unknown``."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._asked: set[str] = set()

    def get(self, name: str) -> Any:
        self._asked.add(name)
        return self._values.get(name)

    def known(self) -> tuple[str, ...]:
        """Every name that was asked for, given or not."""
        return tuple(sorted(self._asked))

    def unknown(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._values) - self._asked))

    def inside(self, name: str, value: object) -> Fields:
        """The object ``value`` that stands at ``name``, to be read."""
        if not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, not {kind_of(value)}")
        return Fields(value, prefix=f"{self._prefix}{name}.")

    def wrong(self, name: str, message: str) -> InvalidParameter:
        return InvalidParameter(self._prefix + name, message)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, not {kind_of(value)}")
        return value

    def text(self, name: str, max_chars: int = INT32_MAX) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, f"must be a string, not {kind_of(value)}")
        if len(value) > max_chars:
            raise self.wrong(name, f"may have at most {max_chars} characters, not {len(value)}")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"must be an integer, not {kind_of(value)}")
        if not low <= value <= high:
            raise self.wrong(name, f"must be between {low} and {high}. Given: {_shown(value)}")
        return value

    def number(
        self, name: str, low: float, high: float, *, above_low: bool = False
    ) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"must be a number, not {kind_of(value)}")
        if not (low < value if above_low else low <= value) or value > high:
            lower = f"> {low}" if above_low else f">= {low}"
            raise self.wrong(name, f"must be {lower} and <= {high}. Given: {_shown(value)}")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, not {kind_of(value)}")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, f"must be a list, not {kind_of(value)}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        return checked_token_ids(self, name, self.items(name) or [], vocab_size)

    def stop(self, name: str = "stop") -> tuple[str, ...]:
        """A string or a list of strings: none empty, few, short."""
        value = self.get(name)
        found = [value] if isinstance(value, str) else self.items(name) or []
        if len(found) > MAX_STOP_SEQUENCES:
            raise self.wrong(
                name, f"supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(found)}"
            )
        for text in found:
            if not isinstance(text, str):
                raise self.wrong(name, f"must hold strings, not {kind_of(text)}")
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise self.wrong(
                    name,
                    f"must hold strings of 1 to {MAX_STOP_CHARS} characters. Given: {len(text)}",
                )
        return tuple(found)

    def refuse(self, name: str, *harmless: object) -> None:
        """A feature that is not there yet: only null and the values that ask for nothing pass."""
        value = self.get(name)
        if value is not None and not any(value == h and type(value) is type(h) for h in harmless):
            raise self.wrong(name, "asks for a feature that this server does not support")


def checked_token_ids(
    fields: Fields, name: str, values: list[Any], vocab_size: int
) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise fields.wrong(
                name, f"must hold token ids, which are integers, not {kind_of(value)}"
            )
        if not 0 <= value < vocab_size:
            raise fields.wrong(
                name, f"holds the token id {_shown(value)}, but ids go from 0 to {vocab_size - 1}"
            )
    return tuple(values)


def checked_adapter_id(value: str) -> str:
    """A public name: segments of letters, digits and ``._@:+=-`` joined by single slashes.

    So an id can be neither absolute, nor a URL, nor climb out of a folder, and it is safe in logs
    and headers. A name that fails here can name nothing (errors.InvalidAdapterId).
    """
    if not 1 <= len(value) <= MAX_ADAPTER_ID_CHARS:
        raise InvalidAdapterId(
            f"an adapter id has 1 to {MAX_ADAPTER_ID_CHARS} characters, not {len(value)}"
        )
    if not all(_ADAPTER_SEGMENT.fullmatch(segment) for segment in value.split("/")):
        raise InvalidAdapterId(
            f"{value[:64]!r} can name no adapter: an id is made of letters, digits and ._@:+=- "
            "in parts joined by single slashes, each part beginning with a letter, digit or _"
        )
    return value


def _shown(value: float) -> str:
    """A refused number, short: an integer of 4000 digits is not repeated."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
