"""A training in a process of its own: how it is started, and what it says. No jax here.

    python -m jlorax.training JOB.json      one event a line on stdout, as ``events`` has them

SIGTERM cancels it with a checkpoint. What it is given stands in one file, so that nothing of a
configuration is seen in a list of processes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from jlorax.training.config import TrainConfig


@dataclass(frozen=True)
class JobFile:
    """What the process is given. ``is_idle``: it runs when nobody else wants the processor."""

    config: dict[str, Any]
    cache_dir: str
    is_idle: bool = False

    @classmethod
    def of(cls, config: TrainConfig, cache_dir: Path, *, is_idle: bool = False) -> Self:
        return cls(config.to_dict(), str(cache_dir), is_idle)

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


# a step's temporaries are gigabytes that come and go: 5 million page faults in 7 steps of a small
# model, and a fifth of its time, in pages of 4 KiB (docs/decisions.md). Read when a process starts.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# of a GPU that is shared through CUDA's MPS: a quarter of it, behind whoever serves
_MPS_SHARE = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25", "CUDA_MPS_CLIENT_PRIORITY": "1"}


def command(job_file: Path) -> list[str]:
    return [sys.executable, "-m", "jlorax.training", str(job_file)]


def environment(device_share: float | None = None) -> dict[str, str]:
    """For the process. ``device_share``: the part of a GPU's memory that it may take, beside one
    that serves."""
    given = {**HUGE_PAGES, **os.environ}
    if device_share is not None:
        given |= _MPS_SHARE
        given.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
        given["XLA_CLIENT_MEM_FRACTION"] = f"{device_share:.4f}"
    return given
