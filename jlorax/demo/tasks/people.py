"""Invented people, and how they open a conversation."""

from __future__ import annotations

import importlib
import random
from typing import Any

_SMALL_TALK = (
    "Hi, I am {name} from {city}. ",
    "I'm {name}, I live in {city} and I love {hobby}. ",
    "Hello! My name is {name}. ",
    "I love {hobby} so much! ",
    "Good morning, a quick question about {hobby}. ",
)
HOBBIES = (
    "old maps",
    "chess",
    "jazz",
    "cooking",
    "long walks",
    "statistics",
    "birds",
    "football",
    "painting",
    "rivers",
    "science fiction",
    "gardening",
    "coffee",
    "sailing",
    "history",
    "photography",
    "dogs",
    "trains",
    "running",
    "the sea",
)
CITIES = (
    "Paris",
    "Oslo",
    "Nairobi",
    "Porto",
    "Lima",
    "Kyoto",
    "Madrid",
    "Vienna",
    "Cairo",
    "Boston",
    "Athens",
    "Hanoi",
)


def small_talk(rng: random.Random) -> str:
    """A third of the prompts open as people do, so that the adapter learns to look past it."""
    if rng.random() > 0.35:
        return ""
    fake = faker(rng)
    values = {"name": fake.name(), "city": fake.city(), "hobby": rng.choice(HOBBIES)}
    return rng.choice(_SMALL_TALK).format(**values)


def faker(rng: random.Random) -> Any:
    fake = importlib.import_module("faker").Faker("en_US")
    fake.seed_instance(rng.getrandbits(32))
    return fake
