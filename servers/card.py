"""How much memory a GPU has, before jax takes its share of it: asked of ``nvidia-smi``."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from jlorax.config import MIB
from jlorax.errors import ConfigError

MAX_SHARE = 0.8  # of it for trainings: a server needs some
_ASK_S = 30.0


def share(num_bytes: int | None, environment: Mapping[str, str]) -> float | None:
    """The part of the first visible GPU that ``num_bytes`` is; None when nobody wants any, or
    nothing is known of a GPU. Raises ConfigError when that would be too much."""
    if num_bytes is None:
        return None
    total = _memory_bytes(environment.get("CUDA_VISIBLE_DEVICES", ""))
    if total is None:
        return None
    if not 0 < num_bytes <= MAX_SHARE * total:
        raise ConfigError(
            f"train_memory_bytes is {num_bytes}; of this GPU's {total} bytes "
            f"1 to {int(MAX_SHARE * total)} can be kept for trainings"
        )
    return num_bytes / total


def _memory_bytes(visible: str) -> int | None:
    """``visible`` as CUDA_VISIBLE_DEVICES has it: numbers or UUIDs, "" for all."""
    wanted = visible.split(",")[0]
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    one = ["-i", wanted] if wanted else []
    try:
        said = subprocess.run(
            ["nvidia-smi", *one, *query],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=True,
        ).stdout
        return int(said.splitlines()[0]) * MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
