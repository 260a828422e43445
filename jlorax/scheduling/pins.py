"""Which adapters the scheduler holds in the bank: a plain book; the cache actor loads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jlorax.layout import LoraReach
from jlorax.types import AdapterVersion


@dataclass(frozen=True)
class PinChanges:
    acquire: tuple[AdapterVersion, ...]
    release: tuple[AdapterVersion, ...]


class PinBook:
    """At most ``max_pins`` distinct adapters at a time, the first in the scheduler's own order.

    Every acquire is answered once, by ``ready`` or ``failed``. One that nobody wants any more is
    kept until then, and released if it came to a slot.
    """

    def __init__(self, max_pins: int) -> None:
        self._max_pins = max_pins
        self._slots: dict[AdapterVersion, int | None] = {}  # None: asked for
        self._reach: dict[AdapterVersion, LoraReach] = {}

    def slot(self, version: AdapterVersion) -> int | None:
        return self._slots.get(version)

    def holds(self, version: AdapterVersion) -> bool:
        """Ready or asked for."""
        return version in self._slots

    def is_asked(self, version: AdapterVersion | None) -> bool:
        return version in self._slots and self._slots[version] is None

    @property
    def ready_versions(self) -> list[AdapterVersion]:
        return [version for version, slot in self._slots.items() if slot is not None]

    def reach(self, version: AdapterVersion | None) -> LoraReach:
        """Of one that is ready, or of the base model."""
        return LoraReach.NONE if version is None else self._reach[version]

    def ready(self, version: AdapterVersion, slot: int, reach: LoraReach = LoraReach.ALL) -> None:
        self._slots[version] = slot
        self._reach[version] = reach

    def failed(self, version: AdapterVersion) -> None:
        del self._slots[version]

    def update(self, wanted: Iterable[AdapterVersion]) -> PinChanges:
        """Wanted versions in order -> what to ask the cache for."""
        window = self._first(wanted)
        acquire = tuple(version for version in window if version not in self._slots)
        release = tuple(
            version
            for version, slot in self._slots.items()
            if version not in window and slot is not None
        )
        for version in release:
            del self._slots[version], self._reach[version]
        self._slots.update(dict.fromkeys(acquire))
        return PinChanges(acquire, release)

    def _first(self, wanted: Iterable[AdapterVersion]) -> dict[AdapterVersion, None]:
        window: dict[AdapterVersion, None] = {}
        for version in wanted:
            window[version] = None
            if len(window) == self._max_pins:
                break
        return window
