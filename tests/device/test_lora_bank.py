"""Adapters on their way into the bank: read back through the tables, and nothing else moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jlorax.adapters.pack import PackedAdapter, pack, page_views
from jlorax.adapters.peft import Adapter
from jlorax.adapters.placement import slot_write
from jlorax.adapters.slots import Assignment, SlotTable
from jlorax.device import executables
from jlorax.device.executables import ExecutableStore
from jlorax.device.lora_bank import (
    BankWriter,
    BufferWriter,
    LockedMemory,
    PageWriter,
    empty_bank,
    host_memory,
)
from jlorax.layout import BankLayout, PoolKey, SlotWrite, rank_pages
from jlorax.models.lora import Bank
from jlorax.types import AdapterVersion
from tests.adapters import helpers

NUM_SLOTS, POOL_PAGES, MAX_RANK = 3, 17, 32
# name -> module's full name -> rank: several in one pool, odd numbers of pages, layers that differ
ADAPTERS: Mapping[str, Mapping[str, int]] = {
    "wide": {
        "model.layers.0.self_attn.q_proj": 32,
        "model.layers.1.self_attn.k_proj": 17,
        "model.layers.0.mlp.down_proj": 24,
        "lm_head": 9,
    },
    "small": {"model.layers.1.self_attn.q_proj": 1},
    "mlp": {"model.layers.0.mlp.gate_proj": 23, "model.layers.1.mlp.up_proj": 8},
    "head": {"lm_head": 32},
    "attention": {f"model.layers.1.self_attn.{name}_proj": 16 for name in "qkvo"},
}


def bits(array: Any) -> np.ndarray:
    """For exact comparison, -0 and all."""
    return np.asarray(array).view(np.uint8)


def new_bank(layout: BankLayout) -> Bank:
    return empty_bank(layout, NUM_SLOTS, dict.fromkeys(layout.pools, POOL_PAGES))


@dataclass
class World:
    """A bank and its writer, and beside them what the bank must hold."""

    layout: BankLayout
    writer: BankWriter
    folder: Path
    bank: Bank = field(init=False)
    slots: SlotTable = field(init=False)
    pools: dict[PoolKey, np.ndarray] = field(init=False)
    resident: dict[str, tuple[Adapter, Assignment]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bank = new_bank(self.layout)
        self.slots = SlotTable(NUM_SLOTS, dict.fromkeys(self.layout.pools, POOL_PAGES))
        self.pools = {key: np.array(pool) for key, pool in self.bank.pools.items()}

    def packed(self, name: str) -> tuple[Adapter, PackedAdapter]:
        seed = list(ADAPTERS).index(name)
        adapter = helpers.adapter(self.folder / name, self.layout, ADAPTERS[name], seed=seed)
        return adapter, pack(adapter, self.layout)

    def prepare(self, name: str) -> SlotWrite:
        adapter, packed = self.packed(name)
        need = packed.need(self.layout)
        assignment = self.slots.assign(AdapterVersion("default", name, 1), need)
        assert assignment is not None
        for gone in assignment.evicted:
            del self.resident[gone.adapter_id]
        self.resident[name] = (adapter, assignment)
        for key, pages in page_views(packed.buffer, need, self.layout).items():
            self.pools[key][list(assignment.pages[key])] = pages
        return slot_write(packed, assignment, self.layout)

    def put(self, name: str) -> None:
        self.bank = self.writer.write(self.bank, self.prepare(name))

    def check(self) -> None:
        for key, pool in self.bank.pools.items():
            assert not bits(pool[0]).any(), "the zero page"
            np.testing.assert_array_equal(bits(pool), bits(self.pools[key]))
        for adapter, assignment in self.resident.values():
            self._check_slot(adapter, assignment.slot)
        for table in self.bank[1:]:
            assert not bits(table[NUM_SLOTS]).any(), "the base's slot"

    def _check_slot(self, adapter: Adapter, slot: int) -> None:
        for i, projection in enumerate(self.layout.projections):
            layers = adapter.weights.get(projection.name, {})
            count = rank_pages(adapter.ranks.get(projection.name, 0))
            assert self.bank.num_pages[slot, i] == count
            assert not self.bank.tables[slot, i, :, count:].any()
            for layer in range(projection.num_layers):
                a, b = self._read(slot, i, layer)
                if layer not in layers:
                    assert not self.bank.scaling[slot, i, layer] and not a.any() and not b.any()
                    continue
                weights = layers[layer]
                assert self.bank.scaling[slot, i, layer] == weights.scaling
                for found, expected in ((a, weights.a), (b, weights.b.T)):
                    np.testing.assert_array_equal(
                        found[: weights.rank], expected.astype(found.dtype)
                    )
                    assert not found[weights.rank :].any()

    def _read(self, slot: int, i: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A and B as the tables say, of all the ranks that there could be: [R, width]."""
        projection = self.layout.projections[i]
        found = []
        for side, key in enumerate(
            (self.layout.pool_a(projection), self.layout.pool_b(projection))
        ):
            pages = np.asarray(self.bank.tables[slot, i, side])
            found.append(np.asarray(self.bank.pools[key])[pages, layer].reshape(-1, key.width))
        return found[0], found[1]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def layout(request: pytest.FixtureRequest) -> BankLayout:
    return helpers.layout(request.param, MAX_RANK)


