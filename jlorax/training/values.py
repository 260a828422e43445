"""Values of a configuration's keys as their types, from YAML, flags or Python. Plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jlorax.errors import ConfigError
from jlorax.training.config import SECTIONS, section_of_key

Reader = Callable[[Any], Any]


def typed(key: str, value: Any, where: str) -> Any:
    """``value`` as the type of our own ``key``; ConfigError says ``where`` it was given."""
    try:
        return reader_of_key(key)(value)
    except ValueError as error:
        raise ConfigError(f"{where} is {value!r}: {error}") from None


@cache
def reader_of_key(key: str) -> Reader:
    return _reader(hint_of_key(key))


def hint_of_key(key: str) -> Any:
    """The key's type, as its section declares it."""
    if key == "base":
        return str
    return get_type_hints(SECTIONS[section_of_key()[key]])[key]


def _reader(hint: Any) -> Reader:
    kinds = [kind for kind in _members(hint) if kind is not NoneType]
    if any(get_origin(kind) is tuple for kind in kinds):
        return names
    (kind,) = kinds
    if get_origin(kind) is Mapping:
        return partial(_by_name, _reader(get_args(kind)[1]))
    readers: dict[Any, Reader] = {int: _whole, float: _number, bool: _truth}
    return readers.get(kind, _text)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _whole(value: Any) -> int:
    number = _number(value, "a whole number")
    if not number.is_integer():
        raise ValueError("a whole number is needed")
    return int(number)


def _number(value: Any, needed: str = "a number") -> float:
    """YAML 1.1 takes 2e-4 for a text, so texts are read too."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{needed} is needed")


def _truth(value: Any) -> bool:
    told = str(value).lower()
    if not isinstance(value, bool | str) or told not in ("true", "false"):
        raise ValueError("true or false is needed")
    return told == "true"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is needed")
    return value


def names(value: Any) -> str | tuple[str, ...]:
    """A list of names, or a text with commas; "all-linear" stays the word that it is."""
    if value == "all-linear":
        return "all-linear"
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a list of names is needed")
    return tuple(part.strip() for part in parts if part.strip())


def _by_name(read: Reader, value: Any) -> dict[str, Any]:
    """A mapping, or a text NAME=VALUE,NAME=VALUE."""
    if isinstance(value, str):
        value = dict(part.partition("=")[::2] for part in value.split(","))
    if not isinstance(value, Mapping):
        raise ValueError("values by name are needed")
    return {str(name): read(one) for name, one in value.items()}
