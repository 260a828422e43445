"""JLoRAX: the whole engine in this process (scheduler, paged KV, detokenizer), as it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants.protocol import Setup, serve
from jlorax.config import AdapterConfig, EngineConfig, ModelSource, SchedulerConfig, StepConfig
from jlorax.engine import Engine
from jlorax.types import GenerateRequest


class JLoraxEngine:
    def __init__(self, setup: Setup) -> None:
        self._prompts = [tuple(prompt) for prompt in setup.prompts]
        self._loop = asyncio.Runner()
        self._engine = self._loop.run(Engine.start(_config(setup)))

    def run(self, adapters: Sequence[str | None], num_out: int) -> list[list[int]]:
        """All requests at once, each in a task of its own, as a server's handlers would."""
        return self._loop.run(self._all(adapters, num_out))

    async def _all(self, adapters: Sequence[str | None], num_out: int) -> list[list[int]]:
        async with asyncio.TaskGroup() as tasks:
            answers = [
                tasks.create_task(self._one(prompt, adapter, num_out))
                for prompt, adapter in zip(self._prompts, adapters, strict=False)
            ]
        return [answer.result() for answer in answers]

    async def _one(self, prompt: tuple[int, ...], adapter: str | None, num_out: int) -> list[int]:
        request = GenerateRequest(
            prompt=prompt, adapter_id=adapter, max_new_tokens=num_out, ignore_eos=True
        )
        return [event.token.id async for event in self._engine.generate(request)]

    def notes(self) -> dict[str, str]:
        late = self._engine.stats().executables_compiled_after_ready
        return {"executables compiled after ready": str(late)}


def _config(setup: Setup) -> EngineConfig:
    """The defaults that ``jlorax serve`` has; ``few_executables`` leaves out the large buckets."""
    named = tuple((name, Path(folder)) for name, folder in setup.adapters.items())
    batch = len(setup.prompts)
    few = StepConfig(tuple(sorted({1, batch})), extend_buckets=(64,))
    executables = Path(setup.executables)
    return EngineConfig(
        cache_dir=executables.parent,
        model=ModelSource(setup.model),
        steps=few if setup.few_executables else StepConfig(),
        scheduler=SchedulerConfig(max_batch=batch) if setup.few_executables else SchedulerConfig(),
        adapters=AdapterConfig(named=named),
        executable_dir=executables,
    )


if __name__ == "__main__":
    serve(JLoraxEngine)
