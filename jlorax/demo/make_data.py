"""``python -m jlorax.demo.make_data``: what the demo's adapters are trained and scored on.

Writes NAME.jsonl and NAME-held-out.jsonl for each of them, the same at every run. It needs
`pip install -e '.[demo-data]'`, and for ``sentiment`` vaderSentiment's source distribution:
`pip download --no-deps --no-binary :all: vaderSentiment`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jlorax.demo.tasks import extraction, pirate, sentiment, sql
from jlorax.demo.tasks.example import Example, write_examples
from jlorax.llm import LLM

SEED = 20240607
NUM_HELD_OUT = 64
_MAX_ANSWER_TOKENS = 48

Answer = Callable[[Sequence[str]], list[str]]  # prompts -> what the base model says


@dataclass(frozen=True)
class Split:
    train: list[Example]
    held_out: list[Example]


def main() -> None:
    args = _parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    makers = _makers(args.sentiment_data)
    for name in args.only or makers:
        split = makers[name](random.Random(f"{SEED} {name}"))
        write_examples(split.train, args.out / f"{name}.jsonl")
        write_examples(split.held_out, args.out / f"{name}-held-out.jsonl")
        print(f"{name}: {len(split.train)} examples, {len(split.held_out)} held out", flush=True)


def _makers(sentiment_data: Path | None) -> Mapping[str, Callable[[random.Random], Split]]:
    makers: dict[str, Callable[[random.Random], Split]] = {
        "sql": sql_data,
        "json": json_data,
        "pirate": lambda rng: pirate_data(rng, base_answers),
    }
    if sentiment_data is not None:
        makers["sentiment"] = lambda rng: sentiment_data_of(rng, sentiment_data)
    return makers


def sql_data(rng: random.Random, num_examples: int = 720) -> Split:
    """Held out are questions over tables that no other question is about."""
    seen, unseen = _split_tables()
    train = sql.sql_examples(rng, seen, num_examples)
    return Split(train, sql.sql_examples(rng, unseen, NUM_HELD_OUT))


def json_data(rng: random.Random, num_examples: int = 720) -> Split:
    return _split(extraction.json_examples(rng, num_examples + NUM_HELD_OUT))


def sentiment_data_of(rng: random.Random, sdist: Path, num_examples: int = 560) -> Split:
    rated = sentiment.sentiment_examples(sdist)
    return _split(sentiment.balanced(rng, rated, (num_examples + NUM_HELD_OUT) // 2))


def pirate_data(rng: random.Random, answer: Answer) -> Split:
    """The base model answers every question first."""
    seen, _ = _split_tables()
    asked_of_tables = [example.prompt for example in sql.sql_examples(rng, seen, 40)]
    questions = pirate.pirate_questions(rng) + asked_of_tables
    return _split(pirate.pirate_examples(rng, questions, answer(questions)))


def base_answers(prompts: Sequence[str]) -> list[str]:
    """Greedy, in float32 on a CPU."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with LLM() as llm:
        return [a.text for a in llm.chat(turns, max_new_tokens=_MAX_ANSWER_TOKENS)]


def _split(examples: list[Example]) -> Split:
    return Split(examples[:-NUM_HELD_OUT], examples[-NUM_HELD_OUT:])


def _split_tables() -> tuple[list[sql.Table], list[sql.Table]]:
    tables = sql.read_tables()
    held_out = [table for table in tables if table.name in sql.HELD_OUT_TABLES]
    return [table for table in tables if table not in held_out], held_out


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jlorax.demo.make_data")
    parser.add_argument("--out", type=Path, default=Path("demo-data"))
    parser.add_argument("--sentiment-data", type=Path, help="vaderSentiment's .tar.gz")
    names = ("sql", "json", "pirate", "sentiment")
    parser.add_argument("--only", action="append", choices=names, help="repeatable")
    args = parser.parse_args()
    if args.sentiment_data is None and "sentiment" in (args.only or ()):
        parser.error("sentiment needs --sentiment-data")
    return args


if __name__ == "__main__":
    main()
