"""Tokens of a server while it trains an adapter, beside the same load while it does not.

``jlorax serve`` in a process, N streams that never pause, and a job that a client queues; each
round measures the load alone, then beside the training once its first steps are done.

  gap = time between two events of one stream;  ratio = p99 gap beside / p99 gap alone
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks import environment
from benchmarks.clock import Clock
from benchmarks.constraints import write_model
from benchmarks.http_processes import ServeProcess
from benchmarks.http_streaming import setting
from benchmarks.make_adapters import default_cache_dir
from benchmarks.shapes import SHAPES
from benchmarks.text_table import text_table
from jlorax.client import AsyncClient
from jlorax.client_fine_tuning import AsyncFinetuneJob
from jlorax.models.config import read_config
from jlorax.models.embedded import ensure_embedded_model
from jlorax.training.events import StepDone

TARGET_RATIO = {"cpu": 2.5, "gpu": 1.5}
_START_DEADLINE_S = 1200.0
_WARM_STEPS = 2  # of a training, before the load beside it is measured
_NUM_OUT = 256
_MANY_EPOCHS = 10_000  # the measurement ends it, not the data


@dataclass(frozen=True)
class Phase:
    """What was seen in one stretch of time; ``steps_per_s`` of the training, 0 without one."""

    name: str
    round: int
    gaps_ms: tuple[float, ...]
    seconds: float
    steps_per_s: float = 0.0

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.gaps_ms, percent))

    def summary(self) -> dict[str, object]:
        percentiles = {f"p{percent}_ms": self.percentile(percent) for percent in (50, 90, 99)}
        return {
            "name": self.name,
            "round": self.round,
            "num_gaps": len(self.gaps_ms),
            "longest_ms": max(self.gaps_ms),
            "seconds": self.seconds,
            "steps_per_s": self.steps_per_s,
            **percentiles,
        }

    def row(self) -> list[str]:
        shown = (self.percentile(50), self.percentile(99), max(self.gaps_ms))
        tokens_per_s = len(self.gaps_ms) / self.seconds
        return [
            f"{self.round} {self.name}",
            *(f"{ms:.1f}" for ms in shown),
            f"{tokens_per_s:.0f}",
            f"{self.steps_per_s:.2f}",
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), help="random weights (default: the embedded model)")
    add("--tokenizer", type=Path, metavar="DIR", help="for a shape (the embedded model's)")
    add("--streams", type=int, default=8, metavar="N", help="(8)")
    add("--seconds", type=float, default=30.0, metavar="S", help="of each phase (30)")
    add("--rounds", type=int, default=2, metavar="N", help="(2)")
    add("--rank", type=int, default=16, metavar="N", help="of the trained adapter (16)")
    add("--batch-size", type=int, default=1, metavar="N", help="rows of a training step (1)")
    add("--length", type=int, default=256, metavar="N", help="tokens of such a row (256)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the server")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="keeps executables")
    add("--commit", help="what is measured, where there is no git to ask")
    add("--out", type=Path, metavar="FILE", help="append the results to this JSONL file")


def main(arguments: argparse.Namespace) -> int:
    clock = Clock(None)
    with tempfile.TemporaryDirectory(prefix="jlorax-benchmark-") as name:
        scratch = Path(name)
        settings = _settings(arguments, _model(arguments, scratch), scratch)
        clock.say("starting jlorax serve")
        with ServeProcess(settings, scratch / "serve.log", _START_DEADLINE_S) as server:
            clock.say(f"ready after {server.ready_s:.1f} s")
            phases = asyncio.run(_rounds(arguments, server.url, clock))
    _show(arguments, phases)
    return 0


def _model(arguments: argparse.Namespace, scratch: Path) -> Path:
    if arguments.shape is None:
        return ensure_embedded_model(arguments.cache_dir)
    tokenizer = arguments.tokenizer or ensure_embedded_model(arguments.cache_dir)
    folder = write_model(arguments.shape, tokenizer, scratch / "model")
    write_random_weights(folder)
    return folder


def write_random_weights(folder: Path) -> None:
    """bfloat16, a file a layer, of the Llama that the folder's config.json describes."""
    draw = np.random.default_rng(0)
    noise = (0.02 * draw.standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)
    places: dict[str, str] = {}
    for number, shapes in enumerate(_shapes(folder)):
        tensors = {
            name: np.resize(noise, shape) if len(shape) == 2 else np.ones(shape, noise.dtype)
            for name, shape in shapes.items()
        }
        file = f"model-{number:03}.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def _shapes(folder: Path) -> Iterator[dict[str, tuple[int, ...]]]:
    """Of all tensors, a layer at a time; those outside of layers last."""
    config = json.loads((folder / "config.json").read_text())
    d, vocab_size = config["hidden_size"], config["vocab_size"]
    projections = read_config(folder).projections()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        yield {f"{prefix}.{norm}.weight": (d,) for norm in norms} | {
            f"{p.module(layer)}.weight": (p.d_out, p.d_in) for p in projections if not p.is_output
        }
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    yield {"model.norm.weight": (d,), **dict.fromkeys(ends, (vocab_size, d))}


