"""The load of the HTTP benchmark, in a process of its own: streams completions, counts events.

It must cost little, or it would be what is measured: bodies are made before the clock starts, and
an answer is joined and counted when it has ended. Reads one JSON object (``Load``) a line from its
input, writes one (``Answered``) a line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

_EVENT = b"\ndata: "  # JSON holds no bare line end, so no text can look like one
_DONE = b"data: [DONE]\n\n"


class LoadFailed(Exception):
    """An answer was not what was asked for; the figure would be of something else."""


@dataclass(frozen=True)
class Load:
    """``num_requests`` in all, ``num_connections`` of them at once; every prompt its own ids."""

    url: str
    model: str
    vocab_size: int
    num_requests: int
    num_connections: int
    num_in: int
    num_out: int
    seed: str


@dataclass(frozen=True)
class Answered:
    """Seconds from the first request to the last byte, and from each request to its first bytes."""

    seconds: float
    num_tokens: int
    num_bytes: int
    first_s: tuple[float, ...]


async def run(load: Load) -> Answered:
    waiting = iter(list(_bodies(load)))
    connector = aiohttp.TCPConnector(limit=load.num_connections)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            workers = [
                tasks.create_task(_work(session, load, waiting))
                for _ in range(load.num_connections)
            ]
        seconds = time.perf_counter() - start_s
    answers = [answer for worker in workers for answer in worker.result()]
    return Answered(
        seconds=seconds,
        num_tokens=len(answers) * load.num_out,
        num_bytes=sum(num_bytes for _, num_bytes in answers),
        first_s=tuple(first_s for first_s, _ in answers),
    )


def _bodies(load: Load) -> Iterator[bytes]:
    """Token ids for prompts, greedy, and the end of text ignored: the same work for everybody."""
    draw = random.Random(load.seed)
    ids = range(load.vocab_size // 100, load.vocab_size)
    for _ in range(load.num_requests):
        body = {
            "model": load.model,
            "prompt": draw.choices(ids, k=load.num_in),
            "max_tokens": load.num_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        yield json.dumps(body).encode()


async def _work(
    session: aiohttp.ClientSession, load: Load, waiting: Iterator[bytes]
) -> list[tuple[float, int]]:
    """One connection: the next request when the last is answered."""
    return [await _one(session, load, body) for body in waiting]


async def _one(session: aiohttp.ClientSession, load: Load, body: bytes) -> tuple[float, int]:
    """(seconds to the first bytes, bytes)."""
    start_s, first_s = time.perf_counter(), 0.0
    pieces: list[bytes] = []
    headers = {"Content-Type": "application/json"}
    async with session.post(load.url + "/v1/completions", data=body, headers=headers) as response:
        async for piece in response.content.iter_any():
            if not pieces:
                first_s = time.perf_counter() - start_s
            pieces.append(piece)
    answer = b"".join(pieces)
    num_events = (b"\n" + answer).count(_EVENT) - 1
    if response.status != 200 or num_events != load.num_out or not answer.endswith(_DONE):
        raise LoadFailed(
            f"status {response.status}, {num_events} events of {load.num_out}: {answer[-300:]!r}"
        )
    return first_s, len(answer)


def _main() -> None:
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        print(json.dumps(asdict(asyncio.run(run(Load(**asked))))), flush=True)


if __name__ == "__main__":
    _main()
