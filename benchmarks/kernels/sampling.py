"""Choosing tokens: our kernel, a program a row, beside XLA's filters one after the other.

What is left of one call moves the next one's points; the small kernel that moves them is the "empty
chain". A call's operands are a step's: logits that the head's product just wrote, and the same
penalised and divided by the temperature.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.protocol import READ_TB_PER_S, Built, Contestant, KernelCase
from benchmarks.kernels.results import EMPTY, OURS
from pallas_kernels.sampling import pallas_triton, reference, tuning, xla
from pallas_kernels.sampling.operands import RowParameters, Sampled
from pallas_kernels.sampling.tuning import Tuning

ROWS, VOCAB_SIZES = (1, 8, 64, 256), (32000, 128256)
NUM_LAYERS = 4
NUM_CHECKED = 4  # rows, which the reference sorts
MOST = 20  # alternatives
TEMPERATURE = 0.8
# 6 % of a greedy step of Llama-2-7B, in microseconds
TARGETS_US = {(1, 32000): 320.0, (8, 32000): 340.0, (64, 32000): 500.0, (256, 32000): 1160.0}

Asked = dict[str, float]  # of every row; the rest is off
Sample = Callable[[jax.Array, jax.Array, RowParameters], Sampled]
_barrier: Callable[[Any], Any] = jax.lax.optimization_barrier

OFF: Asked = {
    "is_greedy": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "num_alternatives": 0,
}
ASKED: Mapping[str, Asked] = {
    "greedy": {"is_greedy": 1},
    "no filter": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "all filters": {"top_k": 500, "top_p": 0.97, "min_p": 0.001, "typical_p": 0.9},
    "top_p 0.95, 20 alternatives": {"top_p": 0.95, "num_alternatives": 20},
}


def cases() -> list[KernelCase]:
    return [
        _case(name, rows, vocab_size)
        for vocab_size in VOCAB_SIZES
        for rows in ROWS
        for name in ASKED
    ]


def sweep() -> list[KernelCase]:
    """A vocabulary takes one tuning for every number of rows: the best by all of its cases."""
    return [
        _case("top_p 0.95", rows, vocab_size, is_sweep=True)
        for vocab_size in VOCAB_SIZES
        for rows in (1, 64, 256)
    ]


def _case(name: str, rows: int, vocab_size: int, is_sweep: bool = False) -> KernelCase:
    floor_us = 2 * 4 * rows * vocab_size / READ_TB_PER_S * 1e-6
    build = functools.partial(_built, OFF | ASKED[name], rows, vocab_size, is_sweep)
    title = f"{name}, {rows} rows, V {vocab_size}"
    return KernelCase("sampling", title, floor_us, TARGETS_US.get((rows, vocab_size)), build)


def _built(asked: Asked, rows: int, vocab_size: int, is_sweep: bool) -> Built:
    layers = tuple(_operands(seed, rows, vocab_size) for seed in range(NUM_LAYERS))
    parameters = _parameters(asked, rows)
    contestants = [
        _contestant(name, sample, layers, parameters)
        for name, sample in _samples(vocab_size, is_sweep).items()
    ]
    if not is_sweep:
        contestants.append(
            Contestant(f"{EMPTY} chain", NUM_LAYERS, _empty_chain, (layers, parameters))
        )
    return Built(tuple(contestants), _wanted(layers[0], parameters), tolerance=1e-4)


def _samples(vocab_size: int, is_sweep: bool) -> dict[str, Sample]:
    """The candidates of a sweep are named by their line in tuning.py."""

    def ours(tuned: Tuning) -> Sample:
        return functools.partial(pallas_triton.sample, max_alternatives=MOST, tuning=tuned)

    if is_sweep:
        return {_line(t, vocab_size): ours(t) for t in tuning.candidates(vocab_size)}
    return {
        OURS: ours(tuning.choose(tuning.H100, vocab_size)),
        "xla": functools.partial(xla.sample, max_alternatives=MOST),
    }


def _line(tuned: Tuning, vocab_size: int) -> str:
    numbers = ", ".join(str(number) for number in dataclasses.astuple(tuned))
    return f"(H100, {tuning.bucket(vocab_size)}): Tuning({numbers})"


# Chains. ------------------------------------------------------------------------------------------


def _contestant(name: str, sample: Sample, layers: Any, parameters: RowParameters) -> Contestant:
    one: Sample = jax.jit(sample)  # traced and lowered once for all layers

    def chain(layers: Any, parameters: RowParameters) -> jax.Array:
        for logits, warm in layers:
            sampled = one(logits, warm, parameters)
            parameters = _moved(parameters, sampled.tokens, sampled.top_tokens[:, 0])
        return parameters.points

    def once() -> jax.Array:
        logits, warm = layers[0]
        return one(logits, warm, parameters).logprobs[:NUM_CHECKED]

    return Contestant(name, NUM_LAYERS, chain, (layers, parameters), once=once)


def _empty_chain(layers: Any, parameters: RowParameters) -> jax.Array:
    for logits, _ in layers:
        token = jax.lax.bitcast_convert_type(logits[:, 0], jnp.int32)
        parameters = _moved(parameters, token, token)
    return parameters.points


def _moved(parameters: RowParameters, tokens: jax.Array, others: jax.Array) -> RowParameters:
    """The next points, which depend on all that was chosen."""
    points = (parameters.points + 0.618 + 1e-9 * (tokens + others)) % 1.0
    return parameters._replace(points=_barrier(points))


# Operands. ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _operands(seed: int, rows: int, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """(logits, warm)."""
    logits = 3 * jax.random.normal(jax.random.key(seed), (rows, vocab_size))
    return logits, logits / TEMPERATURE


def _parameters(asked: Asked, rows: int) -> RowParameters:
    dtypes = {"is_greedy": jnp.bool_, "top_k": jnp.int32, "num_alternatives": jnp.int32}
    points = jax.random.uniform(jax.random.key(7), (rows,))
    filled = {
        name: jnp.full((rows,), value, dtypes.get(name, jnp.float32))
        for name, value in asked.items()
    }
    return RowParameters(**filled, points=points)


def _wanted(operands: tuple[jax.Array, jax.Array], parameters: RowParameters) -> jax.Array:
    """The log-probabilities of the first rows' tokens, which the reference sorts for."""
    logits, warm = (np.asarray(x[:NUM_CHECKED]) for x in operands)
    columns = {name: np.asarray(x[:NUM_CHECKED]) for name, x in parameters._asdict().items()}
    rows = [{name: float(x[i]) for name, x in columns.items()} for i in range(len(logits))]
    found = [reference.sample(*line) for line in zip(logits, warm, rows, strict=True)]
    return jnp.asarray([logprob for _, logprob in found], jnp.float32)
