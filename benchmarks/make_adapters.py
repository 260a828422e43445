"""Writes random LoRA adapters, seeded, as PEFT saves them: for measuring speed, not for answers.

lora_B is not zero, so that an adapter which is left out changes the tokens. No torch needed.
Numbers are drawn once and every tensor is a window into them, at an offset of its own: so 64
adapters of a 7B model (2 GB in bfloat16) take as long as writing them does.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jlorax.models.config import read_config
from jlorax.models.embedded import ensure_embedded_model
from jlorax.types import Projection

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_NUM_OFFSETS = 1 << 20
_B_STD = 0.02  # with alpha = 2 r: a few percent of the base weights, as after a short training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("num", type=int, metavar="N", help="how many adapters")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="one folder each")
    parser.add_argument(
        "--rank", type=_ranks, default=(16,), metavar="R[,R]", help="several: in turn (16)"
    )
    parser.add_argument(
        "--targets", nargs="+", default=ATTENTION, metavar="NAME", help="projections (q,k,v,o)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="base model (the embedded one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(float32)")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    model = arguments.model or ensure_embedded_model(default_cache_dir())
    folders = make_adapters(
        model,
        arguments.out,
        arguments.num,
        ranks=arguments.rank,
        targets=arguments.targets,
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
    print(f"{len(folders)} adapters in {arguments.out}")
    return 0


def default_cache_dir() -> Path:
    """Where ``jlorax serve`` keeps the prepared model too."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jlorax"


def make_adapters(
    model: Path,
    out: Path,
    num: int,
    *,
    ranks: Sequence[int] = (16,),
    targets: Sequence[str] = ATTENTION,
    seed: int = 0,
    dtype: str = "float32",
) -> list[Path]:
    """``num`` PEFT folders below ``out``, ranks in turn. Adapter i is the same whatever ``num``."""
    projections = _targeted(read_config(model).projections(), targets)
    numbers = _Numbers(projections, max(ranks), seed, DTYPES[dtype])
    folders = []
    for i in range(num):
        folder = out / f"adapter-{i:04d}"
        rank = ranks[i % len(ranks)]
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(projections, rank, numbers, np.random.default_rng((seed, i)))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(_config(rank, targets), indent=2))
        folders.append(folder)
    return folders


def _targeted(projections: tuple[Projection, ...], targets: Sequence[str]) -> list[Projection]:
    by_name = {p.name: p for p in projections}
    unknown = [name for name in targets if name not in by_name]
    if unknown:
        raise SystemExit(f"unknown targets {unknown}; this model has: {', '.join(by_name)}")
    return [by_name[name] for name in targets]


class _Numbers:
    """Random numbers, as many as the largest tensor takes from its offset on."""

    def __init__(
        self, projections: Sequence[Projection], max_rank: int, seed: int, dtype: np.dtype
    ) -> None:
        count = _NUM_OFFSETS + max_rank * max(max(p.d_in, p.d_out) for p in projections)
        random = np.random.default_rng(seed)
        uniform = random.random(count, np.float32) * 2 - 1
        widths = {p.d_in for p in projections}
        self._a = {d_in: (uniform * np.float32(d_in**-0.5)).astype(dtype) for d_in in widths}
        self._b = (random.standard_normal(count, np.float32) * np.float32(_B_STD)).astype(dtype)

    def a(self, d_in: int, rank: int, offset: int) -> np.ndarray:
        """[r, d_in], uniform +-1/sqrt(d_in) as PEFT draws it."""
        return self._a[d_in][offset : offset + rank * d_in].reshape(rank, d_in)

    def b(self, d_out: int, rank: int, offset: int) -> np.ndarray:
        """[d_out, r], normal."""
        return self._b[offset : offset + d_out * rank].reshape(d_out, rank)


def _tensors(
    projections: Sequence[Projection], rank: int, numbers: _Numbers, random: np.random.Generator
) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for p in projections:
        for layer in range(p.num_layers):
            key = f"base_model.model.{p.module(layer)}"
            at_a, at_b = random.integers(_NUM_OFFSETS, size=2).tolist()
            tensors[f"{key}.lora_A.weight"] = numbers.a(p.d_in, rank, at_a)
            tensors[f"{key}.lora_B.weight"] = numbers.b(p.d_out, rank, at_b)
    return tensors


def _config(rank: int, targets: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
    }


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
