"""PEFT writes the adapters, and PEFT's own forward says what their logits are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

_STRENGTH = 0.15  # std of an entry of scaling * B @ A; the base weights' is 0.08


def write_adapter(
    base: Any, folder: Path, changes: dict[str, Any], dtype: str, seed: int = 0
) -> None:
    """Saves a LoRA over ``base`` with neither A nor B zero; ``base`` is given back unchanged."""
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **changes))
    torch.manual_seed(seed)
    modules = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for module in modules:
        product = module.scaling["default"] * math.sqrt(module.r["default"])
        for side in (module.lora_A["default"], module.lora_B["default"]):
            torch.nn.init.normal_(side.weight, std=math.sqrt(_STRENGTH / product))
            side.weight.data = side.weight.data.to(getattr(torch, dtype))
    assert modules
    adapted.save_pretrained(str(folder))
    adapted.unload()


def logits_of(base: Any, folder: Path | None, rows: list[tuple[int, ...]]) -> list[np.ndarray]:
    """f32[tokens, V] of each row, one forward each; the adapter is read from its file."""
    if folder is None:
        return [_forward(base, row) for row in rows]
    adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    try:
        return [_forward(adapted, row) for row in rows]
    finally:
        adapted.unload()


def _forward(model: Any, row: tuple[int, ...]) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.tensor([row]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy())