@pytest.fixture(scope="module")
def buffer_writer(layout: BankLayout) -> BufferWriter:
    return BufferWriter(new_bank(layout), layout, ExecutableStore(None, ""))


@pytest.fixture(scope="module", params=[PageWriter, BufferWriter])
def writer(request: pytest.FixtureRequest, layout: BankLayout, buffer_writer: Any) -> BankWriter:
    return PageWriter(new_bank(layout), layout) if request.param is PageWriter else buffer_writer


def test_every_adapter_is_read_back(layout: BankLayout, writer: BankWriter, tmp_path: Path) -> None:
    """Slots and pages are given on and on: to larger adapters, and to smaller ones."""
    world = World(layout, writer, tmp_path)
    for name in (*ADAPTERS, *reversed(ADAPTERS), "mlp", "head", "small"):
        if name not in world.resident:
            world.put(name)
            world.check()
    assert world.slots.evictions >= 5


def test_one_transfer_and_one_launch(
    layout: BankLayout,
    buffer_writer: BufferWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer that waited in RAM is what travels, whole; beside it one vector."""
    world = World(layout, buffer_writer, tmp_path)
    write = world.prepare("wide")
    transfers: list[Any] = []
    launches: list[tuple[Any, ...]] = []
    device_put, insert = jax.device_put, buffer_writer._inserts[len(write.buffer)]

    def put(value: Any, *to: Any) -> Any:
        transfers.append(value)
        return device_put(value, *to)

    def launch(*arguments: Any) -> Any:
        launches.append(arguments)
        return insert(*arguments)

    monkeypatch.setattr(jax, "device_put", put)
    monkeypatch.setattr(buffer_writer, "_inserts", {len(write.buffer): launch})
    world.bank = buffer_writer.write(world.bank, write)
    world.check()
    assert [value is write.buffer for value in transfers] == [True]
    ((_, buffer, packed),) = launches
    assert isinstance(buffer, jax.Array) and packed is write.packed and packed.ndim == 1


def test_a_page_locked_buffer_is_written_the_same(
    layout: BankLayout, buffer_writer: BufferWriter, tmp_path: Path
) -> None:
    """As a GPU gets it: the same path, through the memory kind that jax's CPU has too."""
    world = World(layout, buffer_writer, tmp_path)
    write = world.prepare("wide")
    locked = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    before = executables.num_compiled()
    buffer = jax.device_put(write.buffer, locked)
    world.bank = buffer_writer.write(world.bank, replace(write, buffer=buffer))
    assert executables.num_compiled() == before
    world.check()


def test_a_cpu_reads_the_host_memory_in_place(layout: BankLayout, tmp_path: Path) -> None:
    ranks = ADAPTERS["wide"]
    buffer = np.asarray(pack(helpers.adapter(tmp_path, layout, ranks), layout).buffer)
    assert host_memory().keep(buffer) is buffer
    assert jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="a CPU's memory is the host's own")
def test_locked_memory_keeps_a_copy_of_what_is_built_in_used_memory(tmp_path: Path) -> None:
    memory = LockedMemory(jax.devices()[0])
    first = memory.blank(4096).view(np.float32).reshape(2, -1)
    first[:] = 1
    kept = memory.keep(first)
    second = memory.blank(4096)
    assert second.ctypes.data == first.ctypes.data and not second.any()
    assert np.array_equal(np.asarray(kept), np.ones((2, 512), np.float32))


def test_nothing_is_compiled_at_a_write(
    layout: BankLayout, writer: BankWriter, tmp_path: Path
) -> None:
    world = World(layout, writer, tmp_path)
    writes = [world.prepare(name) for name in ADAPTERS]
    assert len({len(write.buffer) for write in writes}) >= 3
    before = executables.num_compiled()
    for write in writes:
        world.bank = writer.write(world.bank, write)
    jax.block_until_ready(world.bank)
    assert executables.num_compiled() == before


def test_warming_up_changes_nothing(layout: BankLayout, writer: BankWriter, tmp_path: Path) -> None:
    world = World(layout, writer, tmp_path)
    world.put("wide")
    world.bank = writer.warm_up(world.bank)
    world.check()


def test_an_insert_copies_no_pool(layout: BankLayout, buffer_writer: BufferWriter) -> None:
    """On this machine's processor; tests/aot asks the H100's compiler."""
    bank_bytes = sum(array.nbytes for array in jax.tree.leaves(new_bank(layout)))
    for insert in buffer_writer._inserts.values():
        assert insert.memory_analysis().alias_size_in_bytes == bank_bytes
