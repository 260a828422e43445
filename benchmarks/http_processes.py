"""The HTTP benchmark's two processes: ``jlorax serve``, and the load that is put on it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.http_load import Answered, Load

_REPOSITORY = Path(__file__).resolve().parent.parent
_LOG_LINES = 15  # of a dead process's log, shown in the error
_ASK_EVERY_S = 0.1
_STOP_DEADLINE_S = 60.0


class ProcessFailed(Exception):
    """One of them ended before its time; the message carries the end of its log."""


def failure_of(what: str, log: Path) -> ProcessFailed:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return ProcessFailed("\n".join([f"{what} failed:", *lines]))


class _Process:
    """Ends with the ``with`` block."""

    def __init__(self, module: str, arguments: tuple[str, ...], log: Path, **pipes: Any) -> None:
        self._module, self._log = module, log
        with log.open("wb") as errors:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=_REPOSITORY,
                stderr=errors,
                text=True,
                **pipes,
            )

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def failed(self) -> ProcessFailed:
        return failure_of(self._module, self._log)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ServeProcess(_Process):
    """``jlorax serve`` with these settings, ready when built; ``ready_s`` includes imports."""

    def __init__(self, settings: Mapping[str, str], log: Path, deadline_s: float) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        start_s = time.perf_counter()
        super().__init__("servers.cli", ("serve", f"--port={port}", *flags), log)
        try:
            self._await_ready(start_s + deadline_s)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - start_s

    def __enter__(self) -> ServeProcess:
        return self

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            text: str = response.read().decode()
            return text

    def metric(self, name: str) -> float:
        line = next(line for line in self.get("/metrics").splitlines() if line.startswith(name))
        return float(line.split()[1])

    def _await_ready(self, deadline_s: float) -> None:
        while time.perf_counter() < deadline_s:
            if self._process.poll() is not None:
                raise self.failed()
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(_ASK_EVERY_S)  # nothing to wait on before the process listens
        raise self.failed()


class LoadProcess(_Process):
    def __init__(self, log: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        super().__init__("benchmarks.http_load", (), log, **pipes)

    def __enter__(self) -> LoadProcess:
        return self

    def run(self, load: Load) -> Answered:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self.failed()
        return Answered(**json.loads(line))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
