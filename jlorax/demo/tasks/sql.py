"""A table's columns and a question -> one SELECT."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jlorax.demo.tasks.example import Example
from jlorax.demo.tasks.people import small_talk

HELD_OUT_TABLES = ("cars", "barley", "seattle_weather")
_LEFT_OUT = ("la_riots",)  # names people who died

# The table's own words stay as they are; everything around them varies.
_FRAMES = (
    "Table {table}({columns}).\n{question}",
    "Table: {table}({columns})\nQuestion: {question}",
    "Given the table {table}({columns}): {question}",
    "{question} The table is {table}({columns}).",
    "We have {table}({columns}). {question}",
)
_COMPARISONS = {
    ">": ("above", "over", "greater than", "more than"),
    "<": ("below", "under", "less than"),
    "=": ("equal to", "of exactly"),
}
_AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("maximum", "largest", "highest"),
    "MIN": ("minimum", "smallest", "lowest"),
    "SUM": ("total", "sum of"),
}


@dataclass(frozen=True)
class Table:
    """A table's columns by kind, with a few real values of each."""

    name: str
    numbers: dict[str, list[str]]
    texts: dict[str, list[str]]


def read_tables() -> list[Table]:
    """The data sets that vega_datasets ships, as table schemas."""
    data = importlib.import_module("vega_datasets").local_data
    names = [name.replace("-", "_") for name in data.list_datasets()]
    tables = [_table(name, getattr(data, name)()) for name in names if name not in _LEFT_OUT]
    return [table for table in tables if table.numbers and table.texts]


def _table(name: str, frame: Any) -> Table:
    numbers: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}
    for column in frame.columns:
        values = frame[column].dropna().unique()[:40]
        kind = frame[column].dtype.kind
        if kind in "if":
            numbers[column] = [f"{value:.4g}" for value in values if abs(value) < 10_000] or ["10"]
        elif kind == "M":
            texts[column] = [str(value)[:10] for value in values]
        else:
            texts[column] = [str(v) for v in values if "'" not in str(v) and len(str(v)) < 24]
    return Table(name, numbers, {column: values for column, values in texts.items() if values})


def sql_examples(rng: random.Random, tables: Sequence[Table], num_examples: int) -> list[Example]:
    return [_sql_example(rng, rng.choice(tables)) for _ in range(num_examples)]


def _sql_example(rng: random.Random, table: Table) -> Example:
    numbers = rng.sample(sorted(table.numbers), min(len(table.numbers), rng.randint(1, 3)))
    texts = rng.sample(sorted(table.texts), min(len(table.texts), rng.randint(1, 3)))
    question, sql = _question(rng, table, numbers, texts)
    columns = numbers + texts
    rng.shuffle(columns)
    frame = rng.choice(_FRAMES)
    prompt = frame.format(table=table.name, columns=", ".join(columns), question=question)
    return Example(small_talk(rng) + prompt, sql)


def _question(
    rng: random.Random, table: Table, numbers: list[str], texts: list[str]
) -> tuple[str, str]:
    """A question in English and its SQL."""
    what, number = rng.choice(texts), rng.choice(numbers)
    kind = rng.choice((_filter, _filter, _equal_text, _count, _aggregate, _group, _top, _first))
    return kind(rng, table, what, number)


def _filter(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    sign, words = _comparison(rng)
    value = rng.choice(table.numbers[number])
    ask = rng.choice(("Which {} have {} {} {}?", "List the {} with {} {} {}.", "{} with {} {} {}?"))
    sql = f"SELECT {what} FROM {table.name} WHERE {number} {sign} {value};"
    return ask.format(what, number, words, value), sql


def _equal_text(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    value = rng.choice(table.texts[what])
    ask = rng.choice(("Show the {} where {} is {}.", "What is the {} when {} is {}?"))
    sql = f"SELECT {number} FROM {table.name} WHERE {what} = '{value}';"
    return ask.format(number, what, value), sql


def _count(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    sign, words = _comparison(rng)
    value = rng.choice(table.numbers[number])
    ask = rng.choice(("How many rows have {} {} {}?", "Count the rows with {} {} {}."))
    sql = f"SELECT COUNT(*) FROM {table.name} WHERE {number} {sign} {value};"
    return ask.format(number, words, value), sql


def _aggregate(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    function, words = _aggregate_words(rng)
    ask = rng.choice(("What is the {} {}?", "Give me the {} {}.", "Compute the {} {}."))
    return ask.format(words, number), f"SELECT {function}({number}) FROM {table.name};"


def _group(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    function, words = _aggregate_words(rng)
    ask = rng.choice(("What is the {} {} for each {}?", "{} {} by {}?", "Show the {} {} per {}."))
    sql = f"SELECT {what}, {function}({number}) FROM {table.name} GROUP BY {what};"
    return ask.format(words, number, what), sql


def _top(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    limit = rng.randint(2, 10)
    word, order = rng.choice((("highest", " DESC"), ("largest", " DESC"), ("lowest", "")))
    ask = rng.choice(("Which {} {} have the {} {}?", "Show the {} {} with the {} {}."))
    sql = f"SELECT {what} FROM {table.name} ORDER BY {number}{order} LIMIT {limit};"
    return ask.format(limit, what, word, number), sql


def _first(rng: random.Random, table: Table, what: str, number: str) -> tuple[str, str]:
    word, order = rng.choice((("highest", " DESC"), ("largest", " DESC"), ("lowest", "")))
    ask = rng.choice(("Which {} has the {} {}?", "What {} has the {} {}?"))
    sql = f"SELECT {what} FROM {table.name} ORDER BY {number}{order} LIMIT 1;"
    return ask.format(what, word, number), sql


def _comparison(rng: random.Random) -> tuple[str, str]:
    sign = rng.choice(sorted(_COMPARISONS))
    return sign, rng.choice(_COMPARISONS[sign])


def _aggregate_words(rng: random.Random) -> tuple[str, str]:
    function = rng.choice(sorted(_AGGREGATES))
    return function, rng.choice(_AGGREGATES[function])
