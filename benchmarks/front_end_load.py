"""The load of the front-end benchmark, in a process of its own on another core.

Two loads: requests that arrive by a Poisson process and are answered whole, and streams that are
all open at once. Both read the stand-in engine's stamps from the answers' text. Reads one JSON
object (``{"kind": ..., **fields}``) a line from its input, writes one a line.

It collects no garbage: a pause of its own would look like one of the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.front_end_engine import stamps_in

_LAST = b"data: [DONE]\n\n"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_JSON = {"Content-Type": "application/json"}
_DEADLINE_S = 60.0  # beyond what a load lasts by itself


class LoadFailed(Exception):
    """An answer was not what was asked for; the figure would be of something else."""


@dataclass(frozen=True)
class Arrivals:
    """``num_tokens`` None: GET /ping instead of a chat."""

    port: int
    server_pid: int
    rate_per_s: float
    seconds: float
    num_tokens: int | None
    seed: str


@dataclass(frozen=True)
class Arrived:
    """``beyond_s``: from sent to received, less the stand-in's own time; of each request.

    ``late_s``: how long after its time each was sent, which is this process's own fault.
    """

    beyond_s: tuple[float, ...]
    late_s: tuple[float, ...]
    seconds: float
    server_cpu_s: float


@dataclass(frozen=True)
class Streams:
    """``num_streams`` begin within ``ramp_s``, evenly."""

    port: int
    server_pid: int
    num_streams: int
    num_tokens: int
    ramp_s: float


@dataclass(frozen=True)
class Streamed:
    """``late_s`` of every token: from due to received. ``rates`` of every stream: tokens/s."""

    late_s: tuple[float, ...]
    rates: tuple[float, ...]
    num_broken: int  # streams that did not bring all of their tokens and the end
    seconds: float
    server_cpu_s: float


# ---- whole answers


async def run_arrivals(load: Arrivals) -> Arrived:
    draw = random.Random(load.seed)
    gaps_s = (draw.expovariate(load.rate_per_s) for _ in itertools.count())
    times_s = list(itertools.takewhile(load.seconds.__gt__, itertools.accumulate(gaps_s)))
    base_url = f"http://127.0.0.1:{load.port}"
    async with aiohttp.ClientSession(base_url, connector=aiohttp.TCPConnector(limit=0)) as session:
        ask = _ping if load.num_tokens is None else _chat(load.num_tokens)
        start_s, start_cpu_s = time.monotonic(), _cpu_s(load.server_pid)
        async with asyncio.timeout(load.seconds + _DEADLINE_S), asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(_one(session, start_s + after_s, ask)) for after_s in times_s
            ]
        seconds, cpu_s = time.monotonic() - start_s, _cpu_s(load.server_pid) - start_cpu_s
    found = [task.result() for task in asked]
    return Arrived(
        beyond_s=tuple(beyond_s for beyond_s, _ in found),
        late_s=tuple(late_s for _, late_s in found),
        seconds=seconds,
        server_cpu_s=cpu_s,
    )


Ask = Callable[[aiohttp.ClientSession], Awaitable[float]]


async def _one(session: aiohttp.ClientSession, at_s: float, ask: Ask) -> tuple[float, float]:
    """(seconds beyond the stand-in's, seconds sent too late)."""
    await asyncio.sleep(at_s - time.monotonic())
    sent_s = time.monotonic()
    own_s = await ask(session)
    return time.monotonic() - sent_s - own_s, sent_s - at_s


async def _ping(session: aiohttp.ClientSession) -> float:
    async with session.get("/ping") as response:
        await response.read()
    if response.status != 200:
        raise LoadFailed(f"/ping: status {response.status}")
    return 0.0


def _chat(num_tokens: int) -> Ask:
    body = chat_body(num_tokens, stream=False)

    async def ask(session: aiohttp.ClientSession) -> float:
        """Returns the time that the stand-in took, as its stamps say."""
        async with session.post("/v1/chat/completions", data=body, headers=_JSON) as response:
            answer = await response.read()
        stamps = stamps_in(answer)
        if response.status != 200 or len(stamps) != num_tokens:
            raise LoadFailed(
                f"status {response.status}, {len(stamps)} tokens of {num_tokens}: {answer[-300:]!r}"
            )
        return (stamps[-1].due_us - stamps[0].arrived_us) / 1e6

    return ask


def chat_body(num_tokens: int, stream: bool) -> bytes:
    """A short chat with the fields that clients send."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant. " * 8},
        {"role": "user", "content": "What do you know about the sea and the weather? " * 12},
    ]
    sampling = {"temperature": 0.7, "top_p": 0.95, "seed": 1, "stop": ["\n\n\n"]}
    asked = {"model": "", "messages": messages, "max_tokens": num_tokens, "stream": stream}
    return json.dumps(asked | sampling).encode()


# ---- streams


async def run_streams(load: Streams) -> Streamed:
    body = chat_body(load.num_tokens, stream=True)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    start_s, start_cpu_s = time.monotonic(), _cpu_s(load.server_pid)
    gap_s = load.ramp_s / load.num_streams
    async with asyncio.TaskGroup() as tasks:
        opened = [
            tasks.create_task(_received(load, head.encode() + body, start_s + i * gap_s))
            for i in range(load.num_streams)
        ]
    seconds, cpu_s = time.monotonic() - start_s, _cpu_s(load.server_pid) - start_cpu_s
    streams = [stream_of(task.result()) for task in opened]
    whole = [stream for stream in streams if stream.is_whole(load.num_tokens)]
    if not whole:
        first = b"".join(data for _, data in opened[0].result())
        raise LoadFailed(f"no stream was whole; the first ends in {first[-300:]!r}")
    return Streamed(
        late_s=tuple(late_s for stream in streams for late_s in stream.late_s),
        rates=tuple(stream.tokens_per_s for stream in whole),
        num_broken=load.num_streams - len(whole),
        seconds=seconds,
        server_cpu_s=cpu_s,
    )


Pieces = list[tuple[float, bytes]]


class _Receiver(asyncio.Protocol):
    """Keeps what comes with its time, and reads it when all is over: that costs the least."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: Pieces = []
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def _received(load: Streams, request: bytes, at_s: float) -> Pieces:
    """What came until the server closed, or until it is too late."""
    await asyncio.sleep(at_s - time.monotonic())
    loop = asyncio.get_running_loop()
    transport, receiver = await loop.create_connection(
        lambda: _Receiver(request), "127.0.0.1", load.port
    )
    await asyncio.wait([receiver.closed], timeout=_DEADLINE_S)
    transport.abort()
    return receiver.pieces


@dataclass(frozen=True)
class _Stream:
    """One stream's tokens: how late each came, and when."""

    late_s: tuple[float, ...]
    times_s: tuple[float, ...]
    is_ended: bool

    def is_whole(self, num_tokens: int) -> bool:
        return self.is_ended and len(self.late_s) == num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Infinite when all came at once."""
        seconds = self.times_s[-1] - self.times_s[0]
        return (len(self.times_s) - 1) / seconds if seconds else float("inf")


def stream_of(pieces: Pieces) -> _Stream:
    """A token came with the piece that ends it."""
    answer = b"".join(data for _, data in pieces)
    ends = list(itertools.accumulate(len(data) for _, data in pieces))
    late_s, times_s = [], []
    for stamp in stamps_in(answer):
        came_s = pieces[bisect.bisect_left(ends, stamp.end)][0]
        times_s.append(came_s)
        late_s.append(came_s - stamp.due_us / 1e6)
    return _Stream(tuple(late_s), tuple(times_s), _LAST in answer)


def _cpu_s(pid: int) -> float:
    """User and system time: fields 14 and 15 of proc(5); the name before may hold spaces."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


# ---- the process

_KINDS: dict[str, Callable[[dict[str, Any]], Awaitable[Arrived | Streamed]]] = {
    "arrivals": lambda fields: run_arrivals(Arrivals(**fields)),
    "streams": lambda fields: run_streams(Streams(**fields)),
}


async def _run(kind: str, fields: dict[str, Any]) -> Arrived | Streamed:
    return await _KINDS[kind](fields)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, required=True)
    os.sched_setaffinity(0, {parser.parse_args().core})
    gc.disable()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        print(json.dumps(asdict(asyncio.run(_run(asked.pop("kind"), asked)))), flush=True)


if __name__ == "__main__":
    _main()
