"""A contestant seen from the benchmark: starts its process, asks, and notices its death."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_LOG_LINES = 15  # of a dead contestant's log, shown in the error


class ContestantFailed(Exception):
    """A contestant ended before it answered; the message carries the end of its log."""


class ContestantProcess:
    """Ready when built. ``ready_s`` counts from the start of the process, imports included."""

    def __init__(self, name: str, python: str, module: str, setup: Path, log: Path) -> None:
        self.name = name
        self._log = log
        start_s = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module, str(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
            )
        self.packages: dict[str, str] = self._answer()["packages"]
        self.ready_s = time.perf_counter() - start_s

    def run(self, adapters: tuple[str | None, ...], num_out: int) -> tuple[float, list[list[int]]]:
        """(seconds, tokens of every row)."""
        answer = self._ask({"op": "run", "adapters": adapters, "num_out": num_out})
        return answer["seconds"], answer["tokens"]

    def describe(self) -> tuple[int, dict[str, str]]:
        """(peak resident bytes so far, notes on how it was set up)."""
        answer = self._ask({"op": "describe"})
        return answer["peak_rss_bytes"], answer["notes"]

    def close(self) -> None:
        """Closing its input asks it to end; one that does not is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self) -> ContestantFailed:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ContestantFailed("\n".join([f"{self.name} ended with status {code}:", *lines]))
