"""A trained adapter as PEFT's folder, which peft and every server of PEFT adapters load; and base
and adapter as one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlorax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from jlorax.adapters.peft import PREFIX, LayerWeights, read_adapter
from jlorax.errors import ModelInvalid
from jlorax.models.atomic import new_folder
from jlorax.models.config import read_config
from jlorax.training.config import LoraConfig
from jlorax.training.lora import Adapter

RECORD_FILE = "training.json"


def peft_config(config: LoraConfig, base_name: str, targets: tuple[str, ...]) -> dict[str, Any]:
    """adapter_config.json; ``targets`` are the projections' names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.effective_alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(targets),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def write_peft(
    folder: Path,
    adapter: Adapter,
    config: Mapping[str, Any],
    card: str,
    record: Mapping[str, Any],
    dtype: str,
) -> None:
    """Weights in ``dtype``, named as PEFT saves them; config, model card, and how it was made."""
    tensors: dict[str, np.ndarray] = {}
    for module, weights in adapter.items():
        a, b = (np.asarray(matrix.astype(dtype)) for matrix in (weights.a, weights.b))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    _save(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / RECORD_FILE, record)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merge_into_base(base: Path, adapter: Path, out: Path) -> None:
    """base + adapter -> ``out``, a folder like the base's: W += scaling * B A, in float32.

    Shard by shard, each tensor in the base's own dtype. AdapterInvalid when they do not fit.
    """
    projections = read_config(base).projections()
    read = read_adapter(adapter, adapter.name, projections, max_rank=256)
    added: dict[str, LayerWeights] = {
        f"{projection.module(layer)}.weight": weights
        for projection in projections
        for layer, weights in read.weights.get(projection.name, {}).items()
    }
    with new_folder(out) as folder:
        for path in sorted(base.iterdir()):
            if path.suffix == ".safetensors":
                _merge_shard(path, folder / path.name, added)
            elif path.is_file():
                shutil.copyfile(path, folder / path.name)
        if added:
            names = ", ".join(sorted(added)[:3])
            raise ModelInvalid(f"{base}: has no tensors {names}: tied to others, or not its own")


def _merge_shard(source: Path, target: Path, added: dict[str, LayerWeights]) -> None:
    """Takes from ``added`` what this shard holds."""
    with safe_open(source, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in tensors.keys() & added.keys():
        weights, own = added.pop(name), tensors[name]
        delta = weights.b.astype(np.float32) @ weights.a.astype(np.float32)
        tensors[name] = (own.astype(np.float32) + weights.scaling * delta).astype(own.dtype)
    _save(tensors, target, metadata)


def _save(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None) -> None:
    """Readable by whom any new file is readable by: safetensors' own is for its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, above all
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)
