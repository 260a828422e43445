"""What a machine of its own memory gets when no setting is named: it fits, and it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from benchmarks.shapes import write_shape
from jlorax.assembly import (
    MemoryPlan,
    bank_layout,
    build_registry,
    plan_memory,
    running_on,
    step_shapes,
)
from jlorax.config import GIB, EngineConfig
from jlorax.defaults import Machine, bank_bytes, reserve_bytes
from jlorax.errors import ConfigError
from jlorax.models.config import read_config
from servers.settings import engine_config
from servers.tables import memory_table

MAX_EXECUTABLES = 32


def config_on(machine: Machine, **values: object) -> EngineConfig:
    """As ``jlorax serve`` makes it, with the steps of a GPU wherever this runs."""
    config = engine_config(values, {"XDG_CACHE_HOME": "/c"}, machine)
    if machine.platform != "gpu":
        return config
    return replace(config, steps=replace(config.steps, kernels="pallas_interpret"))


def plan_on(
    machine: Machine, folder: Path, shape: str = "llama-2-7b", **values: object
) -> MemoryPlan:
    model = read_config(write_shape(shape, folder / shape))
    config = config_on(machine, **values)
    registry = build_registry(config, shape)
    return plan_memory(config, model, registry, bank_layout(config, model))


def test_a_gpus_executables_are_at_most_32() -> None:
    assert len(step_shapes(config_on(Machine("gpu", 73 * GIB)))) <= MAX_EXECUTABLES


@pytest.mark.parametrize("gib", [16, 24, 40, 73, 129])
def test_keys_and_values_take_what_is_left_and_no_more(tmp_path: Path, gib: int) -> None:
    plan = plan_on(Machine("gpu", gib * GIB), tmp_path)
    taken = plan.weight_bytes + plan.bank_bytes + plan.row_bytes + plan.kv_bytes
    free = gib * GIB - taken
    page_bytes = plan.kv_bytes // plan.num_pages
    assert reserve_bytes(gib * GIB) <= free < reserve_bytes(gib * GIB) + page_bytes


def test_rows_are_counted_among_what_is_taken(tmp_path: Path) -> None:
    """Of 32,000 tokens each: seen, a count, a bias, and a bit of a mask; one row is nobody's."""
    plan = plan_on(Machine("gpu", 73 * GIB), tmp_path)
    assert plan.row_bytes == 257 * (32000 * (1 + 4 + 4) + 32000 // 8 + 4)


def test_an_h100_holds_256_sequences_of_the_closed_load(tmp_path: Path) -> None:
    plan = plan_on(Machine("gpu", 73 * GIB), tmp_path)
    assert (plan.num_pages - 1) * plan.page_size >= 256 * (256 + 128)


def test_no_more_pages_than_the_batch_can_fill(tmp_path: Path) -> None:
    plan = plan_on(Machine("gpu", 73 * GIB), tmp_path, max_batch=2)
    assert plan.num_pages == 2 * (4096 // plan.page_size) + 1


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"device's {13 * GIB} bytes"):
        plan_on(Machine("gpu", 13 * GIB), tmp_path)


def test_a_gpu_of_unknown_memory_gets_pages_by_its_batch(tmp_path: Path) -> None:
    plan = plan_on(Machine("gpu"), tmp_path)
    assert plan.num_pages == 256 * (4096 // 16 // plan.page_size) + 1


def test_a_small_card_has_a_small_bank() -> None:
    assert bank_bytes(Machine("gpu", 24 * GIB)) == 24 * GIB // 16
    assert bank_bytes(Machine("gpu", 80 * GIB)) == bank_bytes(Machine("gpu")) == 4 * GIB


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="jax runs on another device here")
def test_here_is_a_cpu_whose_memory_is_not_counted(tmp_path: Path) -> None:
    assert running_on() == Machine("cpu")
    assert plan_on(running_on(), tmp_path, "tiny").device_bytes is None


def test_the_table_says_where_and_what_is_left(tmp_path: Path) -> None:
    table = memory_table(plan_on(Machine("gpu", 73 * GIB), tmp_path))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][0] == "device"
    assert cells[1][0] == "73.0 GiB"
    assert "left for computing" in str(cells[2][0])
    assert cells[2][1] == "bfloat16"
