"""What a training would take, without training: counts, and bytes as the compiler plans them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jlorax.training.config import TrainConfig
from jlorax.training.examples import DataReport
from jlorax.training.lora import initial_adapter
from jlorax.training.optimizer import make_optimizer
from jlorax.training.preparation import Prepared, outlined
from jlorax.training.step import Rows, TrainState, make_step

_PROBE = 2048  # rows and columns of the product by which the machine's speed is guessed
_EFFICIENCY = 0.5  # of that speed, what a whole step reaches: 0.45 to 0.6 on CPUs and an H100


@dataclass(frozen=True)
class TrainPlan:
    """``scratch_bytes``: what a step needs for a while, by the compiler's account. ``seconds``: a
    guess from one matrix product, good for a factor of two; compiling is not in it."""

    data: DataReport
    num_parameters: int
    num_steps: int
    steps_per_epoch: int
    num_tokens: int  # of all steps, without padding
    padding: float  # share of the rows' places
    weight_bytes: int
    state_bytes: int
    scratch_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes + self.scratch_bytes


def plan(config: TrainConfig, cache_dir: Path) -> TrainPlan:
    """Reads the data and the base's config, compiles the step, trains nothing."""
    prepared = outlined(config, cache_dir)
    state, rows = abstract_state(prepared), abstract_rows(prepared)
    compiled = compiled_step(prepared, state, rows)
    tokens_per_epoch = prepared.data.report.num_tokens
    epochs = prepared.num_steps / prepared.steps_per_epoch
    places = rows.tokens.size * prepared.steps_per_epoch
    flops = prepared.forward.base.num_parameters * 4 * places * epochs
    return TrainPlan(
        data=prepared.data.report,
        num_parameters=prepared.shape.num_parameters,
        num_steps=prepared.num_steps,
        steps_per_epoch=prepared.steps_per_epoch,
        num_tokens=round(tokens_per_epoch * epochs),
        padding=max(0.0, 1 - tokens_per_epoch / places),
        weight_bytes=prepared.forward.base.size_bytes,
        state_bytes=_bytes(state),
        scratch_bytes=_scratch_bytes(compiled),
        seconds=flops / (_EFFICIENCY * _flops_per_s()),
    )


def abstract_state(prepared: Prepared) -> TrainState:
    """The state's shapes."""
    optimizer = make_optimizer(prepared.config.optimizer, prepared.num_steps)

    def initial() -> TrainState:
        adapter = initial_adapter(prepared.shape, 0)
        return TrainState(adapter, optimizer.init(adapter), jnp.int32(0))

    return jax.eval_shape(initial)


def abstract_rows(prepared: Prepared) -> Rows:
    """A full step's shapes; without packing, of the longest rows that there may be."""
    run, length = prepared.config.run, prepared.config.data.max_seq_len
    size = run.accumulation, run.batch_size, length
    places = run.accumulation, prepared.max_targets
    shapes: Sequence[tuple[int, ...]] = (size, size, size, places, places)
    return Rows(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))  # type: ignore[arg-type]


def compiled_step(prepared: Prepared, state: TrainState, rows: Rows) -> jax.stages.Compiled:
    optimizer = make_optimizer(prepared.config.optimizer, prepared.num_steps)
    step = make_step(prepared.forward, optimizer, prepared.config.run.seed)
    leaves = prepared.forward.base.leaves
    return jax.jit(step, donate_argnums=0).lower(state, leaves, rows).compile()


def _scratch_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend's compiler tells no memory"
    return analysis.temp_size_in_bytes


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _flops_per_s() -> float:
    """Of one large product in the type that the device is made for."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    x = jnp.ones((_PROBE, _PROBE), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    begun_s = time.monotonic()
    for _ in range(3):
        last = product(x, x)
    last.block_until_ready()
    return 3 * 2 * _PROBE**3 / (time.monotonic() - begun_s)
