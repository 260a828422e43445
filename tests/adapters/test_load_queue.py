"""Which load is next: by urgency, then by arrival; one at a time of a version."""

from __future__ import annotations

from jlorax.adapters.load_queue import LoadQueue, Urgency
from jlorax.types import AdapterVersion


def v(name: str) -> AdapterVersion:
    return AdapterVersion("default", name, 1)


def drawn(queue: LoadQueue, may_prefetch: bool = True) -> list[str]:
    """Everybody who may start, in order."""
    found = []
    while ticket := queue.next(may_prefetch):
        found.append(ticket.version.adapter_id)
    return found


def test_urgency_goes_before_arrival_and_may_rise() -> None:
    queue = LoadQueue(10)
    for name in "abc":
        queue.add(v(name), Urgency.PREFETCH)
    queue.add(v("d"), Urgency.ASKED)
    queue.add(v("c"), Urgency.ACQUIRED)
    queue.add(v("c"), Urgency.PREFETCH)  # which takes nothing back
    assert drawn(queue) == ["c", "d", "a", "b"]


def test_prefetches_wait_while_they_may_not_start() -> None:
    queue = LoadQueue(10)
    queue.add(v("a"), Urgency.PREFETCH)
    queue.add(v("b"), Urgency.ACQUIRED)
    assert drawn(queue, may_prefetch=False) == ["b"]
    assert drawn(queue) == ["a"]


def test_so_many_at_once_and_each_once() -> None:
    queue = LoadQueue(2)
    for name in "abca":
        queue.add(v(name), Urgency.PREFETCH)
    assert drawn(queue) == ["a", "b"] and queue.num_running == 2
    queue.add(v("a"), Urgency.ACQUIRED)
    assert queue.next(True) is None
    queue.done(v("a"))
    assert drawn(queue) == ["c"] and v("c") in queue and v("a") not in queue


def test_who_is_dropped_does_not_start_or_is_not_wanted() -> None:
    queue = LoadQueue(1)
    queue.add(v("a"), Urgency.PREFETCH)
    queue.add(v("b"), Urgency.PREFETCH)
    ticket = queue.next(True)
    assert ticket is not None and ticket.is_wanted
    queue.drop(v("a"))
    queue.drop(v("b"))
    assert not ticket.is_wanted
    queue.add(v("a"), Urgency.ACQUIRED)
    assert ticket.is_wanted
    queue.done(v("a"))
    assert queue.next(True) is None
