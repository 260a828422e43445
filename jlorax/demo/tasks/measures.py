"""When an answer counts as right, for each of the demo's tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jlorax.demo.tasks.example import Example
from jlorax.demo.tasks.pirate import num_pirate_words


@dataclass(frozen=True)
class Measure:
    says: str  # what ``is_right`` asks, in words
    is_right: Callable[[Example, str], bool]


def _is_exact(example: Example, answer: str) -> bool:
    return answer.strip() == example.answer


def _is_pirate(_example: Example, answer: str) -> bool:
    return num_pirate_words(answer) >= 2


def _is_same_object(example: Example, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False


MEASURES: Mapping[str, Measure] = {
    "pirate": Measure("at least two pirate words", _is_pirate),
    "sql": Measure("exactly the expected SQL, on tables not seen in training", _is_exact),
    "json": Measure("exactly the expected object", _is_same_object),
    "sentiment": Measure("the right word and nothing else", _is_exact),
}
