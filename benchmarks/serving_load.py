"""Puts a workload on a target and notes when each token came. A failed request is noted too.

Open loop: an answer's time counts from when its request was meant to be sent, not from when it was
(coordinated omission). Closed with a limit: from when one of the senders got to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.serving_metrics import came_from, read
from benchmarks.serving_targets import AskFailed, Target
from benchmarks.workload import DEFAULT_TENANT, Arrival, Workload

NameOf = Callable[[int], str]
Answered = Callable[[], None]
_TOUCHES_AT_ONCE = 16
_TOUCH_PROMPT = tuple(range(3, 19))
LOADS_PER_S = 20.0
LOAD_KINDS = ("none", "prefetched", "resident", "cold")
_RECENT_SHARE = 4  # a quarter of the adapters comes round again while they are in RAM
_RECENT_ROUNDS = 2


@dataclass
class Answer:
    """Seconds are of time.perf_counter. ``error`` None: all ``arrival.num_out`` tokens came."""

    arrival: Arrival
    start_s: float
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # a token is there, or the end


@dataclass(frozen=True)
class Answers:
    """One run. ``start_s`` is second 0 of its arrivals."""

    start_s: float
    found: tuple[Answer, ...]


async def run(
    target: Target, workload: Workload, name_of: NameOf, answered: Answered = lambda: None
) -> Answers:
    start_s = time.perf_counter()
    if workload.max_at_once is not None:
        found = await _taking_turns(target, workload, name_of, answered)
    else:
        found = await _in_time(target, workload.arrivals, name_of, answered, start_s)
    return Answers(start_s, tuple(found))


async def _in_time(
    target: Target,
    arrivals: Iterable[Arrival],
    name_of: NameOf,
    answered: Answered,
    start_s: float,
) -> list[Answer]:
    tasks: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            at_s = start_s + arrival.at_s
            if (wait_s := at_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            asked = _ask(target, Answer(arrival, at_s), name_of, answered)
            tasks.append(group.create_task(asked))
    return [task.result() for task in tasks]


async def _taking_turns(
    target: Target, workload: Workload, name_of: NameOf, answered: Answered
) -> list[Answer]:
    waiting = iter(workload.arrivals)
    found: list[Answer] = []

    async def send() -> None:
        for arrival in waiting:
            answer = Answer(arrival, time.perf_counter())
            found.append(await _ask(target, answer, name_of, answered))

    async with asyncio.TaskGroup() as group:
        for _ in range(workload.max_at_once or 1):
            group.create_task(send())
    return found


async def _ask(
    target: Target, answer: Answer, name_of: NameOf, answered: Answered = lambda: None
) -> Answer:
    """Whatever goes wrong is that answer's error; the others go on."""
    arrival, times_s = answer.arrival, answer.token_times_s
    name = name_of(arrival.adapter)
    try:
        async for _ in target.tokens(name, arrival.tenant, arrival.prompt, arrival.num_out):
            times_s.append(time.perf_counter())
            answer.begun.set()
        if len(times_s) != arrival.num_out:
            answer.error = "short answer"
    except AskFailed as error:
        answer.error = error.code
    except Exception as error:
        answer.error = type(error).__name__
    answer.begun.set()
    answered()
    return answer


async def touch(target: Target, adapters: Sequence[int], name_of: NameOf) -> Answers:
    """Asks each once for a token, so that none of them is cold."""
    arrivals = tuple(
        Arrival(0.0, adapter, DEFAULT_TENANT, _TOUCH_PROMPT, 1) for adapter in adapters
    )
    return await run(target, Workload("", arrivals, _TOUCHES_AT_ONCE), name_of)


# ---- a steady batch, with and without loads beside it


@dataclass(frozen=True)
class Beside:
    """Gaps between the steady batch's tokens, in s, by who came meanwhile (``LOAD_KINDS``)."""

    gaps_s: dict[str, list[float]]
    num_visits: dict[str, int]
    errors: tuple[str, ...]
    num_cold_adapters_left: int


