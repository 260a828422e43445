"""How the demo's adapters are scored and shipped; the scores themselves take minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jlorax.demo import DEMO_ADAPTERS
from jlorax.demo.score import Score, newest, num_right, ship
from jlorax.demo.tasks.example import Example, read_examples, write_examples
from jlorax.demo.tasks.measures import MEASURES


def test_every_adapter_has_a_measure() -> None:
    assert MEASURES.keys() == {demo.name for demo in DEMO_ADAPTERS}


@pytest.mark.parametrize(
    ("task", "wanted", "right", "wrong"),
    [
        ("sql", "SELECT a FROM b;", " SELECT a FROM b;\n", "SELECT a FROM b"),
        ("sentiment", "positive", "positive", "It is positive."),
        ("json", '{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', '{"a": 1, "b": "x", "c": 2}'),
        ("json", '{"a": 1}', '{"a":1}', '{"a": 1'),
        ("pirate", "", "Ahoy, th' sea be blue.", "Ahoy, the sea is blue."),
    ],
)
def test_what_counts_as_right(task: str, wanted: str, right: str, wrong: str) -> None:
    example = Example("asked", wanted)
    assert num_right(task, [example, example], [right, wrong]) == 1


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    examples = [Example("Où?\nHere", "là"), Example("\u2028", '"')]
    write_examples(examples, tmp_path / "x.jsonl")
    assert read_examples(tmp_path / "x.jsonl") == examples


def test_what_is_shipped_is_the_newest_version_with_its_figures(tmp_path: Path) -> None:
    demo = DEMO_ADAPTERS[0]
    for version in ("2", "10"):
        folder = tmp_path / "made" / demo.name / version
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"# version {version}\n")
        (folder / "loss.png").touch()
    made = newest(tmp_path / "made", demo.name)
    target = tmp_path / "shipped"
    target.mkdir()
    (target / "old").touch()
    ship(Score(demo, made, 64, 1, 60, "a base's answer", "an adapter's\nanswer", ""), target)
    assert [path.name for path in target.iterdir()] == ["README.md"]
    card = (target / "README.md").read_text()
    assert card.startswith("# version 10\n")
    assert "| 1 of 64 (2%) | 60 of 64 (94%) |" in card
    assert "`an adapter's answer`" in card
    assert json.dumps(demo.prompt)[1:-1] in card
