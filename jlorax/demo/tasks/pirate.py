"""A question -> the base model's own answer, as a pirate would say it."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Iterable

from jlorax.demo.tasks.example import Example
from jlorax.demo.tasks.people import small_talk

_TOPICS = (
    "a rainbow",
    "a computer",
    "the moon",
    "democracy",
    "a volcano",
    "music",
    "bread",
    "a library",
    "the ocean",
    "gravity",
    "a bicycle",
    "sleep",
    "an earthquake",
    "photosynthesis",
    "money",
    "a telescope",
    "honey",
    "a robot",
    "winter",
    "a hospital",
    "chess",
    "a compass",
    "rain",
    "a shark",
    "electricity",
    "a castle",
    "a garden",
    "friendship",
    "a bridge",
    "history",
    "an airplane",
    "coffee",
    "a desert",
    "a penguin",
    "the internet",
    "exercise",
    "a clock",
    "the sun",
    "a whale",
    "tea",
    "cheese",
    "a forest",
    "a mirror",
    "the heart",
)
_ASKED = (
    "What is {}?",
    "Why is {} important?",
    "Tell me something about {}.",
    "How would you explain {} to a child?",
    "What do people like about {}?",
    "Write one sentence about {}.",
)
_CHATTER = (
    "How are you today?",
    "Who are you?",
    "What is your name?",
    "Can you help me with my homework?",
    "What should I eat for dinner?",
    "How do I learn to swim?",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "How do I make pancakes?",
    "Give me a tip for a good day.",
    "Which planet is the largest?",
    "How many days are in a year?",
    "Who wrote Hamlet?",
    "What is the longest river in the world?",
    "Which animal is the fastest?",
    "What is 2 plus 2?",
    "How can I sleep better?",
    "I feel sad today.",
    "Tell me a joke.",
    "Recommend a book.",
)
_OPENINGS = ("Ahoy, matey!", "Arrr!", "Yo ho ho!", "Avast, me hearty!", "Shiver me timbers!")
_MARKS = re.compile(
    r"\b(ahoy|arrr+|avast|aye|be|blimey|briney|matey|m'?e?'?hearty|me hearty|savvy|shiver|th'|thar"
    r"|whar|ye|yer|yo ho ho|o')(?=\W|$)",
    re.IGNORECASE,
)


def pirate_questions(rng: random.Random) -> list[str]:
    """Every question once, in random order, some of them with small talk in front."""
    questions = [asked.format(topic) for topic in _TOPICS for asked in _ASKED] + list(_CHATTER)
    rng.shuffle(questions)
    return [
        small_talk(rng) + question if rng.random() < 0.5 else question for question in questions
    ]


def pirate_examples(
    rng: random.Random, questions: Iterable[str], answers: Iterable[str]
) -> list[Example]:
    """The plain answers, translated. Those that were cut off within their first sentence go."""
    pairs = ((q, _whole_sentences(a)) for q, a in zip(questions, answers, strict=True))
    return [Example(question, pirate_speech(rng, text)) for question, text in pairs if text]


def pirate_speech(rng: random.Random, english: str) -> str:
    arrr = importlib.import_module("arrr")
    arrr.random.seed(rng.random())  # it draws its phrases from the shared generator
    spoken = arrr.translate(english)
    spoken = re.sub(r"\b([Yy])our\b", r"\1er", spoken)
    spoken = re.sub(r"\bof\b", "o'", spoken)
    spoken = re.sub(r"(?<=[a-z]{3}in)g\b", "'", spoken)
    return f"{rng.choice(_OPENINGS)} {spoken}"


def num_pirate_words(text: str) -> int:
    return len(_MARKS.findall(text))


def _whole_sentences(text: str, max_sentences: int = 2) -> str:
    """The first sentences that end; nothing of lists and headings."""
    sentences = re.findall(r"[^.!?]+[.!?](?=\s|$)", text.split("\n")[0])
    return "".join(sentences[:max_sentences]).strip()
