"""Writes small adapters without torch, right or deliberately wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.packed_file import read_packed, write_packed
from jlorax.adapters.peft import Adapter, read_adapter
from jlorax.layout import BankLayout
from jlorax.types import Projection

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
BF16 = np.dtype(ml_dtypes.bfloat16)


def llama_projections(
    d: int = 16, kv: int = 8, ffn: int = 24, vocab: int = 40, num_layers: int = 2
) -> tuple[Projection, ...]:
    attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    sizes = {
        f"{attention}q_proj": (d, d),
        f"{attention}k_proj": (d, kv),
        f"{attention}v_proj": (d, kv),
        f"{attention}o_proj": (d, d),
        f"{mlp}gate_proj": (d, ffn),
        f"{mlp}up_proj": (d, ffn),
        f"{mlp}down_proj": (ffn, d),
    }
    layered = tuple(
        Projection(path.rpartition(".")[2], path, d_in, d_out, num_layers)
        for path, (d_in, d_out) in sizes.items()
    )
    return (*layered, Projection("lm_head", "lm_head", d, vocab, 1))


def falcon_projections(
    d: int = 16, qkv: int = 24, ffn: int = 64, vocab: int = 40, num_layers: int = 2
) -> tuple[Projection, ...]:
    block = "transformer.h.{layer}."
    return (
        Projection("query_key_value", f"{block}self_attention.query_key_value", d, qkv, num_layers),
        Projection("dense", f"{block}self_attention.dense", d, d, num_layers),
        Projection("dense_h_to_4h", f"{block}mlp.dense_h_to_4h", d, ffn, num_layers),
        Projection("dense_4h_to_h", f"{block}mlp.dense_4h_to_h", ffn, d, num_layers),
        Projection("lm_head", "lm_head", d, vocab, 1),
    )


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return {**base, **changes}


def tensors_for(
    modules: Mapping[str, int],
    projections: tuple[Projection, ...],
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Module's full name -> rank becomes its two tensors under PEFT's keys."""
    random = np.random.default_rng(seed)
    by_module = {p.module(n): p for p in projections for n in range(p.num_layers)}
    tensors: dict[str, np.ndarray] = {}
    for module, rank in modules.items():
        p = by_module[module]
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = random.normal(size=(rank, p.d_in)).astype(dtype)
        tensors[f"{key}.lora_B.weight"] = random.normal(size=(p.d_out, rank)).astype(dtype)
    return tensors


def modules_of(
    projections: tuple[Projection, ...], names: tuple[str, ...], rank: int
) -> dict[str, int]:
    return {p.module(n): rank for p in projections if p.name in names for n in range(p.num_layers)}


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Any = None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES.get(array.dtype.name, array.dtype.name),
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return raw_safetensors(json.dumps(header).encode(), body)


def raw_safetensors(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def write(folder: Path, config_values: Mapping[str, Any], weights: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config_values))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def write_good(
    folder: Path,
    projections: tuple[Projection, ...] = llama_projections(),
    names: tuple[str, ...] = ("q_proj", "v_proj"),
    rank: int = 4,
    seed: int = 0,
) -> Path:
    tensors = tensors_for(modules_of(projections, names, rank), projections, seed=seed)
    values = config(r=rank, target_modules=list(names))
    return write(folder, values, safetensors_bytes(tensors))


def layout(dtype: str = "float32", max_rank: int = 256, **sizes: int) -> BankLayout:
    return BankLayout(llama_projections(**sizes), dtype, max_rank)


def adapter(
    folder: Path,
    layout: BankLayout,
    ranks: Mapping[str, int],
    dtype: Any = np.float32,
    seed: int = 0,
) -> Adapter:
    """Written and read again; ``ranks``: module's full name -> rank."""
    tensors = tensors_for(ranks, layout.projections, dtype, seed)
    values = config(r=1, target_modules=list(ranks), rank_pattern=dict(ranks))
    write(folder, values, safetensors_bytes(tensors))
    return read_adapter(folder, "a", layout.projections, layout.max_rank)


def packed_bytes(packed: PackedAdapter, layout: BankLayout) -> bytes:
    """What its file holds."""
    file = io.BytesIO()
    assert write_packed(file, packed, layout) == len(file.getvalue())
    return file.getvalue()


def read_bytes(data: bytes, layout: BankLayout) -> PackedAdapter:
    return read_packed(io.BytesIO(data), layout)
