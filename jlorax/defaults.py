"""What a setting is when nobody names it: one table, by what the model runs on; and a configuration
of the settings that somebody named. Plain.

With an executable for every reach of adapters a GPU's buckets make 31: 7 decode x 3, 3 extend x 3,
and one that scores prompts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlorax.config import (
    GIB,
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)

# of a device's memory
_BANK_SHARE = 16
_COMPUTING_SHARE = 24  # the largest steps of a 7B model on 72 GiB leave 3.0 GiB of it free


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
    return most if machine.memory_bytes is None else min(most, machine.memory_bytes // _BANK_SHARE)


def reserve_bytes(memory_bytes: int) -> int:
    """Kept for what steps need while they run: a long extend step of a 7B model takes a GiB."""
    return max(GIB, memory_bytes // _COMPUTING_SHARE)


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """$XDG_CACHE_HOME/jlorax, or ~/.cache/jlorax."""
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jlorax"


def configured(
    values: Mapping[str, Any], cache_dir: Path, machine: Machine, is_shared: bool = False
) -> EngineConfig:
    """Of the settings that somebody named, by their keys in ``servers.settings``; one that is None
    is not named. ``is_shared``: by several tenants."""
    defaults = defaults_of(machine)
    values = _unnamed(defaults, machine) | _given(values)
    adapters = {
        "root": values.get("adapter_root"),
        "named": values.get("adapter"),
        "remotes": values.get("remote"),
        "preload": _preload(values.get("preload")),
        "pinned": values.get("pin"),
        "num_loaders": values.get("adapter_loaders") or _num_loaders(),
        "bank_bytes": values.get("adapter_bank_bytes"),
        "max_slots": values.get("max_slots"),
        "max_rank": values.get("max_rank"),
        "host_cache_bytes": values.get("host_cache_bytes"),
        "own_templates": values.get("adapter_templates"),
        "disk_dir": values.get("disk_cache") or cache_dir / "adapters",
        "disk_cache_bytes": values.get("disk_cache_bytes"),
    }
    scheduler = SchedulerConfig(
        max_batch=values["max_batch"],
        max_queued=values["max_queued"],
        is_shared=is_shared,
        tenant_weights=values.get("tenant_weight", ()),
    )
    kv = {
        "max_seq_len": values.get("max_seq_len"),
        "cache_bytes": values.get("kv_cache_bytes"),
        "device_bytes": machine.memory_bytes,
    }
    model = {name: values.get(name) for name in ("model", "dtype", "load_format")}
    return EngineConfig(
        cache_dir=cache_dir,
        model=ModelSource(**_given(model)),
        steps=_steps(defaults, scheduler.max_batch, values.get("buckets")),
        scheduler=scheduler,
        kv=KVConfig(**_given(kv)),
        adapters=AdapterConfig(**_given(adapters)),
        model_id=values.get("model_id"),
        executable_dir=cache_dir / "executables",
    )


def _preload(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return () if names == ("none",) else names


def _num_loaders() -> int:
    """Each keeps a core busy while it packs; the device's threads need some too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(2, (cores or 1) // 2))


def _steps(defaults: Defaults, max_batch: int, asked: tuple[int, ...] | None) -> StepConfig:
    """Decode buckets up to max_batch; the largest is max_batch itself when none is as large."""
    fitting = (b for b in sorted(set(asked or defaults.decode_buckets)) if b < max_batch)
    return StepConfig(decode_buckets=(*fitting, max_batch), extend_buckets=defaults.extend_buckets)


def _unnamed(defaults: Defaults, machine: Machine) -> dict[str, Any]:
    """The settings that depend on the machine, as they are when nobody names them."""
    return {
        "dtype": defaults.dtype,
        "max_batch": defaults.max_batch,
        "max_queued": defaults.max_queued,
        "adapter_bank_bytes": bank_bytes(machine),
        "host_cache_bytes": defaults.host_cache_bytes,
    }


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