async def beside_loads(
    target: Target,
    workload: Workload,
    name_of: NameOf,
    num_adapters: int,
    num_rounds: int,
    answered: Answered = lambda: None,
) -> Beside:
    """The steady batch again and again; while it decodes nobody comes, or adapters that nobody
    touched are loaded into RAM, or one-token requests come for one of its own adapters, or each
    for an adapter that nobody touched.

    Kinds take turns, so that what drifts does so for all; contexts are equally long in each.
    """
    steady = workload.adapters
    cold = iter(sorted(set(range(num_adapters)) - set(steady)))

    async def ask(adapter: int, at_s: float) -> str | None:
        arrival = Arrival(0.0, adapter, DEFAULT_TENANT, _TOUCH_PROMPT, 1)
        return (await _ask(target, Answer(arrival, at_s), name_of)).error

    async def prefetch(adapter: int, at_s: float) -> str | None:
        try:
            await target.prefetch(name_of(adapter))
        except AskFailed as error:
            return error.code
        return None

    visitors = {
        "none": _Visitors(iter(()), ask),
        "prefetched": _Visitors(cold, prefetch),
        "resident": _Visitors(_always(steady[0]), ask),
        "cold": _Visitors(cold, ask),
    }
    gaps_s: dict[str, list[float]] = {kind: [] for kind in LOAD_KINDS}
    num_visits = dict.fromkeys(LOAD_KINDS, 0)
    errors: list[str] = []
    await touch(target, steady, name_of)
    for _ in range(num_rounds):
        for kind in LOAD_KINDS:
            coming = visitors[kind]
            gaps, visits, failed = await _beside(target, workload, name_of, coming, answered)
            gaps_s[kind] += gaps
            num_visits[kind] += visits
            errors += failed
    return Beside(gaps_s, num_visits, tuple(errors), sum(1 for _ in cold))


@dataclass(frozen=True)
class _Visitors:
    """Which adapters are wanted in turn, and what is done for one: (adapter, when) -> an error."""

    turns: Iterator[int]
    visit: Callable[[int, float], Coroutine[None, None, str | None]]


def _always(adapter: int) -> Iterator[int]:
    while True:
        yield adapter


async def _beside(
    target: Target,
    workload: Workload,
    name_of: NameOf,
    visitors: _Visitors,
    answered: Answered,
) -> tuple[list[float], int, list[str]]:
    """(gaps in s while all were decoding, visits, errors)."""
    answers = [Answer(arrival, time.perf_counter()) for arrival in workload.arrivals]
    async with asyncio.TaskGroup() as group:
        batch = [group.create_task(_ask(target, answer, name_of, answered)) for answer in answers]
        for answer in answers:
            await answer.begun.wait()
        begun_s = time.perf_counter()
        async with _visiting(visitors) as visits:
            await asyncio.wait(batch)
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in pairwise(answer.token_times_s)
        if earlier >= begun_s
    ]
    failed = [answer.error for answer in answers] + [visit.result() for visit in visits]
    return gaps, len(visits), [error for error in failed if error is not None]


@asynccontextmanager
async def _visiting(visitors: _Visitors) -> AsyncIterator[list[asyncio.Task[str | None]]]:
    """Come at their rate while the body runs; whoever is still there at its end is seen out."""
    ended = asyncio.Event()
    visits: list[asyncio.Task[str | None]] = []
    async with asyncio.TaskGroup() as group:

        async def come() -> None:
            next_s = time.perf_counter()
            for adapter in visitors.turns:
                visits.append(group.create_task(visitors.visit(adapter, next_s)))
                next_s += 1 / LOADS_PER_S
                try:
                    await asyncio.wait_for(ended.wait(), max(0.0, next_s - time.perf_counter()))
                except TimeoutError:
                    continue
                return

        group.create_task(come())
        try:
            yield visits
        finally:
            ended.set()


# ---- one request at a time


@dataclass(frozen=True)
class Probe:
    """``tier``: where the adapter was; "unknown" when the target does not say."""

    tier: str
    ttft_s: float | None
    error: str | None


async def first_tokens(
    target: Target, workload: Workload, name_of: NameOf, answered: Answered = lambda: None
) -> list[Probe]:
    """Each adapter once, from its source; each again and then at once once more, when it is
    resident; then a few in turn, more than the bank holds and fewer than RAM does."""
    arrivals = workload.arrivals
    again = [arrival for arrival in arrivals for _ in range(2)]
    recent = [*arrivals[-_num_recent(workload) :]] * _RECENT_ROUNDS
    found = []
    for arrival in (*arrivals, *again, *recent):
        found.append(await _probe(target, arrival, name_of))
        answered()
    return found


def num_probes(workload: Workload) -> int:
    return 3 * len(workload.arrivals) + _RECENT_ROUNDS * _num_recent(workload)


def _num_recent(workload: Workload) -> int:
    return max(1, len(workload.arrivals) // _RECENT_SHARE)


async def _probe(target: Target, arrival: Arrival, name_of: NameOf) -> Probe:
    before = read(await target.metrics())
    answer = await _ask(target, Answer(arrival, time.perf_counter()), name_of)
    tier = came_from(before, read(await target.metrics()))
    ttft_s = answer.token_times_s[0] - answer.start_s if answer.token_times_s else None
    return Probe(tier, ttft_s, answer.error)
