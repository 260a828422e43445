"""Prepares and times one case: compile, compare with the reference, then chain after chain.

The host must not be the bottleneck, so chains are launched behind a *plug*, work that keeps the
device busy until they are all queued:

    device   | plug ................ | chain | chain | ... | chain |
    host     launch, launch, ..., launch                   wait .. |

    microseconds a call = (t(plug + 1 + n chains) - t(plug + 1 chain)) / (n * num_layers)

so neither the plug, nor the launch, nor the wait is in the figure; everything on the device is.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.protocol import Built, Contestant, KernelCase
from benchmarks.kernels.results import HOST_BOUND, Result
from benchmarks.report import Spread, spread

_MOST_LAUNCHES = 16  # beyond about 30 the client makes the host wait
_LEAST_CHAINS_S = 6e-3  # of device time between the two launches that are compared
_CONTESTANT_S = 2.0  # a slow contestant gets fewer repeats
_MOST_PLUGS = 4
_PLUG_SIZE = {"gpu": 8192, "cpu": 64}


@dataclass(frozen=True)
class Prepared:
    """A case on the device, its chains being compiled and compared on other threads."""

    case: KernelCase
    built: Built
    executables: tuple[Future[Any], ...]
    errors: tuple[Future[float | None], ...]

    @property
    def size_bytes(self) -> int:
        """Of all arguments; contestants mostly share them."""
        leaves = jax.tree.leaves([c.arguments for c in self.built.contestants])
        arrays = {id(leaf): leaf.nbytes for leaf in leaves if hasattr(leaf, "nbytes")}
        return sum(arrays.values())


def compiler_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="compile")


def prepare(case: KernelCase, threads: ThreadPoolExecutor) -> Prepared:
    """Builds the arrays here, and leaves compiling to the threads."""
    built = case.build()
    return Prepared(
        case,
        built,
        tuple(threads.submit(_compile, c) for c in built.contestants),
        tuple(threads.submit(_compare, c, built.wanted) for c in built.contestants),
    )


def wait(prepared: Prepared) -> None:
    """Until nothing compiles any more: timing needs the machine for itself."""
    for job in (*prepared.executables, *prepared.errors):
        job.exception()


def measure(prepared: Prepared, plug: Plug, repeats: int) -> list[Result]:
    """One result a contestant, in order; a wrong or broken one is not timed."""
    jobs = zip(prepared.built.contestants, prepared.executables, prepared.errors, strict=True)
    return [_measure_one(prepared, *job, plug, repeats) for job in jobs]


def failed(case: KernelCase, error: Exception) -> Result:
    """A case that cannot even be built."""
    return _result(case, "(build)", note=describe(error))


def describe(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def _result(case: KernelCase, contestant: str, **found: Any) -> Result:
    return Result(case.op, case.name, case.floor_us, case.target_us, contestant, **found)


def _measure_one(
    prepared: Prepared,
    contestant: Contestant,
    executable: Future[Any],
    error: Future[float | None],
    plug: Plug,
    repeats: int,
) -> Result:
    case, tolerance = prepared.case, prepared.built.tolerance
    broken = executable.exception() or error.exception()
    if broken is not None:
        return _result(case, contestant.name, note=describe(broken))
    off = error.result()
    if off is not None and not off <= tolerance:  # NaN is wrong too
        note = f"wrong: off by {off:.1e}, allowed is {tolerance:.0e}"
        return _result(case, contestant.name, error=off, note=note)
    try:
        timing = time_chain(executable.result(), contestant, plug, repeats)
    except Exception as fault:  # of this contestant alone; the others go on
        return _result(case, contestant.name, error=off, note=describe(fault))
    note = HOST_BOUND if timing.host_bound else ""
    return _result(case, contestant.name, us=timing.us, error=off, note=note)


def _compile(contestant: Contestant) -> Any:
    jitted = jax.jit(contestant.chain, donate_argnums=contestant.donate)
    return jitted.lower(*contestant.arguments).compile()


def _compare(contestant: Contestant, wanted: jax.Array | None) -> float | None:
    """max |got - wanted| / max |wanted|; None where there is nothing to compare."""
    if contestant.once is None or wanted is None:
        return None
    got = contestant.once()
    if got.shape != wanted.shape:
        raise ValueError(f"{contestant.name} gives {got.shape}, wanted is {wanted.shape}")
    return float(_relative_error(got, wanted))


@jax.jit
def _relative_error(got: jax.Array, wanted: jax.Array) -> jax.Array:
    wide = wanted.astype(jnp.float32)
    return jnp.max(jnp.abs(got.astype(jnp.float32) - wide)) / jnp.max(jnp.abs(wide))


class Plug:
    """A few milliseconds of matrix products."""

    def __init__(self) -> None:
        size = _PLUG_SIZE.get(jax.default_backend(), 64)
        key = jax.random.key(0)
        self._matrix = jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5
        self._run = jax.jit(lambda a: (a @ a) @ (a @ a)).lower(self._matrix).compile()
        self._run(self._matrix).block_until_ready()
        start_s = time.perf_counter()
        self._run(self._matrix).block_until_ready()
        self.seconds = time.perf_counter() - start_s

    def launch(self) -> None:
        self._run(self._matrix)


@dataclass(frozen=True)
class Timing:
    """Microseconds a call. ``host_bound``: the device had to wait for launches after all."""

    us: Spread
    host_bound: bool


def time_chain(executable: Any, contestant: Contestant, plug: Plug, repeats: int) -> Timing:
    chain = _Chain(executable, contestant)
    _run(chain, plug, 0, 2)  # a first run loads the code
    host_s, one_s = _run(chain, plug, 0, 1)
    more = _clip(math.ceil(_LEAST_CHAINS_S / one_s), 4, _MOST_LAUNCHES - 1)
    plugs = _clip(math.ceil(2 * host_s * (1 + more) / plug.seconds), 1, _MOST_PLUGS)
    round_s = (2 + more) * one_s + 2 * plugs * plug.seconds
    pairs = [
        (_run(chain, plug, plugs, 1), _run(chain, plug, plugs, 1 + more))
        for _ in range(_clip(int(_CONTESTANT_S / round_s), 3, repeats))
    ]
    calls = more * contestant.num_layers
    us = spread(1e6 * (many_s - few_s) / calls for (_, few_s), (_, many_s) in pairs)
    usual_host_s = median(host_s for _, (host_s, _) in pairs)
    is_async = jax.default_backend() != "cpu"
    return Timing(us, is_async and usual_host_s > plugs * plug.seconds)


class _Chain:
    """Launches a contestant's chain again and again; what it donates comes back in its outputs."""

    def __init__(self, executable: Any, contestant: Contestant) -> None:
        self._executable = executable
        self._donate = contestant.donate
        self._arguments = list(contestant.arguments)
        for i in self._donate:  # others use the case's own arrays after us
            self._arguments[i] = jax.tree.map(jnp.copy, self._arguments[i])

    def launch(self) -> Any:
        result = self._executable(*self._arguments)
        if self._donate:
            self._take_back(list(result) if isinstance(result, tuple | list) else [result])
        return result

    def _take_back(self, outputs: list[Any]) -> None:
        """Each donated argument is replaced by the first output left that is shaped like it."""
        for i in self._donate:
            shape = _shape(self._arguments[i])
            found = next((k for k, output in enumerate(outputs) if _shape(output) == shape), None)
            if found is None:
                raise ValueError(f"the chain donates argument {i} and returns nothing like it")
            self._arguments[i] = outputs.pop(found)


def _shape(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def _run(chain: _Chain, plug: Plug, num_plugs: int, num_chains: int) -> tuple[float, float]:
    """Seconds until everything is launched, and until everything is done."""
    start_s = time.perf_counter()
    for _ in range(num_plugs):
        plug.launch()
    for _ in range(num_chains):
        result = chain.launch()
    launched_s = time.perf_counter()
    jax.tree.map(lambda x: x.block_until_ready(), result)
    return launched_s - start_s, time.perf_counter() - start_s


def _clip(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))
