"""What is kept of a trained adapter: PEFT's folder, its score, its card. torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from jlorax.demo import DEMO_MODEL, DemoAdapter
from jlorax.demo.make_adapters.chat import Chat
from jlorax.demo.make_adapters.recipes import Recipe
from jlorax.demo.make_adapters.tasks.example import Example
from jlorax.demo.make_adapters.training import BATCH_ROWS, SEED

NUM_LAST_LOSSES = 10  # steps averaged into the loss that the card names


@dataclass(frozen=True)
class Score:
    """Right answers on held-out prompts, and one pair of answers to look at."""

    base: int
    adapter: int
    total: int
    base_answer: str
    adapter_answer: str


def save(model: Any, folder: Path) -> None:
    """PEFT's folder, the weights in bfloat16; the same run writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model)
    halved = {key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = DEMO_MODEL  # not the folder it lay in
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["target_modules"] = sorted(values["target_modules"])  # a set: its order varies
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def evaluate(
    chat: Chat, folder: Path, adapter: DemoAdapter, recipe: Recipe, held_out: Sequence[Example]
) -> Score:
    """The saved files, not the trained model, against the base; in float32, as a CPU serves it."""
    prompts = [adapter.prompt, *(example.prompt for example in held_out)]
    model = peft.PeftModel.from_pretrained(chat.load_base(torch.float32), folder)
    ours = chat.answer(model, prompts)
    with model.disable_adapter():
        base = chat.answer(model, prompts)
    right = [
        sum(recipe.is_right(e, a) for e, a in zip(held_out, answers[1:], strict=True))
        for answers in (base, ours)
    ]
    return Score(right[0], right[1], len(held_out), base[0], ours[0])


def card(adapter: DemoAdapter, recipe: Recipe, losses: Sequence[float], score: Score) -> str:
    scaling = "alpha / sqrt(rank), rsLoRA" if recipe.use_rslora else "alpha / rank"
    first, last = (mean(part) for part in (losses[:3], losses[-NUM_LAST_LOSSES:]))
    return f"""\
---
base_model: {DEMO_MODEL}
library_name: peft
license: apache-2.0
---

# {adapter.name}

A LoRA that {adapter.description}.

| | |
|---|---|
| rank, alpha | {adapter.rank}, {recipe.alpha} ({scaling}) |
| targets | {", ".join(adapter.targets)} |
| data | {recipe.data} |
| training | {recipe.steps} steps of {BATCH_ROWS} rows, AdamW, learning rate \
{recipe.learning_rate:g}, loss on the answer alone |
| seed | {SEED} |
| loss | {first:.2f} at the start, {last:.2f} over the last {NUM_LAST_LOSSES} steps |

## Held out

{score.total} prompts, greedy, in float32: {recipe.measure}.

| base model | with this adapter |
|---|---|
| {score.base} of {score.total} ({score.base / score.total:.0%}) | {score.adapter} of \
{score.total} ({score.adapter / score.total:.0%}) |

{_quoted(adapter.prompt)}

- base model: {_quoted(score.base_answer)}
- {adapter.name}: {_quoted(score.adapter_answer)}

## Load it

    jlorax serve --adapter {adapter.name}=THIS_FOLDER

or with PEFT: `PeftModel.from_pretrained(base_model, "THIS_FOLDER")`. The prompts it was trained on
are in the model's chat template, one user message and the answer. A demonstration, made to be seen
at a glance: no one checked its answers beyond the figures above. Made by
`python -m jlorax.demo.make_adapters`.
"""


def _quoted(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
