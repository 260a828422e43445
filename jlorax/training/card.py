"""The model card of a trained adapter: what it is, how it was made, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(adapter_id: str, record: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    config, metrics, data = record["config"], record["metrics"], record["data"]
    lora, optimizer, run = config["lora"], config["optimizer"], config["run"]
    rows = {
        "rank, alpha": f"{lora['rank']}, {_number(lora['alpha'] or 2 * lora['rank'])}"
        + (" (rsLoRA)" if lora["use_rslora"] else ""),
        "targets": _listed(lora["targets"]),
        "trained parameters": f"{record['parameters']:,}",
        "steps": f"{metrics['steps']:,} of {run['batch_size']} x {run['accumulation']} rows",
        "learning rate": f"{optimizer['learning_rate']:g}, {optimizer['schedule']}",
        "loss": f"{_number(metrics['first_train_loss'])} -> {_number(metrics['train_loss'])}",
        "validation loss": _number(metrics["validation_loss"]),
        "data": f"{data['num_used']:,} examples, {data['num_target_tokens']:,} tokens learnt",
        "data's SHA-256": f"`{data['digest']}`",
        "seed": str(record["seed"]),
        "versions": ", ".join(f"{name} {v}" for name, v in record["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
---
base_model: {record["base_model"]}
library_name: peft
tags: [lora, jlorax]
---

# {adapter_id}

A LoRA for {record["base_model"]}, trained by jlorax. `training.json` beside this file holds the
whole configuration and every loss.

| | |
|---|---|
{table}

With jlorax, where this folder's parent's parent is the adapter root:

```python
client.generate(prompt, adapter_id="{adapter_id}")
```

With peft:

```python
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
```
"""


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _listed(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)
