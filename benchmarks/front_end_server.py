"""A server of the front-end benchmark, in a process of its own on one core.

The whole HTTP server of ``jlorax serve``, with its garbage collection, over a stand-in engine.
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

from benchmarks.front_end_engine import DelayEngine, StandInEngine, StepEngine
from jlorax.config import ServerConfig
from jlorax.tokenizer import Tokenizer
from servers.rest import OBJECTS_PER_COLLECTION, create_app, run_server
from servers.serving import ServedEngine

LISTENING = "listening"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    clock = parser.add_mutually_exclusive_group(required=True)
    clock.add_argument("--delay-s", type=float, help="a DelayEngine's")
    clock.add_argument("--step-s", type=float, help="a StepEngine's")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    logging.basicConfig(level=logging.INFO)  # a line a request, as the command line has it
    engine = _engine(arguments)
    gc.freeze()
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    asyncio.run(_serve(engine, arguments.port))


def _engine(arguments: argparse.Namespace) -> StandInEngine:
    tokenizer, model_id = Tokenizer.load(arguments.model), arguments.model.name
    if arguments.delay_s is not None:
        return DelayEngine(tokenizer, model_id, arguments.delay_s)
    return StepEngine(tokenizer, model_id, arguments.step_s)


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