def _settings(arguments: argparse.Namespace, model: Path, scratch: Path) -> Mapping[str, str]:
    root = scratch / "adapters"
    root.mkdir()
    return {
        "model": str(model),
        "cache_dir": str(arguments.cache_dir),
        "adapter_root": str(root),
        "files_dir": str(scratch / "files"),
        **dict(setting(text) for text in arguments.set),
    }


# ---- phases


async def _rounds(arguments: argparse.Namespace, url: str, clock: Clock) -> list[Phase]:
    phases: list[Phase] = []
    async with Streams(url, arguments.streams) as streams, AsyncClient(url) as client:
        await streams.watch(5.0)  # what is compiled or read once
        for number in range(1, arguments.rounds + 1):
            gaps_ms = await streams.watch(arguments.seconds)
            phases.append(Phase("alone", number, gaps_ms, arguments.seconds))
            clock.say(" ".join(phases[-1].row()))
            job = await _started(client, arguments, number)
            phases.append(await _beside(streams, job, arguments.seconds, number))
            clock.say(" ".join(phases[-1].row()))
    return phases


async def _started(
    client: AsyncClient, arguments: argparse.Namespace, number: int
) -> AsyncFinetuneJob:
    rows = [{"text": f"{number} {i} " + "the way of an adapter " * 100} for i in range(64)]
    return await client.start_finetune(
        rows,
        name=f"beside{number}",
        rank=arguments.rank,
        epochs=_MANY_EPOCHS,
        batch_size=arguments.batch_size,
        max_seq_len=arguments.length,
        validation_fraction=0,
        checkpoint_every_steps=1_000_000,
    )


async def _beside(streams: Streams, job: AsyncFinetuneJob, seconds: float, number: int) -> Phase:
    """Measures while the job trains, from its ``_WARM_STEPS``-th step on; then cancels it."""
    num_steps = 0
    warm = asyncio.Event()

    async def count() -> None:
        nonlocal num_steps
        async with aclosing(job.watch()) as events:
            async for event in events:
                num_steps += isinstance(event, StepDone)
                if num_steps >= _WARM_STEPS:
                    warm.set()

    counting = asyncio.create_task(count())
    waiting = asyncio.create_task(warm.wait())
    await asyncio.wait([counting, waiting], return_when=asyncio.FIRST_COMPLETED)
    if not warm.is_set():
        raise RuntimeError(f"the training ended: {await job.state()}")
    before = num_steps
    gaps_ms = await streams.watch(seconds)
    steps_per_s = (num_steps - before) / seconds
    await job.cancel()
    await counting
    return Phase("beside a training", number, gaps_ms, seconds, steps_per_s)


class Streams:
    """``num`` streams over HTTP, each followed by its next; their gaps are kept on demand."""

    def __init__(self, url: str, num: int) -> None:
        self._url = url
        self._num = num
        self._gaps_ms: list[float] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(self._num)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._session.close()

    async def watch(self, seconds: float) -> tuple[float, ...]:
        """The gaps of all streams from now on."""
        gaps_ms: list[float] = []
        self._gaps_ms = gaps_ms
        done, _ = await asyncio.wait(self._tasks, timeout=seconds)
        self._gaps_ms = None
        for task in done:
            task.result()
            raise RuntimeError("a stream ended")
        return tuple(gaps_ms)

    async def _stream(self, number: int) -> None:
        body = {
            "prompt": f"Stream {number}: what a server says while it learns.",
            "model": "",
            "max_tokens": _NUM_OUT,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        while True:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                last_s = None
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now_s = time.perf_counter()
                    if last_s is not None and self._gaps_ms is not None:
                        self._gaps_ms.append(1e3 * (now_s - last_s))
                    last_s = now_s


# ---- the end


def _show(arguments: argparse.Namespace, phases: list[Phase]) -> None:
    headings = ["phase", "gap p50 ms", "p99", "longest", "tokens/s", "steps/s"]
    print(text_table(headings, [phase.row() for phase in phases]))
    pairs = list(zip(phases[::2], phases[1::2], strict=True))
    ratios = {
        percent: statistics.median(b.percentile(percent) / a.percentile(percent) for a, b in pairs)
        for percent in (50, 99)
    }
    card = environment.card()
    target = TARGET_RATIO["cpu" if card["driver"] == "none" else "gpu"]
    print(f"p99 gap {ratios[99]:.2f} x (at most {target} x), p50 {ratios[50]:.2f} x")
    if arguments.out is not None:
        _append(arguments, phases, ratios, card)


def _append(
    arguments: argparse.Namespace,
    phases: list[Phase],
    ratios: Mapping[int, float],
    card: Mapping[str, str],
) -> None:
    record = {
        "benchmark": "beside-training",
        "command": environment.command(),
        "commit": arguments.commit or environment.commit(),
        "machine": environment.machine(),
        **card,
        "versions": environment.versions("optax"),
        "figures": __doc__,
        "phases": [phase.summary() for phase in phases],
        "ratios": {f"p{percent}": ratio for percent, ratio in ratios.items()},
    }
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
