"""What a setting is when nobody names it: one table, by what the model runs on. Plain.

With an executable for every reach of adapters a GPU's buckets make 30: 7 decode x 3, 3 extend x 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlorax.config import GIB, AdapterConfig, ModelSource, SchedulerConfig, StepConfig

_SHARE = 16  # of a device's memory, for the adapter bank and for computing


@dataclass(frozen=True)
class Machine:
    """What jax found. ``memory_bytes``: what it may take of a device of its own; else None."""

    platform: str  # "cpu", "gpu", ...
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Defaults:
    dtype: str
    decode_buckets: tuple[int, ...]
    extend_buckets: tuple[int, ...]
    max_batch: int
    max_queued: int
    bank_bytes: int  # at most
    host_cache_bytes: int


CPU = Defaults(
    dtype=ModelSource().dtype,
    decode_buckets=StepConfig().decode_buckets,
    extend_buckets=StepConfig().extend_buckets,
    max_batch=SchedulerConfig().max_batch,
    max_queued=SchedulerConfig().max_queued,
    bank_bytes=AdapterConfig().bank_bytes,
    host_cache_bytes=AdapterConfig().host_cache_bytes,
)
GPU = Defaults(
    dtype="bfloat16",
    decode_buckets=(1, 8, 16, 32, 64, 128, 256),
    extend_buckets=(512, 2048, 8192),
    max_batch=256,
    max_queued=1024,
    bank_bytes=4 * GIB,
    host_cache_bytes=8 * GIB,
)


def defaults_of(machine: Machine) -> Defaults:
    """What is neither a CPU nor a GPU computes as a CPU does: with XLA, in tiles."""
    return GPU if machine.platform == "gpu" else CPU


def bank_bytes(machine: Machine) -> int:
    """A small card must not spend on adapters what its keys and values need."""
    most = defaults_of(machine).bank_bytes
    return most if machine.memory_bytes is None else min(most, machine.memory_bytes // _SHARE)


def reserve_bytes(memory_bytes: int) -> int:
    """Kept for what steps need while they run: a long extend step of a 7B model takes a GiB."""
    return max(GIB, memory_bytes // _SHARE)
