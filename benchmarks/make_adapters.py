"""Writes random LoRA adapters, seeded, as PEFT saves them: for measuring speed, not for answers.

lora_B is not zero, so that an adapter which is left out changes the tokens. No torch needed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jlorax.models.config import read_config
from jlorax.models.embedded import ensure_embedded_model
from jlorax.types import Projection

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
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
) -> list[Path]:
    """``num`` PEFT folders below ``out``, ranks in turn. Adapter i is the same whatever ``num``."""
    projections = _targeted(read_config(model).projections(), targets)
    folders = []
    for i in range(num):
        folder = out / f"adapter-{i:04d}"
        rank = ranks[i % len(ranks)]
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(projections, rank, np.random.default_rng((seed, i)))
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


def _tensors(
    projections: Sequence[Projection], rank: int, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """A: f32[r, d_in], uniform +-1/sqrt(d_in) as PEFT draws it; B: f32[d_out, r], normal."""
    tensors: dict[str, np.ndarray] = {}
    for p in projections:
        for layer in range(p.num_layers):
            key = f"base_model.model.{p.module(layer)}"
            a = random.random((rank, p.d_in), np.float32) * 2 - 1
            b = random.standard_normal((p.d_out, rank), np.float32)
            tensors[f"{key}.lora_A.weight"] = a * np.float32(p.d_in**-0.5)
            tensors[f"{key}.lora_B.weight"] = b * np.float32(_B_STD)
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
