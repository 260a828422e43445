"""What a training says of itself while it runs. Each event is one JSON line between processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """``kind`` names it in JSON."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        return json.dumps({"event": self.kind, **asdict(self)})


@dataclass(frozen=True)
class Preparing(Event):
    """Before the first step: what is being done, and how far it is (0 to 1)."""

    kind = "preparing"
    what: str
    fraction: float


@dataclass(frozen=True)
class Began(Event):
    """``data`` is the data's report; ``step`` is above 0 where a checkpoint is continued."""

    kind = "began"
    step: int
    num_steps: int
    num_parameters: int
    data: dict[str, Any]


@dataclass(frozen=True)
class StepDone(Event):
    """``loss`` is the mean over the step's targets, nats a token."""

    kind = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    eta_s: float


@dataclass(frozen=True)
class Evaluated(Event):
    kind = "evaluated"
    step: int
    loss: float
    is_best: bool


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint from which a training that is killed continues."""

    kind = "saved"
    step: int


@dataclass(frozen=True)
class Ended(Event):
    """``reason``: "finished" or "early_stop" (the adapter is there)."""

    kind = "ended"
    reason: str
    adapter_id: str
    folder: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Cancelled(Event):
    """By the user; ``step`` is the checkpoint from which it would continue."""

    kind = "cancelled"
    step: int


@dataclass(frozen=True)
class Failed(Event):
    """``code`` is that of the error: whose fault it was."""

    kind = "failed"
    code: str
    message: str


_KINDS: dict[str, type[Event]] = {
    kind.kind: kind
    for kind in (Preparing, Began, StepDone, Evaluated, Saved, Ended, Cancelled, Failed)
}

Report = Callable[[Event], None]


def no_report(event: Event) -> None:
    """The Report that tells nobody."""


def parse_event(line: str) -> Event:
    """``Event.to_json`` back. ValueError when it is none."""
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("event") not in _KINDS:
        raise ValueError(f"is no event of a training: {line[:80]!r}")
    return _KINDS[fields.pop("event")](**fields)
