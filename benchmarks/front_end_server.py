"""The server of the front-end benchmark, in a process of its own on one core.

The whole HTTP server of ``jlorax serve``, with its garbage collection, over the stand-in engine.
Prints a line when it listens; ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
from pathlib import Path
from typing import cast

from benchmarks.front_end_engine import StandInEngine
from jlorax.config import ServerConfig
from jlorax.tokenizer import Tokenizer
from servers.rest import create_app, run_server
from servers.serving import ServedEngine

LISTENING = "listening"
_OBJECTS_PER_COLLECTION = 20_000  # as servers.serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    logging.basicConfig(level=logging.INFO)  # a line a request, as the command line has it
    engine = StandInEngine(Tokenizer.load(arguments.model), arguments.model.name, arguments.step_s)
    gc.freeze()
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    asyncio.run(_serve(engine, arguments.port))


async def _serve(engine: StandInEngine, port: int) -> None:
    listening = asyncio.Event()
    app = create_app(cast(ServedEngine, engine), ServerConfig())
    clock = asyncio.create_task(engine.run())
    telling = asyncio.create_task(_tell(listening))
    await run_server(app, "127.0.0.1", port, listening)
    for task in (clock, telling):
        task.cancel()


async def _tell(listening: asyncio.Event) -> None:
    await listening.wait()
    print(LISTENING, flush=True)


if __name__ == "__main__":
    main()
