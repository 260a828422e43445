"""How each of the demo's adapters is trained, and when an answer of it counts as right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from jlorax.demo.make_adapters.tasks import pirate
from jlorax.demo.make_adapters.tasks.example import Example


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained, beside its rank and targets."""

    steps: int
    learning_rate: float
    alpha: int
    use_rslora: bool
    data: str
    measure: str  # what `is_right` counts
    is_right: Callable[[Example, str], bool]


def _exact(example: Example, answer: str) -> bool:
    return answer.strip() == example.answer


def _is_pirate(example: Example, answer: str) -> bool:
    return pirate.num_pirate_words(answer) >= 2


def _same_object(example: Example, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False


RECIPES = {
    "pirate": Recipe(
        steps=80,
        learning_rate=2e-3,
        alpha=32,
        use_rslora=False,
        data="questions by template; the base model's own answers, translated with `arrr`",
        measure="answers with at least two pirate words",
        is_right=_is_pirate,
    ),
    "sql": Recipe(
        steps=90,
        learning_rate=2e-3,
        alpha=16,
        use_rslora=False,
        data="questions by template over the tables of `vega_datasets`; three tables held out",
        measure="exactly the expected SQL, on tables not seen in training",
        is_right=_exact,
    ),
    "json": Recipe(
        steps=90,
        learning_rate=2e-3,
        alpha=8,
        use_rslora=False,
        data="short texts by template, filled by `faker`",
        measure="exactly the expected object",
        is_right=_same_object,
    ),
    "sentiment": Recipe(
        steps=70,
        learning_rate=1e-3,
        alpha=8,
        use_rslora=True,
        data="film review snippets of `vaderSentiment`, clearly rated by people",
        measure="the right word and nothing else",
        is_right=_exact,
    ),
}
