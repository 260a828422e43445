"""The front-end benchmark's processes: two servers on one core, and the load on another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.front_end_load import Arrivals, Arrived, Streamed, Streams
from benchmarks.front_end_server import LISTENING
from benchmarks.http_processes import ProcessFailed, failure_of, free_port

_REPOSITORY = Path(__file__).resolve().parent.parent
_STOP_DEADLINE_S = 60.0


def two_cores() -> tuple[int, int]:
    """One for the server, one for the load: on the same one each would measure the other."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"two cores are needed; this process may use {len(cores)}")
    return cores[0], cores[1]


class Child:
    """A module run by this interpreter, which answers lines with lines."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        with log.open("wb") as errors:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                [sys.executable, *command],
                cwd=_REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def line(self) -> str:
        """The next line that it says; blocks until it does, or ends."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        self._process.wait()
        raise failure_of(" ".join(self._command), self._log)

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@contextmanager
def _child(command: list[str], log: Path) -> Iterator[Child]:
    child = Child(command, log)
    try:
        yield child
    finally:
        child.close()


@dataclass(frozen=True)
class Server:
    """One that listens."""

    process: Child
    port: int


@dataclass(frozen=True)
class FrontEnd:
    """The servers, and the loads that are put on them."""

    delayed: Server
    stepped: Server
    load: Child

    def pings(self, rate_per_s: float, seconds: float, seed: str) -> Arrived:
        return self._arrivals(rate_per_s, seconds, None, seed)

    def chats(self, rate_per_s: float, seconds: float, num_tokens: int, seed: str) -> Arrived:
        return self._arrivals(rate_per_s, seconds, num_tokens, seed)

    def streams(self, num_streams: int, num_tokens: int, ramp_s: float) -> Streamed:
        server = self.stepped
        asked = Streams(server.port, server.process.pid, num_streams, num_tokens, ramp_s)
        return Streamed(**self._ask("streams", asked))

    def _arrivals(
        self, rate_per_s: float, seconds: float, num_tokens: int | None, seed: str
    ) -> Arrived:
        server = self.delayed
        asked = Arrivals(server.port, server.process.pid, rate_per_s, seconds, num_tokens, seed)
        return Arrived(**self._ask("arrivals", asked))

    def _ask(self, kind: str, load: Arrivals | Streams) -> dict[str, Any]:
        self.load.tell(json.dumps({"kind": kind, **asdict(load)}))
        answer: dict[str, Any] = json.loads(self.load.line())
        return answer


@contextmanager
def front_end(
    model: Path, delay_s: float, step_s: float, work: Path, profiles: Path | None
) -> Iterator[FrontEnd]:
    """``profiles``: a folder for cProfile's figures of each server, which slow it."""
    core, other = two_cores()
    with ExitStack() as opened:

        def serve(name: str, *clock: str) -> Server:
            port = free_port()
            profiling = [] if profiles is None else _profiling(profiles / f"{name}.prof")
            fixed = [f"--core={core}", f"--port={port}", f"--model={model}"]
            command = [*profiling, "-m", "benchmarks.front_end_server", *fixed, *clock]
            return Server(opened.enter_context(_child(command, work / f"{name}.log")), port)

        servers = serve("delayed", f"--delay-s={delay_s}"), serve("stepped", f"--step-s={step_s}")
        put = ["-m", "benchmarks.front_end_load", f"--core={other}"]
        load = opened.enter_context(_child(put, work / "load.log"))
        for server in servers:
            if (said := server.process.line()) != LISTENING:
                raise ProcessFailed(f"a server said {said!r}")
        yield FrontEnd(*servers, load)


def _profiling(file: Path) -> list[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    return ["-m", "cProfile", "-o", str(file.absolute())]
