"""Compiles every step before the server is ready, and keeps whole executables for the next start.

jax's own compilation cache still traces and lowers (0.3 to 1.1 s a step); a serialized executable
skips that too. The key covers everything that can change the code: our sources, the versions, the
model's and the bank's shapes, the device and the processor's features.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.experimental import serialize_executable

from jlorax.models.kept import keep, load_kept
from jlorax.types import Progress, no_progress

_SOURCES = ("models", "device", "layout.py", "../pallas_kernels")


_num_compiled = 0


def num_compiled() -> int:
    """Executables that XLA compiled in this process so far."""
    return _num_compiled


def _count_compilation(event: str, duration_secs: float, **_: Any) -> None:
    global _num_compiled
    if event == "/jax/core/compile/backend_compile_duration":
        _num_compiled += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class ExecutableStore:
    """A folder of compiled executables. One that cannot be used is compiled anew, never fatal.

    XLA loads and compiles outside the interpreter lock. Loading needs no array, so it may begin
    while the weights are read; compiling waits for ``get_all``, because on a GPU XLA times
    candidates and should have the device for itself.
    """

    def __init__(self, folder: Path | None, context: str) -> None:
        """``context``: a text that names all shapes; ``folder`` None keeps nothing."""
        self._folder = folder
        self._context = "\n".join([context, _environment(), _source_digest()])
        self._threads = ThreadPoolExecutor(max_workers=max(2, min(16, os.cpu_count() or 2)))
        self._loading: dict[str, Future[Any | None]] = {}
        self.num_loaded = 0
        self.num_compiled = 0

    def __enter__(self) -> ExecutableStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """A start that failed waits for no executable."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def begin_loading(self, names: Iterable[str]) -> None:
        """Returns at once; ``get_all`` takes what came of it."""
        for name in names:
            self._loading[name] = self._threads.submit(self._load, name)

    def get_all(
        self, named: Iterable[tuple[str, Any]], progress: Progress = no_progress
    ) -> dict[str, Any]:
        """The executables by name, each from the store or from its ``lower()``."""
        wanted = list(named)
        jobs = {name: self._threads.submit(self._get, name, lower) for name, lower in wanted}
        ready: dict[str, Any] = {}
        for i, (name, job) in enumerate(jobs.items()):
            ready[name] = job.result()
            progress("preparing executables", (i + 1) / len(wanted))
        return ready

    def _get(self, name: str, lower: Any) -> Any:
        loading = self._loading.pop(name, None)  # submitted before: a thread has it, or had it
        stored = self._load(name) if loading is None else loading.result()
        if stored is not None:
            self.num_loaded += 1
            return stored
        compiled = lower().compile()
        self.num_compiled += 1
        path = self._path(name)
        if path is not None:
            _save(path, compiled)
        return compiled

    def _load(self, name: str) -> Any | None:
        path = self._path(name)
        return None if path is None else _load(path)

    def _path(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{name}\n{self._context}".encode()).hexdigest()[:32]
        return self._folder / f"{digest}.xla"


def _load(path: Path) -> Any | None:
    stored = load_kept(path)
    try:
        return None if stored is None else serialize_executable.deserialize_and_load(*stored)
    except Exception:  # a foreign file: the executable is made again
        return None


def _save(path: Path, compiled: Any) -> None:
    try:
        keep(path, serialize_executable.serialize(compiled))
    except (ValueError, RuntimeError, NotImplementedError):
        return  # this backend cannot: the next start compiles again


def _environment() -> str:
    device = jax.devices()[0]
    return "\n".join(
        [
            jax.__version__,
            version("jaxlib"),
            device.platform,
            device.device_kind,
            str(jax.config.values.get("jax_default_matmul_precision")),
            os.environ.get("XLA_FLAGS", ""),
            platform.machine(),
            _processor_features(),
        ]
    )


def _processor_features() -> str:
    """CPU executables use the instructions of the processor they were made on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _source_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for source in _SOURCES:
        path = package / source
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()
