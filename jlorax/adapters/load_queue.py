"""What is to be loaded, in what order, and how many at once. Plain; the cache actor's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from jlorax.types import AdapterVersion


class Urgency(IntEnum):
    """Smaller goes first."""

    ACQUIRED = 0  # holds a place in line for a slot
    ASKED = 1  # a caller of the adapter API waits
    PREFETCH = 2  # a queued request will want it


@dataclass(eq=False)
class Ticket:
    """A load that runs. ``is_wanted`` is written here and read by the thread that loads."""

    version: AdapterVersion
    is_wanted: bool = True


class LoadQueue:
    """One load of a version at a time, however many want it."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._waiting: dict[Urgency, dict[AdapterVersion, None]] = {u: {} for u in Urgency}
        self._running: dict[AdapterVersion, Ticket] = {}

    def __contains__(self, version: object) -> bool:
        return version in self._running or any(version in w for w in self._waiting.values())

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, version: AdapterVersion, urgency: Urgency) -> None:
        ticket = self._running.get(version)
        if ticket is not None:
            ticket.is_wanted = True
            return
        for other, waiting in self._waiting.items():
            if version in waiting:
                if other <= urgency:
                    return
                del waiting[version]
        self._waiting[urgency][version] = None

    def drop(self, version: AdapterVersion) -> None:
        """Nobody wants it any more; a load that runs stops where it can."""
        for waiting in self._waiting.values():
            waiting.pop(version, None)
        if version in self._running:
            self._running[version].is_wanted = False

    def next(self, may_prefetch: bool) -> Ticket | None:
        """The load to start now. None: nothing to do, or enough runs."""
        if len(self._running) >= self._max_running:
            return None
        for urgency, waiting in self._waiting.items():
            if waiting and (may_prefetch or urgency is not Urgency.PREFETCH):
                version = next(iter(waiting))
                del waiting[version]
                ticket = self._running[version] = Ticket(version)
                return ticket
        return None

    def done(self, version: AdapterVersion) -> Ticket:
        """It ended, one way or the other."""
        return self._running.pop(version)
