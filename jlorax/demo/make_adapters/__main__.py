"""The command line: see the package."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from jlorax.demo import DEMO_ADAPTERS, DemoAdapter
from jlorax.demo.make_adapters.chat import Chat
from jlorax.demo.make_adapters.publishing import card, evaluate, save
from jlorax.demo.make_adapters.recipes import RECIPES
from jlorax.demo.make_adapters.tasks import extraction, pirate, sentiment, sql
from jlorax.demo.make_adapters.tasks.example import Example
from jlorax.demo.make_adapters.training import BATCH_ROWS, SEED, add_lora, train
from jlorax.models.embedded import ensure_embedded_model

NUM_HELD_OUT = 64


def main() -> None:
    args = _parse_args()
    torch.set_num_threads(args.threads)
    chat = Chat(args.model or ensure_embedded_model(args.cache_dir))
    for adapter in DEMO_ADAPTERS:
        if adapter.name not in (args.only or RECIPES):
            continue
        if adapter.name == "sentiment" and args.sentiment_data is None:
            print("sentiment is left out: it needs --sentiment-data")
            continue
        make_adapter(chat, adapter, args.out / adapter.name, args.sentiment_data)


def make_adapter(
    chat: Chat, adapter: DemoAdapter, folder: Path, sentiment_data: Path | None
) -> None:
    recipe = RECIPES[adapter.name]
    training, held_out = make_examples(chat, adapter.name, recipe.steps, sentiment_data)
    model = add_lora(chat.load_base(), adapter, recipe)
    losses = train(chat, model, training, recipe)
    save(model, folder)
    score = evaluate(chat, folder, adapter, recipe, held_out)
    text = card(adapter, recipe, losses, score)
    (folder / "README.md").write_text(text)
    print(text, flush=True)


def make_examples(
    chat: Chat, name: str, steps: int, sentiment_data: Path | None
) -> tuple[list[Example], list[Example]]:
    """Training examples, one for each row of each step, and the held-out ones."""
    rng = random.Random(f"{SEED} {name}")
    num = steps * BATCH_ROWS
    if name == "sql":
        seen, unseen = _split_tables()
        return sql.sql_examples(rng, seen, num), sql.sql_examples(rng, unseen, NUM_HELD_OUT)
    if name == "json":
        return _split(extraction.json_examples(rng, num + NUM_HELD_OUT))
    if name == "sentiment" and sentiment_data is not None:
        examples = sentiment.sentiment_examples(sentiment_data)
        return _split(sentiment.balanced(rng, examples, (num + NUM_HELD_OUT) // 2))
    held_out, training = _pirate_examples(chat, rng)
    return rng.choices(training, k=num), held_out


def _split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    return examples[:-NUM_HELD_OUT], examples[-NUM_HELD_OUT:]


def _split_tables() -> tuple[list[sql.Table], list[sql.Table]]:
    tables = sql.read_tables()
    held_out = [table for table in tables if table.name in sql.HELD_OUT_TABLES]
    return [table for table in tables if table not in held_out], held_out


def _pirate_examples(chat: Chat, rng: random.Random) -> tuple[list[Example], list[Example]]:
    """Held-out and training examples; the base model answers every question first."""
    tables, _ = _split_tables()
    asked_of_tables = [example.prompt for example in sql.sql_examples(rng, tables, 40)]
    questions = pirate.pirate_questions(rng) + asked_of_tables
    answers = chat.answer(chat.load_base(), questions)
    examples = pirate.pirate_examples(rng, questions, answers)
    return examples[:NUM_HELD_OUT], examples[NUM_HELD_OUT:]


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the demo's adapters.")
    parser.add_argument("--out", type=Path, required=True, help="the adapters' parent folder")
    parser.add_argument(
        "--model", type=Path, help="SmolLM2-135M-Instruct's folder; prepared if left out"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "jlorax")
    parser.add_argument("--sentiment-data", type=Path, help="vaderSentiment's .tar.gz")
    parser.add_argument("--only", action="append", choices=sorted(RECIPES), help="repeatable")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
