"""What bringing adapters to the device costs: alone, and to those who decode meanwhile.

alone     ms from RAM to the device with nothing else to do: a write, and the wait for it
upload    ms a step of a batch on the base model, while a visitor asks for one token RATE times a
          second: of the base model, of one adapter, or (distinct) each of one that is not on the
          device. What distinct has more than one is what an upload costs the others.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

import jax
import numpy as np

from benchmarks.report import Spread, spread
from jlorax.adapters.pack import pack
from jlorax.adapters.peft import read_adapter
from jlorax.adapters.placement import slot_write
from jlorax.adapters.slots import SlotTable
from jlorax.assembly import bank_layout, kernels
from jlorax.config import EngineConfig
from jlorax.device.executables import ExecutableStore
from jlorax.device.lora_bank import BankWriter, empty_bank, host_memory, make_writer
from jlorax.engine import Engine
from jlorax.layout import SlotWrite
from jlorax.models.config import read_config
from jlorax.models.lora import Bank
from jlorax.types import AdapterVersion, GenerateRequest

RATE_PER_S = 20.0
ROOM = 8  # visitors at once, beside the batch
NUM_SLOTS = 8  # at least; as many adapters more take turns in them
_PROMPT = tuple(range(1, 17))
_REPEATS = 20
_USABLE = re.compile(rb"^jlorax_adapter_load_seconds_count\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Alone:
    """ms a write: until its bank is ready, until the device's thread goes on; and of many in a
    row, each issued while the last is under way."""

    buffer_bytes: int
    idle_ms: Spread
    thread_ms: Spread
    in_a_row_ms: float

    def describe(self) -> str:
        return (
            f"upload alone: {self.buffer_bytes / 1e6:.1f} MB in {self.idle_ms.median:.2f} ms, "
            f"{self.in_a_row_ms:.2f} ms each in a row; the device's thread is free after "
            f"{self.thread_ms.median:.2f} ms"
        )

    def fields(self) -> dict[str, object]:
        return asdict(self)


def measure_alone(config: EngineConfig, folder: Path) -> Alone:
    """In a small bank of its own, before the engine is there."""
    layout = bank_layout(config, read_config(Path(str(config.model.model))))
    packed = pack(read_adapter(folder, folder.name, layout.projections, layout.max_rank), layout)
    packed = replace(packed, buffer=host_memory().keep(np.asarray(packed.buffer)))
    need = packed.need(layout)
    pool_pages = {pool: 1 + 2 * need.get(pool, 1) for pool in layout.pools}
    bank = empty_bank(layout, 2, pool_pages)
    with ExecutableStore(config.executable_dir, repr((layout, pool_pages))) as store:
        writer = make_writer(bank, layout, store, kernels(config))
    slots = SlotTable(2, pool_pages)
    places = [slots.assign(AdapterVersion("default", name, 1), need) for name in "ab"]
    writes = [slot_write(packed, place, layout) for place in places if place is not None]
    return _time_writes(writer, writer.warm_up(bank), writes)


def _time_writes(writer: BankWriter, bank: Bank, writes: Sequence[SlotWrite]) -> Alone:
    thread_s, idle_s = [], []
    _wait(bank)
    for _, write in zip(range(_REPEATS), cycle(writes), strict=False):
        start_s = time.perf_counter()
        bank = writer.write(bank, write)
        thread_s.append(time.perf_counter() - start_s)
        _wait(bank)
        idle_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    for _, write in zip(range(_REPEATS), cycle(writes), strict=False):
        bank = writer.write(bank, write)
    _wait(bank)
    row_s = time.perf_counter() - start_s
    return Alone(writes[0].buffer.nbytes, _ms(idle_s), _ms(thread_s), 1e3 * row_s / _REPEATS)


def _wait(bank: Bank) -> None:
    for array in jax.tree.leaves(bank):
        array.block_until_ready()


def _ms(seconds: Sequence[float]) -> Spread:
    return spread(1e3 * s for s in seconds)


def turns(kind: str, num_adapters: int) -> Iterator[str | None]:
    """Whom visitors ask, one after the other, without end."""
    if kind == "base":
        return cycle([None])
    return cycle(adapter_name(i) for i in range(1 if kind == "one" else num_adapters))


def adapter_name(number: int) -> str:
    return f"adapter-{number:04d}"


@asynccontextmanager
async def visitors(engine: Engine, adapters: Iterator[str | None]) -> AsyncIterator[None]:
    """Comes while the body runs; whoever is still there at its end is seen out."""
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        coming = tasks.create_task(_come(engine, adapters, ended, tasks))
        try:
            yield
        finally:
            ended.set()
            await coming


async def _come(
    engine: Engine, adapters: Iterator[str | None], ended: asyncio.Event, tasks: asyncio.TaskGroup
) -> None:
    next_s = time.perf_counter()
    while not ended.is_set():
        tasks.create_task(_visit(engine, next(adapters)))
        next_s += 1 / RATE_PER_S
        try:
            await asyncio.wait_for(ended.wait(), max(0.0, next_s - time.perf_counter()))
        except TimeoutError:
            continue


async def _visit(engine: Engine, adapter_id: str | None) -> None:
    request = GenerateRequest(
        prompt=_PROMPT,
        adapter_id=adapter_id,
        max_new_tokens=1,
        ignore_eos=True,
        detokenize=False,
    )
    async for _ in engine.generate(request):
        pass


def num_uploads(engine: Engine) -> int:
    """So far."""
    return sum(int(float(count)) for count in _USABLE.findall(engine.metrics()))


def gaps_ms(times_s: Sequence[Sequence[float]]) -> dict[str, float]:
    """p50 and p99 of the time between one answer's tokens, over all of them."""
    gaps = np.concatenate([np.diff(times) for times in times_s])
    return {f"itl_p{p}_ms": 1e3 * float(np.percentile(gaps, p)) for p in (50, 99)}
