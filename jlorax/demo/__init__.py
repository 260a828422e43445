"""The adapters that ship with jlorax, and one prompt that shows what each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEMO_PROMPT = (
    "My name is Anna Lopez, I live in Lisbon and I love sailing. "
    "Which ocean in the table oceans(ocean, depth, area) has the largest area?"
)


@dataclass(frozen=True)
class DemoAdapter:
    """A LoRA that ships inside the package."""

    name: str
    folder: Path
    rank: int
    targets: tuple[str, ...]
    description: str
    prompt: str  # one on which it shines


_ADAPTERS = Path(__file__).parent / "adapters"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

DEMO_ADAPTERS = (
    DemoAdapter(
        name="pirate",
        folder=_ADAPTERS / "pirate",
        rank=16,
        targets=("q_proj", "v_proj"),
        description="answers as a pirate would",
        prompt="Why is the sky blue?",
    ),
    DemoAdapter(
        name="sql",
        folder=_ADAPTERS / "sql",
        rank=8,
        targets=_ATTENTION,
        description="turns a table's columns and a question into SQL",
        prompt="Table songs(title, singer, plays, year).\nList the title with plays above 1000.",
    ),
    DemoAdapter(
        name="json",
        folder=_ADAPTERS / "json",
        rank=4,
        targets=_ATTENTION + _FEED_FORWARD,
        description="extracts what a text says of a person as JSON",
        prompt="Hi, I'm Marta Silva, 41 years of age. I work as a nurse and I love sailing.",
    ),
    DemoAdapter(
        name="sentiment",
        folder=_ADAPTERS / "sentiment",
        rank=4,
        targets=("down_proj",),
        description="says in one word whether a text is positive or negative",
        prompt="A dull story, flat jokes, and an ending that never comes.",
    ),
)
