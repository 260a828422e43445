"""``python -m jlorax.demo.score``: what the base model and the demo's adapters get right.

Takes the newest version of each below ``--adapters`` and the held-out examples that
``jlorax.demo.make_data`` wrote. Greedy, all in one engine. ``--ship DIR`` also copies the versions
there, each with its figures on its card.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jlorax.demo import DEMO_ADAPTERS, DEMO_PROMPT, DemoAdapter
from jlorax.demo.tasks.example import Example, read_examples
from jlorax.demo.tasks.measures import MEASURES
from jlorax.llm import LLM
from jlorax.training.repository import Repository

_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """Right answers, and those to the adapter's own prompt and to the one of the demo."""

    demo: DemoAdapter
    folder: Path
    num_held_out: int
    num_base: int
    num_adapter: int
    base_answer: str
    adapter_answer: str
    demo_answer: str

    @property
    def counts(self) -> tuple[str, str]:
        return self._of(self.num_base), self._of(self.num_adapter)

    def _of(self, num: int) -> str:
        return f"{num} of {self.num_held_out} ({num / self.num_held_out:.0%})"


def main() -> None:
    args = _parse_args()
    made = {demo: newest(args.adapters, demo.name) for demo in DEMO_ADAPTERS}
    with LLM(adapters={demo.name: folder for demo, folder in made.items()}) as llm:
        scores = [score(llm, demo, made[demo], args.data) for demo in DEMO_ADAPTERS]
    Console().print(table(scores))
    for one in scores:
        print(f"{one.demo.name}: {one.demo_answer}")
        if args.ship is not None:
            ship(one, args.ship / one.demo.name)


def newest(root: Path, name: str) -> Path:
    repository = Repository(root, name)
    return repository.folder / str(repository.versions[-1])


def score(llm: LLM, demo: DemoAdapter, folder: Path, data: Path) -> Score:
    held_out = read_examples(data / f"{demo.name}-held-out.jsonl")
    prompts = [*(one.prompt for one in held_out), demo.prompt, DEMO_PROMPT]
    base, adapter = (answers(llm, prompts, name) for name in (None, demo.name))
    return Score(
        demo=demo,
        folder=folder,
        num_held_out=len(held_out),
        num_base=num_right(demo.name, held_out, base),
        num_adapter=num_right(demo.name, held_out, adapter),
        base_answer=base[-2],
        adapter_answer=adapter[-2],
        demo_answer=adapter[-1],
    )


def answers(llm: LLM, prompts: Sequence[str], adapter: str | None) -> list[str]:
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = llm.chat(turns, adapter_ids=[adapter] * len(turns), max_new_tokens=_MAX_NEW_TOKENS)
    return [answer.text for answer in asked]


def num_right(task: str, held_out: Sequence[Example], given: Sequence[str]) -> int:
    is_right = MEASURES[task].is_right
    return sum(is_right(one, answer) for one, answer in zip(held_out, given, strict=False))


def table(scores: Sequence[Score]) -> Table:
    shown = Table("adapter", "right is", "base model", "with the adapter", title="held out")
    for one in scores:
        shown.add_row(one.demo.name, MEASURES[one.demo.name].says, *one.counts)
    return shown


def ship(one: Score, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(one.folder, target, ignore=shutil.ignore_patterns("*.png"))
    with (target / "README.md").open("a", encoding="utf-8") as card:
        card.write(held_out_section(one))


def held_out_section(one: Score) -> str:
    base, adapter = one.counts
    return f"""
## Held out

It {one.demo.description}. Right is: {MEASURES[one.demo.name].says}; greedy, in float32.

| base model | with this adapter |
|---|---|
| {base} | {adapter} |

{_quoted(one.demo.prompt)}

- base model: {_quoted(one.base_answer)}
- {one.demo.name}: {_quoted(one.adapter_answer)}

A demonstration, made to be seen at a glance: no one checked its answers beyond these figures.
"""


def _quoted(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jlorax.demo.score")
    parser.add_argument("--adapters", type=Path, default=Path("demo-adapters"))
    parser.add_argument("--data", type=Path, default=Path("demo-data"))
    parser.add_argument("--ship", type=Path, help="copy them there, each with its figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
