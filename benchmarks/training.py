"""Training a LoRA beside peft and transformers: tokens/s, FLOPs utilisation, memory, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.text_table import text_table
from benchmarks.training_contestants import Work
from jlorax.training.process import environment as environment_of_a_training

CONTESTANTS = ("jlorax", "peft")
TARGET_RATIO = {"cpu": 1.0, "gpu": 1.5}  # times peft's tokens/s
_PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12}  # bf16, dense: NVIDIA's data sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--targets", type=int, help="learnt tokens a row (all but the first)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-recompute", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file")


def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        work = _work(arguments, Path(scratch))
        runs = [
            {"contestant": name, "round": number, **_run(name, work)}
            for number in range(arguments.rounds)
            for name in arguments.contestants
        ]
    flops = flops_per_token(json.loads(_config_text(arguments)), work.length)
    card = environment.card()
    rows = [_row(name, runs, work, flops, card["card"]) for name in arguments.contestants]
    headings = ["contestant", "tokens/s", "utilisation", "peak GiB", "ready s", "first loss"]
    print(text_table(headings, rows))
    _say_ratio(runs, work, "cpu" if card["driver"] == "none" else "gpu")
    if arguments.out:
        _append(arguments.out, runs, work, card)
    return 0


def flops_per_token(config: dict[str, Any], length: int) -> float:
    """Of the model, what cannot be left out: 2 a weight forwards and 2 backwards (frozen weights
    need no gradient of their own), and attention's products, of which causality needs half.

    What is computed a second time to save memory does not count. Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B, without the weights' gradients.
    """
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    weights = layers * (d * (q + 2 * kv) + q * d + 3 * d * config["intermediate_size"])
    weights += d * config["vocab_size"]
    attention = layers * 2 * 2 * q * length / 2
    return float(2 * 2 * weights + 3 * attention)


def _work(arguments: argparse.Namespace, scratch: Path) -> Work:
    shape = arguments.shape
    folder = _embedded() if shape is None else write_shape(shape, scratch / "model")
    targets = arguments.length - 1 if arguments.targets is None else arguments.targets
    return Work(
        folder=str(folder),
        dummy=shape is not None,
        dtype=arguments.dtype or ("float32" if shape is None else "bfloat16"),
        batch=arguments.batch,
        length=arguments.length,
        num_targets=targets,
        num_steps=arguments.steps,
        recompute=not arguments.no_recompute,
        threads=environment.num_cores(),
    )


def _embedded() -> Path:
    import os

    from jlorax.defaults import default_cache_dir
    from jlorax.models.embedded import ensure_embedded_model

    return ensure_embedded_model(default_cache_dir(os.environ))


def _config_text(arguments: argparse.Namespace) -> str:
    if arguments.shape is not None:
        return json.dumps(dict(SHAPES[arguments.shape]))
    return (_embedded() / "config.json").read_text()


def _run(name: str, work: Work) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training_contestants", name]
    # each in the environment in which its users have it
    own = environment_of_a_training() if name == "jlorax" else None
    done = subprocess.run(
        [*command, json.dumps(asdict(work))],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=own,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with status {done.returncode}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _tokens_per_s(name: str, runs: list[dict[str, Any]], work: Work) -> float:
    seconds = [s for run in runs if run["contestant"] == name for s in run["seconds"]]
    return work.batch * work.length / float(statistics.median(seconds))


def _row(name: str, runs: list[dict[str, Any]], work: Work, flops: float, card: str) -> list[str]:
    own = [run for run in runs if run["contestant"] == name]
    speed, peak = _tokens_per_s(name, runs, work), _PEAK_FLOPS.get(card)
    memory = own[-1]["peak_bytes"]
    return [
        name,
        f"{speed:,.0f}",
        "-" if peak is None else f"{speed * flops / peak:.1%}",
        "-" if memory is None else f"{memory / 2**30:.1f}",
        f"{own[-1]['ready_s']:.0f}",
        f"{own[-1]['losses'][0]:.4f}",
    ]


def _say_ratio(runs: list[dict[str, Any]], work: Work, where: str) -> None:
    if {run["contestant"] for run in runs} != set(CONTESTANTS):
        return
    ratio = _tokens_per_s("jlorax", runs, work) / _tokens_per_s("peft", runs, work)
    print(f"{ratio:.2f} x peft's tokens/s (target {TARGET_RATIO[where]} x)")


def _append(path: Path, runs: list[dict[str, Any]], work: Work, card: dict[str, str]) -> None:
    about = {
        "benchmark": "training",
        "command": environment.command(),
        "commit": environment.commit(),
        **environment.machine(),
        **card,
        "versions": environment.versions("torch", "transformers", "peft", "optax"),
        "work": {**asdict(work), "folder": Path(work.folder).name},
    }
    with path.open("a", encoding="utf-8") as file:
        for run in runs:
            file.write(json.dumps({**about, **run}) + "\n")
