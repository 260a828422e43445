"""Owns every array on the device and runs steps. One thread calls it; nothing here awaits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlorax.device import executables
from jlorax.device.executables import ExecutableStore
from jlorax.device.lora_bank import empty_bank, make_writer
from jlorax.device.row_writer import RowWriter
from jlorax.device.step import StepOutput, empty_rows, make_step, step_arguments
from jlorax.layout import (
    BankLayout,
    PoolKey,
    RowWrites,
    SlotWrite,
    StepLayout,
    StepShape,
)
from jlorax.models.config import ModelConfig
from jlorax.models.weights import BaseModel
from jlorax.types import Progress, no_progress
from pallas_kernels.grouped_lora.api import Implementation

_NO_WRITES = RowWrites()


@dataclass(frozen=True)
class DeviceSizes:
    """How much of everything there is."""

    max_batch: int  # rows
    num_pages: int  # KV pages, page 0 (for padding) included
    page_size: int  # tokens
    max_pages_per_sequence: int
    num_slots: int
    pool_pages: Mapping[PoolKey, int]  # LoRA pages a pool, the zero page included


@dataclass(frozen=True)
class HostScores:
    """A step's StepScores, read."""

    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray
    hidden_sums: np.ndarray


@dataclass(frozen=True)
class HostOutput:
    """A StepOutput, read; with its alternatives if anybody wants them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None
    scores: HostScores | None = None  # if anybody wants them


class Device:
    def __init__(
        self,
        model: BaseModel,
        bank_layout: BankLayout,
        sizes: DeviceSizes,
        shapes: Sequence[StepShape],
        implementation: Implementation,
        store: ExecutableStore,
        progress: Progress = no_progress,
    ) -> None:
        """Allocates KV pool and bank, and readies one executable per shape.

        ``implementation``: who computes; packed shapes are Pallas', tiled ones XLA's.
        ``store``: ``step_store``'s, made for the same.
        """
        self._leaves = model.leaves
        self._pools = empty_kv_pools(model, sizes)
        self._bank = empty_bank(bank_layout, sizes.num_slots, sizes.pool_pages)
        self._rows = empty_rows(sizes.max_batch, model.config.shape.vocab_size)
        self._steps = self._ready_steps(
            model, bank_layout, sizes, shapes, implementation, store, progress
        )
        self._writer = make_writer(self._bank, bank_layout, store, implementation)
        self._bank = self._writer.warm_up(self._bank)
        self._row_writer = RowWriter(self._rows, store)
        self._rows = self._row_writer.warm_up(self._rows)
        self._warm_up(shapes, sizes, progress)
        self.num_compiled = store.num_compiled
        self.num_loaded = store.num_loaded
        self._compiled_before = executables.num_compiled()

    @property
    def num_compiled_after_ready(self) -> int:
        """0, or the promise that no request waits for a compiler is broken."""
        return executables.num_compiled() - self._compiled_before

    def _ready_steps(
        self,
        model: BaseModel,
        bank_layout: BankLayout,
        sizes: DeviceSizes,
        shapes: Sequence[StepShape],
        implementation: Implementation,
        store: ExecutableStore,
        progress: Progress,
    ) -> dict[StepShape, Any]:
        def lowering(shape: StepShape) -> Any:
            layout = StepLayout(shape, sizes.max_pages_per_sequence)
            step = jax.jit(
                make_step(model, bank_layout, layout, implementation), donate_argnums=(1, 2)
            )
            arguments = step_arguments(model, self._pools, self._rows, self._bank, layout)
            return lambda: step.lower(*arguments)

        ready = store.get_all(((_name(shape), lowering(shape)) for shape in shapes), progress)
        return {shape: ready[_name(shape)] for shape in shapes}

    def _warm_up(self, shapes: Sequence[StepShape], sizes: DeviceSizes, progress: Progress) -> None:
        """Runs every step once on padding: a first run takes up to a second more than the next."""
        for i, shape in enumerate(shapes):
            layout = StepLayout(shape, sizes.max_pages_per_sequence)
            packed, _ = layout.blank(sizes.max_batch, sizes.num_slots)
            read(self.launch(shape, packed))
            progress("warming up", (i + 1) / len(shapes))

    def launch(
        self, shape: StepShape, packed: np.ndarray, writes: RowWrites = _NO_WRITES
    ) -> StepOutput:
        """Starts a step and returns at once; ``packed`` as StepLayout lays it out. ``writes`` come
        before it, and stay."""
        self._rows = self._row_writer.write(self._rows, writes)
        self._pools, self._rows, output = self._steps[shape](
            self._leaves, self._pools, self._rows, self._bank, packed
        )
        return output

    def write_slot(self, write: SlotWrite) -> None:
        """Makes an adapter resident; steps launched later see it."""
        self._bank = self._writer.write(self._bank, write)

    def temp_bytes(self) -> dict[StepShape, int]:
        """Scratch memory of every executable, as the compiler reports it."""
        return {
            shape: executable.memory_analysis().temp_size_in_bytes
            for shape, executable in self._steps.items()
        }


def step_store(
    folder: Path | None,
    model: ModelConfig,
    dtype: str,
    bank_layout: BankLayout,
    sizes: DeviceSizes,
    shapes: Sequence[StepShape],
    implementation: Implementation,
) -> ExecutableStore:
    """The store for a Device of these, already loading the steps that it has."""
    store = ExecutableStore(folder, repr((model, dtype, bank_layout, sizes, implementation)))
    store.begin_loading(map(_name, shapes))
    return store


def _name(shape: StepShape) -> str:
    return repr(shape)


def read(output: StepOutput, *, alternatives: bool = False, scores: bool = False) -> HostOutput:
    """Waits for a step and copies what it chose. Called from a thread of its own."""
    return HostOutput(
        tokens=np.asarray(output.tokens),
        logprobs=np.asarray(output.logprobs),
        top_tokens=np.asarray(output.top_tokens) if alternatives else None,
        top_logprobs=np.asarray(output.top_logprobs) if alternatives else None,
        scores=HostScores(*map(np.asarray, output.scores)) if scores and output.scores else None,
    )


def empty_kv_pools(model: BaseModel, sizes: DeviceSizes) -> list[jax.Array]:
    """One [P, 2, K, page_size, h] array a layer."""
    s = model.config.shape
    dims = (sizes.num_pages, 2, s.num_kv_heads, sizes.page_size, s.head_dim)
    return [jnp.zeros(dims, model.dtype) for _ in range(s.num_layers)]
