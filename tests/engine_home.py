"""An engine that a module's tests share, the loop it lives on, and what must hold after each."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from jlorax.engine import Engine
from jlorax.types import GenerateRequest, GenerateResult


@dataclass
class Home:
    engine: Engine
    loop: asyncio.Runner

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(120):
                await test
                await all_is_back(self.engine)

        self.loop.run(limited())


async def answer(engine: Engine, request: GenerateRequest) -> GenerateResult:
    async for event in engine.generate(request):
        if event.result is not None:
            return event.result
    raise AssertionError("a stream ended without its result")


async def all_is_back(engine: Engine) -> None:
    """Pages, rows, slots and pins; the last steps in flight may still have to be read."""
    async with asyncio.timeout(5):
        while not _is_empty(engine):  # noqa: ASYNC110 - the engine offers no event for this
            await asyncio.sleep(0.001)
    engine._policy.check()
    engine._parts.tiers.slots.check()
    assert engine.stats().executables_compiled_after_ready == 0


def _is_empty(engine: Engine) -> bool:
    stats = engine.stats()
    return (
        (stats.num_queued, stats.num_running, stats.pinned_slots) == (0, 0, 0)
        and stats.free_pages == stats.total_pages
        and engine._policy.is_idle
    )
