"""The store of executables: what is kept, when it is loaded, and what becomes of a bad file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlorax import assembly
from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.device import executables
from jlorax.device.executables import ExecutableStore
from tests import tiny_llama

FAR_TOO_LONG_S = 30  # passes only where what is waited for will never be


def adding(amount: int) -> Callable[[], Any]:
    """Lowers x + amount."""
    shape = jax.ShapeDtypeStruct((4,), jnp.int32)
    return lambda: jax.jit(lambda x: x + amount).lower(shape)


def must_not_compile() -> Any:
    raise AssertionError("it is in the store")


def fill(folder: Path, *amounts: int) -> None:
    with ExecutableStore(folder, "context") as store:
        store.get_all((f"add {amount}", adding(amount)) for amount in amounts)
        assert (store.num_loaded, store.num_compiled) == (0, len(amounts))


class Loads:
    """Counts loads, and can hold them up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.one_is_done, self.may_begin = threading.Event(), threading.Event()
        self.may_begin.set()
        self._load = executables._load
        monkeypatch.setattr(executables, "_load", self)

    def __call__(self, path: Path) -> Any | None:
        assert self.may_begin.wait(FAR_TOO_LONG_S)
        self.count += 1
        loaded = self._load(path)
        if loaded is not None:
            self.one_is_done.set()
        return loaded


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


def test_what_was_compiled_is_loaded_the_next_time(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    with ExecutableStore(tmp_path, "context") as store:
        ready = store.get_all((f"add {amount}", must_not_compile) for amount in (1, 2))
    assert (store.num_loaded, store.num_compiled) == (2, 0)
    x = np.arange(4, dtype=np.int32)
    assert [ready["add 1"](x)[0], ready["add 2"](x)[0]] == [1, 2]


def test_loading_begins_before_anything_is_asked_for(tmp_path: Path, loads: Loads) -> None:
    fill(tmp_path, 1)
    num_before = loads.count
    with ExecutableStore(tmp_path, "context") as store:
        store.begin_loading(["add 1", "add 2"])
        assert loads.one_is_done.wait(FAR_TOO_LONG_S)
        ready = store.get_all([("add 1", must_not_compile), ("add 2", adding(2))])
    assert (store.num_loaded, store.num_compiled) == (1, 1)
    assert loads.count - num_before == 2  # each once
    x = np.arange(4, dtype=np.int32)
    assert [ready["add 1"](x)[0], ready["add 2"](x)[0]] == [1, 2]


@pytest.mark.parametrize("begins_early", [False, True])
def test_a_torn_file_is_compiled_anew(tmp_path: Path, begins_early: bool) -> None:
    fill(tmp_path, 1)
    (file,) = tmp_path.glob("*.xla")
    file.write_bytes(file.read_bytes()[:100])
    with ExecutableStore(tmp_path, "context") as store:
        if begins_early:
            store.begin_loading(["add 1"])
        ready = store.get_all([("add 1", adding(1))])
    assert (store.num_loaded, store.num_compiled) == (0, 1)
    assert ready["add 1"](np.zeros(4, np.int32))[0] == 1


def test_another_context_shares_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with ExecutableStore(tmp_path, "another") as store:
        store.get_all([("add 1", adding(1))])
    assert (store.num_loaded, store.num_compiled) == (0, 1)


def test_a_failed_start_begins_no_more_loads(tmp_path: Path, loads: Loads) -> None:
    loads.may_begin.clear()
    names = [f"add {amount}" for amount in range(100)]
    with pytest.raises(ValueError, match="bad"), ExecutableStore(tmp_path, "context") as store:
        store.begin_loading(names)
        jobs = list(store._loading.values())
        raise ValueError("a bad weight")
    loads.may_begin.set()
    assert sum(job.cancelled() for job in jobs) >= len(names) - 16  # threads, at most


def test_a_start_loads_executables_while_it_reads_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        cache_dir=tmp_path,
        model=ModelSource(str(tiny_llama.write_model(tmp_path / "tiny"))),
        steps=StepConfig((1,), (16,)),
        scheduler=SchedulerConfig(max_batch=1),
        kv=KVConfig(max_seq_len=64, page_size=16),
        adapters=AdapterConfig(bank_bytes=1 << 20, max_slots=2, max_rank=8),
        executable_dir=tmp_path / "executables",
    )
    assembly.assemble(config)
    loads = Loads(monkeypatch)
    load_weights = assembly.load_weights

    def wait_and_load(*arguments: Any) -> Any:
        assert loads.one_is_done.wait(FAR_TOO_LONG_S)
        return load_weights(*arguments)

    monkeypatch.setattr(assembly, "load_weights", wait_and_load)
    assert assembly.assemble(config).device.num_compiled == 0
