"""``jlorax demo``: the same prompt to the base and to every shipped adapter, in one batch."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jlorax.client import AsyncClient
from jlorax.config import EngineConfig, ServerConfig
from jlorax.demo import DEMO_ADAPTERS, DEMO_PROMPT, DemoAdapter
from jlorax.engine import Engine
from servers.progress import StartProgress
from servers.rest import create_app, run_server
from servers.serve import check_port

DEFAULTS = {"max_seq_len": 2048, "max_batch": 8}
_MAX_NEW_TOKENS = 64
_BASE = "(base model)"

Asked = tuple[str | None, str]  # adapter, prompt


def with_adapters(config: EngineConfig) -> EngineConfig:
    """The configuration with the shipped adapters registered by their names."""
    shipped = tuple((adapter.name, adapter.folder) for adapter in DEMO_ADAPTERS)
    adapters = dataclasses.replace(config.adapters, named=(*shipped, *config.adapters.named))
    return dataclasses.replace(config, adapters=adapters)


async def demo(config: EngineConfig, server: ServerConfig, once: bool) -> int:
    """Serves, asks, shows; then stays until Ctrl-C unless ``once``."""
    check_port(server)
    logging.getLogger("jlorax.http").setLevel(logging.WARNING)  # a line a request tears the tables
    with StartProgress() as progress:
        engine = await Engine.start(config, progress)
    async with engine:
        listening = asyncio.Event()
        serving = asyncio.create_task(
            run_server(create_app(engine, server), server.host, server.port, listening)
        )
        showing = asyncio.create_task(_show(f"http://{server.host}:{server.port}", listening))
        await asyncio.wait([serving, showing], return_when=asyncio.FIRST_COMPLETED)
        if showing.done():
            showing.result()
            if once:
                serving.cancel()
            else:
                _say_what_next(server)
        else:
            showing.cancel()
        with suppress(asyncio.CancelledError):
            await serving
    return 0


async def _show(url: str, listening: asyncio.Event) -> None:
    await listening.wait()
    asked: list[Asked] = [(None, DEMO_PROMPT), *((a.name, DEMO_PROMPT) for a in DEMO_ADAPTERS)]
    async with AsyncClient(url) as client:
        await _ask_all(client, "One prompt, one batch", asked)
        own = [(a.name, a.prompt) for a in DEMO_ADAPTERS]
        await _ask_all(client, "Each adapter at its own task", own, show_prompt=True)


async def _ask_all(
    client: AsyncClient, title: str, asked: Sequence[Asked], show_prompt: bool = False
) -> None:
    """All at once, each answer growing in its row."""
    answers = [""] * len(asked)
    notes = ["..."] * len(asked)

    def table() -> Table:
        grown = Table(title=title, caption=None if show_prompt else f"prompt: {asked[0][1]}")
        grown.add_column("adapter", no_wrap=True)
        if show_prompt:
            grown.add_column("prompt", ratio=1)
        grown.add_column("answer", ratio=2)
        grown.add_column("tokens, ms to first", no_wrap=True)
        for (name, prompt), answer, note in zip(asked, answers, notes, strict=True):
            cells = [_label(name), *([prompt] if show_prompt else []), answer.strip(), note]
            grown.add_row(*cells)
        return grown

    async def ask(i: int) -> None:
        name, prompt = asked[i]
        start_s = time.perf_counter()
        first_ms = 0.0
        num_tokens = 0
        async for event in client.stream_chat(
            [{"role": "user", "content": prompt}], adapter_id=name, max_new_tokens=_MAX_NEW_TOKENS
        ):
            first_ms = first_ms or (time.perf_counter() - start_s) * 1000
            num_tokens += 1
            answers[i] += event.token.text
            notes[i] = f"{num_tokens}, {first_ms:.0f}"

    console = Console()
    with Live(get_renderable=table, console=console, refresh_per_second=8):
        await asyncio.gather(*(ask(i) for i in range(len(asked))))


def _label(name: str | None) -> str:
    if name is None:
        return _BASE
    adapter: DemoAdapter = next(a for a in DEMO_ADAPTERS if a.name == name)
    return f"{name} (rank {adapter.rank}, {len(adapter.targets)} targets)"


def _say_what_next(server: ServerConfig) -> None:
    url = f"http://{server.host}:{server.port}"
    name = DEMO_ADAPTERS[0].name
    Console().print(
        f"Serving on {url} until Ctrl-C. Try, in another terminal:\n"
        f"  jlorax chat --adapter {name} --url {url}\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "messages": '
        f'[{{"role": "user", "content": "Hello!"}}]}}\'',
        highlight=False,
        markup=False,
        soft_wrap=True,  # a hard-wrapped command cannot be pasted
    )
