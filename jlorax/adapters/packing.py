"""Reads, checks, merges and packs adapters, in this process or in one of its own.

A load is a thousand short numpy calls, and each takes the interpreter lock. Beside a busy engine
every one of them waits for the event loop or makes it wait: 8 threads loaded 17 adapters of 33 MB a
second on 16 cores. A process of its own has its own lock; what it packed lies in memory that both
share.

    PackerProcess, on a loader's thread              the process
      Pack(files, id)            --- pickle --->     reads, checks, packs into the shared memory
      Packed(ranks, scaling)     <--------------
      copies it to where the device reads it
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jlorax.adapters.pack import PackedAdapter, assemble, buffer_of, pack
from jlorax.adapters.sources import FilesHere, read
from jlorax.errors import JLoraxError, Unavailable
from jlorax.layout import BankLayout, Scratch

_NICENESS = 5  # whoever waits for a token goes first
_END_DEADLINE_S = 5.0


class AnyPacker(Protocol):
    """One adapter at a time; used by one thread at a time."""

    def pack(self, files: FilesHere, adapter_id: str) -> PackedAdapter:
        """In the packer's own memory: the caller's to read until its next call.

        Raises AdapterInvalid, AdapterChanged; Unavailable when the packer itself ended.
        """

    @property
    def is_alive(self) -> bool: ...

    def close(self) -> None: ...


class Packer:
    """In this process. ``blank``: gives so many bytes of zeros, u8[num_bytes]."""

    is_alive = True

    def __init__(
        self, layout: BankLayout, blank: Callable[[int], np.ndarray] | None = None
    ) -> None:
        self._layout = layout
        self._scratch, self._pages = Scratch(), Scratch()
        self._blank = blank or self._zeros

    def pack(self, files: FilesHere, adapter_id: str) -> PackedAdapter:
        adapter = read(files, adapter_id, self._layout, self._room)
        return pack(adapter, self._layout, self._blank)

    def close(self) -> None:
        """Nothing outlives it."""

    def _room(self, num_bytes: int) -> memoryview:
        return memoryview(self._scratch.room(num_bytes).data)

    def _zeros(self, num_bytes: int) -> np.ndarray:
        room = self._pages.room(num_bytes)
        room[:] = 0
        return room


@dataclass(frozen=True)
class Pack:
    files: FilesHere
    adapter_id: str


@dataclass(frozen=True)
class Packed:
    """Its buffer begins the shared memory, which is ``num_bytes`` long by now."""

    ranks: dict[str, int]
    scaling: np.ndarray
    num_bytes: int


class PackerProcess:
    """The same in a process of its own, which ends with this one."""

    def __init__(self, layout: BankLayout) -> None:
        self._layout = layout
        self._memory = SharedMemory.new()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main({self._memory.fd})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._memory.fd,),
            start_new_session=True,  # a Ctrl-C at the terminal is for the server alone
            env=_environment(),
        )
        self._send(layout)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def pack(self, files: FilesHere, adapter_id: str) -> PackedAdapter:
        packed: Packed = self._ask(Pack(files, adapter_id))
        view = self._memory.view(packed.num_bytes)
        buffer = buffer_of(view, packed.ranks, self._layout)
        return assemble(packed.ranks, packed.scaling, buffer, self._layout)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._memory.close()

    def _ask(self, request: Pack) -> Any:
        assert self._process.stdout is not None
        try:
            self._send(request)
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            status = self._process.wait()
            raise Unavailable(
                f"the process that reads adapters ended with status {status}; try again"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()


class SharedMemory:
    """A file without a name that two processes map; the packer lets it grow, the other follows."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None
        self._array = np.empty(0, np.uint8)

    @classmethod
    def new(cls) -> SharedMemory:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryFile(dir=folder) as file:
            return cls(os.dup(file.fileno()))

    def blank(self, num_bytes: int) -> np.ndarray:
        """u8[num_bytes] of zeros at its beginning. What was there is gone."""
        if num_bytes > len(self._array):
            os.ftruncate(self.fd, num_bytes)
        room = self.view(num_bytes)
        room[:] = 0
        return room

    def view(self, num_bytes: int) -> np.ndarray:
        """u8[num_bytes], its beginning as it is."""
        if num_bytes > len(self._array):
            self._map = mmap.mmap(self.fd, num_bytes)
            self._array = np.frombuffer(self._map, np.uint8)
        return self._array[:num_bytes]

    def close(self) -> None:
        self._array = np.empty(0, np.uint8)
        os.close(self.fd)


def _environment() -> dict[str, str]:
    """The child finds what this process finds, wherever it was found."""
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def main(fd: int) -> None:
    """Answers requests until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not end up between the answers
    packer = Packer(pickle.load(requests), SharedMemory(fd).blank)
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(packer, request), answers)
        answers.flush()


def _answer(packer: Packer, request: Pack) -> Packed | Exception:
    try:
        packed = packer.pack(request.files, request.adapter_id)
    except JLoraxError as error:
        return error.with_traceback(None)
    except Exception as error:  # a bug of ours, or of a library: one adapter's, not the process'
        return RuntimeError(f"cannot be read: {error!r}")
    return Packed(dict(packed.ranks), packed.scaling, packed.buffer.nbytes)
