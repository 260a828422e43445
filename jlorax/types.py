"""What crosses the borders between the parts: requests, events, shapes. Frozen, plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

Progress = Callable[[str, float], None]
"""Reports (what is being done, fraction done in 0..1); may be called from any thread."""


def no_progress(what: str, fraction: float) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class Projection:
    """One adaptable linear map of the base model: y = x @ W, in each of its layers.

    ``name`` is PEFT's last path component ("q_proj"); ``path`` is the module's full name with
    "{layer}" for the layer's number, or without it when the map exists once (lm_head).
    """

    name: str
    path: str
    d_in: int
    d_out: int
    num_layers: int

    def module(self, layer: int) -> str:
        return self.path.format(layer=layer)
