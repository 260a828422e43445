"""A film review's snippet -> one word."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

from jlorax.demo.tasks.example import Example

_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_CLEAR_RATING = 1.0  # of -4..4: people agreed on its sign


def sentiment_examples(sdist: Path) -> list[Example]:
    """Film snippets that 20 people rated, from vaderSentiment's source distribution."""
    rows = (line.split("\t") for line in _ratings(sdist).splitlines())
    rated = [(float(row[1]), row[2].strip()) for row in rows if len(row) == 3]
    return [
        Example(text, "positive" if rating > 0 else "negative")
        for rating, text in rated
        if abs(rating) >= _CLEAR_RATING and 20 < len(text) < 240
    ]


def balanced(rng: random.Random, examples: Iterable[Example], num_each: int) -> list[Example]:
    """As many of one answer as of the other, in random order."""
    by_answer: dict[str, list[Example]] = {}
    for example in examples:
        by_answer.setdefault(example.answer, []).append(example)
    chosen = [e for answer in sorted(by_answer) for e in rng.sample(by_answer[answer], num_each)]
    rng.shuffle(chosen)
    return chosen


def _ratings(sdist: Path) -> str:
    with tarfile.open(sdist) as outer:
        inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_bytes = _read(outer, inner_name)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return _read(inner, _RATINGS).decode("utf-8", errors="replace")


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise FileNotFoundError(f"{name} is no file in the archive")
    return member.read()
