"""A LoRA by PEFT, trained on the answers of a chat. torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch

from jlorax.demo import DemoAdapter
from jlorax.demo.make_adapters.chat import IGNORED, Chat
from jlorax.demo.make_adapters.recipes import Recipe
from jlorax.demo.make_adapters.tasks.example import Example

SEED = 20240607
BATCH_ROWS = 8
WARMUP_STEPS = 8


def add_lora(base: Any, adapter: DemoAdapter, recipe: Recipe) -> Any:
    torch.manual_seed(SEED)  # lora_A's start
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.use_rslora,
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config)


def train(chat: Chat, model: Any, examples: Sequence[Example], recipe: Recipe) -> list[float]:
    """AdamW, a short warm-up and a linear descent to zero. Returns each step's loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _factor(n, recipe.steps))
    losses: list[float] = []
    model.train()
    for batch in _batches(chat, examples):
        loss = answer_loss(model, **batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}/{recipe.steps} loss {losses[-1]:.3f}", flush=True)
    return losses


def answer_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens: a scalar.

    The vocabulary is a fifth of this model's arithmetic and prompts are most of a row, so logits
    are computed where there is a label, not everywhere as the model's own loss does.
    """
    causal = model.get_base_model()
    hidden = causal.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    following = labels[:, 1:]
    asked = following != IGNORED
    logits = causal.lm_head(hidden[:, :-1][asked]).float()
    return torch.nn.functional.cross_entropy(logits, following[asked])


def _factor(step: int, steps: int) -> float:
    return min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))


def _batches(chat: Chat, examples: Sequence[Example]) -> Iterator[dict[str, torch.Tensor]]:
    """Rows padded on the right to the batch's longest: i64[BATCH_ROWS, T] each."""
    for start in range(0, len(examples), BATCH_ROWS):
        rows = [chat.row(example) for example in examples[start : start + BATCH_ROWS]]
        width = max(len(ids) for ids, _ in rows)
        pad = chat.tokenizer.pad_token_id
        yield {
            "input_ids": _padded([ids for ids, _ in rows], width, pad),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], width, 0),
            "labels": _padded([labels for _, labels in rows], width, IGNORED),
        }


def _padded(rows: Sequence[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
