"""Prometheus' exposition text as the JSON that LoRAX makes of it for ``Accept: application/json``:
``{metric: {"type", "data": [{"key", "value"}]}}``. A key is the sample's whole name with labels, or
for one without labels "sum", "count" or "".
"""

from __future__ import annotations

from typing import Any

from jlorax.wire.strict_json import finite


def metrics_as_json(exposition: str) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    data: list[dict[str, Any]] = []
    for line in exposition.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ", 3)
            data = []
            metrics[name] = {"type": kind, "data": data}
        elif line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            data.append({"key": _key(sample), "value": finite(float(value))})
    return metrics


def _key(sample: str) -> str:
    if "{" in sample:
        return sample
    suffix = sample.rpartition("_")[2]
    return suffix if suffix in ("sum", "count") else ""
