"""One turn of a chat, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def write_examples(examples: Iterable[Example], path: Path) -> None:
    """JSON lines, as `jlorax train` reads them."""
    rows = ({"prompt": one.prompt, "completion": one.answer} for one in examples)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def read_examples(path: Path) -> list[Example]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Example(row["prompt"], row["completion"]) for row in rows]
