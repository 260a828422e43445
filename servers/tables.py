"""What the command line prints as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jlorax.assembly import MemoryPlan
from jlorax.layout import LoraReach, StepShape
from jlorax.types import AdapterInfo


def show(table: Table) -> None:
    Console().print(table)


def as_size(num_bytes: int) -> str:
    """Bytes in the unit a person would use."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def adapter_table(adapters: Sequence[AdapterInfo]) -> Table:
    table = Table(title=f"{len(adapters)} adapters")
    for heading in ("id", "tier", "rank", "targets", "size", "requests"):
        table.add_column(heading)
    for a in adapters:
        size = "" if a.size_bytes is None else as_size(a.size_bytes)
        targets = ", ".join(a.target_modules)
        table.add_row(a.adapter_id, a.tier.value, str(a.rank), targets, size, str(a.num_requests))
    return table


def memory_table(plan: MemoryPlan) -> Table:
    table = Table(title="memory plan")
    for heading in ("what", "bytes", "of which"):
        table.add_column(heading)
    table.add_row("device", *_device(plan))
    origin = ", random (load format dummy)" if plan.random_weights else ""
    table.add_row("weights", as_size(plan.weight_bytes), plan.dtype + origin)
    kv = f"{plan.num_pages} pages of {plan.page_size} tokens; up to {plan.max_seq_len} a sequence"
    table.add_row("KV pages", as_size(plan.kv_bytes), kv)
    pools = ", ".join(
        f"{n} of {pool.num_layers} x {pool.width}" for pool, n in plan.pool_pages.items()
    )
    bank = f"{plan.max_slots} slots; rank pages by layers x width: {pools}"
    table.add_row("adapter bank", as_size(plan.bank_bytes), bank)
    table.add_row("adapters in RAM", as_size(plan.host_cache_bytes), "at most")
    table.add_row("adapters on disk", as_size(plan.disk_cache_bytes), "at most")
    kinds = ", ".join(_shape_name(shape) for shape in plan.shapes)
    table.add_row("executables", "", f"{len(plan.shapes)}: {kinds}")
    return table


def _device(plan: MemoryPlan) -> tuple[str, str]:
    if plan.device_bytes is None:
        return "", plan.platform
    taken = plan.weight_bytes + plan.kv_bytes + plan.bank_bytes + plan.row_bytes
    free = plan.device_bytes - taken
    return as_size(plan.device_bytes), f"{plan.platform}; {as_size(free)} left for computing"


def _shape_name(shape: StepShape) -> str:
    kind = "score" if shape.scores else "decode" if shape.is_decode else "extend"
    reach = {LoraReach.NONE: " without adapters", LoraReach.ATTENTION: " with attention's"}
    return f"{kind} {shape.num_tokens}{reach.get(shape.lora, '')}"
