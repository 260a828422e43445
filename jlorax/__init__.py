"""JLoRAX: many fine-tuned LLMs for the price of one. ``jlorax.Client`` never imports jax."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlorax import errors, types
    from jlorax.client import AsyncClient, Client
    from jlorax.engine import Engine
    from jlorax.fine_tuning import FinetuneJob, TrainedAdapter, finetune, start_finetune
    from jlorax.llm import LLM

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "Engine",
    "FinetuneJob",
    "TrainedAdapter",
    "errors",
    "finetune",
    "start_finetune",
    "types",
]

_HOME = {
    "AsyncClient": "jlorax.client",
    "Client": "jlorax.client",
    "Engine": "jlorax.engine",
    "FinetuneJob": "jlorax.fine_tuning",
    "LLM": "jlorax.llm",
    "TrainedAdapter": "jlorax.fine_tuning",
    "finetune": "jlorax.fine_tuning",
    "start_finetune": "jlorax.fine_tuning",
}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the engine alone brings jax."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("errors", "types"):
        return import_module(f"jlorax.{name}")
    raise AttributeError(f"module 'jlorax' has no attribute {name!r}")
