"""How the benchmark and a contestant talk: a process that answers JSON lines. Stdlib only.

A contestant may live in a Python environment of its own, so nothing here imports a package.
One process a contestant: neither its memory nor its threads touch another's. All are timed by the
same lines of code, below.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Setup:
    """What every contestant is given. Paths are text: this travels as JSON."""

    model: str  # folder in Hugging Face's layout
    adapters: dict[str, str]  # name -> PEFT folder
    model_gguf: str | None
    adapter_ggufs: dict[str, str]
    prompts: list[list[int]]  # token ids, row i's prompt; as many as the largest batch
    num_out: int  # tokens, the most that will be asked for
    num_threads: int
    executables: str  # folder where compiled code may be kept for the next start
    few_executables: bool  # only what the measured cases need

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Setup:
        return cls(**json.loads(Path(path).read_text()))


class Contestant(Protocol):
    def run(self, adapters: Sequence[str | None], num_out: int) -> list[list[int]]:
        """Greedy, end of text ignored: row i continues prompt i with adapter i (None: the base)."""

    def notes(self) -> dict[str, str]:
        """How it was set up, for the record."""


def serve(start: Callable[[Setup], Contestant]) -> None:
    """Answers the benchmark's lines until it closes our input. argv[1] is the setup's file."""
    replies = _own_output()
    contestant = start(Setup.read(sys.argv[1]))
    _reply(replies, {"packages": packages()})
    for line in sys.stdin:
        match json.loads(line):
            case {"op": "run", "adapters": adapters, "num_out": num_out}:
                _reply(replies, _timed(contestant, adapters, num_out))
            case {"op": "describe"}:
                _reply(replies, {"peak_rss_bytes": peak_rss_bytes(), "notes": contestant.notes()})
            case other:
                raise ValueError(f"unknown message {other}")


def _timed(contestant: Contestant, adapters: Sequence[str | None], num_out: int) -> dict[str, Any]:
    start_s = time.perf_counter()
    tokens = contestant.run(adapters, num_out)
    seconds = time.perf_counter() - start_s
    return {"seconds": seconds, "tokens": tokens}


def _own_output() -> int:
    """A private copy of stdout: whatever a library prints goes to stderr instead."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def _reply(replies: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(replies, data) :]


def peak_rss_bytes() -> int:
    """The most memory this process held at once.

    ru_maxrss survives exec: a child would show its parent's peak. VmHWM is this program's own.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def packages() -> dict[str, str]:
    """Name -> version of everything installed in this environment, and Python's own."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **dict(sorted(installed.items()))}
