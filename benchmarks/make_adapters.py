"""Writes random LoRA adapters, seeded, as PEFT saves them: for measuring speed, not for answers.

lora_B is not zero, so that an adapter which is left out changes the tokens. No torch needed.
Numbers are drawn once and every tensor is a window into them, at an offset of its own: so 64
adapters of a 7B model (2 GB in bfloat16) take as long as writing them does.

With hard links a few weight files serve any number of folders, each with a lora_alpha of its own:
versions that differ, at the cost of a small file each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.shapes import SHAPES, write_shape
from jlorax.models.config import read_config
from jlorax.models.embedded import ensure_embedded_model
from jlorax.types import Projection

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_WEIGHTS_FILE = "adapter_model.safetensors"
_NUM_OFFSETS = 1 << 20
_ALPHA_STEP = 1 / 1024  # exact in float32, and far below what alpha is
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
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--model", type=Path, metavar="DIR", help="base model (the embedded one)")
    base.add_argument("--shape", choices=tuple(SHAPES), help="of a well-known base model instead")
    parser.add_argument(
        "--hard-link",
        type=int,
        metavar="N",
        help="write N weight files, link the other folders to them; lora_alpha differs in each",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(float32)")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="jlorax-shape-") as name:
        folders = make_adapters(
            _base_model(arguments, Path(name)),
            arguments.out,
            arguments.num,
            ranks=arguments.rank,
            targets=arguments.targets,
            seed=arguments.seed,
            dtype=arguments.dtype,
            hard_link=arguments.hard_link,
        )
    print(f"{len(folders)} adapters in {arguments.out}")
    return 0


def _base_model(arguments: argparse.Namespace, folder: Path) -> Path:
    if arguments.shape is not None:
        return write_shape(arguments.shape, folder)
    return arguments.model or ensure_embedded_model(default_cache_dir())


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
    hard_link: int | None = None,
) -> list[Path]:
    """``num`` PEFT folders below ``out``, ranks in turn. Adapter i is the same whatever ``num``.

    ``hard_link`` N: folder i has the weights, and so the rank, of folder i modulo N.
    """
    if hard_link is not None and hard_link < 1:
        raise SystemExit(f"{hard_link} weight files are too few to link to")
    projections = _targeted(read_config(model).projections(), targets)
    numbers = _Numbers(projections, max(ranks), seed, DTYPES[dtype])
    folders = [out / f"adapter-{i:04d}" for i in range(num)]
    num_files = num if hard_link is None else min(num, hard_link)
    for i, folder in enumerate(folders):
        number = i % num_files
        rank = ranks[number % len(ranks)]
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / _WEIGHTS_FILE
        if i == number:
            tensors = _tensors(projections, rank, numbers, np.random.default_rng((seed, i)))
            weights.unlink(missing_ok=True)  # some safetensors would write through a link
            save_file(tensors, weights, {"format": "pt"})
        else:
            _link(folders[number] / _WEIGHTS_FILE, weights)
        alpha = 2 * rank if hard_link is None else 2 * rank + i * _ALPHA_STEP
        config = json.dumps(_config(rank, alpha, targets), indent=2)
        (folder / "adapter_config.json").write_text(config)
    return folders


def _link(target: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    name.hardlink_to(target)


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


def _config(rank: int, alpha: float, targets: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
    }


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
