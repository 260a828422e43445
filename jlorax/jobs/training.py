"""One training in a process of its own, listened to line by line. Async."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from jlorax.training.config import TrainConfig
from jlorax.training.events import Cancelled, Ended, Event, Failed, parse_event
from jlorax.training.process import JobFile, command, environment

log = logging.getLogger("jlorax.jobs")

_MAX_LINE_BYTES = 1 << 20
_LAST_WORDS_BYTES = 2000
_FINAL = (Ended, Cancelled, Failed)


class Training:
    """``run`` it once; ``stop`` it at any time, also before it runs."""

    def __init__(
        self, config: TrainConfig, cache_dir: Path, device_share: float | None = None
    ) -> None:
        self._job = JobFile.of(config, cache_dir, is_idle=True)
        self._environment = environment(device_share)
        self._stop = asyncio.Event()
        self._deadline_s = 0.0
        self._last_step = 0
        self._final: Event | None = None

    def stop(self, deadline_s: float) -> None:
        """It gets so long to end with a checkpoint, then it is killed."""
        self._deadline_s = deadline_s
        self._stop.set()

    async def run(self, take: Callable[[Event], None]) -> None:
        """Gives ``take`` every event; the last one is always Ended, Cancelled or Failed, and comes
        when the process is gone."""
        with tempfile.TemporaryDirectory(prefix="jlorax-train-") as scratch:
            file = self._job.write(Path(scratch) / "job.json")
            with tempfile.TemporaryFile(dir=scratch) as errors:
                returncode = await self._run(file, errors, take)
                take(self._final or self._unsaid(returncode, errors))

    async def _run(self, file: Path, errors: BinaryIO, take: Callable[[Event], None]) -> int:
        process = await asyncio.create_subprocess_exec(
            *command(file),
            stdout=PIPE,
            stderr=errors,
            env=self._environment,
            limit=_MAX_LINE_BYTES,
        )
        stopping = asyncio.create_task(self._stop_in_time(process))
        try:
            await self._listen(process, take)
            return await process.wait()
        finally:
            stopping.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _listen(self, process: Process, take: Callable[[Event], None]) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            try:
                event = parse_event(line.decode())
            except ValueError:
                log.warning("a training said what is no event: %r", line[:200])
                continue
            if isinstance(event, _FINAL):
                self._final = event
                continue
            self._last_step = getattr(event, "step", self._last_step)
            take(event)

    async def _stop_in_time(self, process: Process) -> None:
        await self._stop.wait()
        with suppress(ProcessLookupError):  # it ended by itself
            process.terminate()
            try:
                async with asyncio.timeout(self._deadline_s):
                    await process.wait()
            except TimeoutError:
                log.warning("a training did not end within %.0f s: it is killed", self._deadline_s)
                process.kill()

    def _unsaid(self, returncode: int, errors: BinaryIO) -> Event:
        """It ended without saying how."""
        if self._stop.is_set():
            return Cancelled(self._last_step)
        how = f"status {returncode}" if returncode >= 0 else signal.Signals(-returncode).name
        errors.seek(max(0, errors.seek(0, 2) - _LAST_WORDS_BYTES))
        log.error(
            "a training's process ended with %s: %s", how, errors.read().decode("utf-8", "replace")
        )
        return Failed("internal", f"its process ended with {how}; the server's log has its words")
