"""Which adapters the scheduler holds in the bank: a plain book; the cache actor does the loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jlorax.types import AdapterVersion


@dataclass
class Pin:
    """One adapter asked for. ``slot`` None: on its way; then ``waits_since_s`` is set when its
    weights are here and every slot is taken."""

    slot: int | None = None
    waits_since_s: float | None = None


@dataclass(frozen=True)
class PinChanges:
    acquire: tuple[AdapterVersion, ...]
    release: tuple[AdapterVersion, ...]


class PinBook:
    """At most ``max_pins`` distinct adapters at a time, the first in the scheduler's own order."""

    def __init__(self, max_pins: int) -> None:
        self._max_pins = max_pins
        self._pins: dict[AdapterVersion, Pin] = {}

    def slot(self, version: AdapterVersion) -> int | None:
        pin = self._pins.get(version)
        return None if pin is None else pin.slot

    def waits_for_slot_since(self, version: AdapterVersion) -> float | None:
        pin = self._pins.get(version)
        return None if pin is None else pin.waits_since_s

    def ready(self, version: AdapterVersion, slot: int) -> None:
        self._pins[version] = Pin(slot)

    def waits_for_slot(self, version: AdapterVersion, now_s: float) -> None:
        self._pins[version].waits_since_s = now_s

    def failed(self, version: AdapterVersion) -> None:
        del self._pins[version]

    def update(self, wanted: Iterable[AdapterVersion]) -> PinChanges:
        """Wanted versions in order -> what to ask the cache for. Running ones come first."""
        window = self._first(wanted)
        acquire = tuple(version for version in window if version not in self._pins)
        release = tuple(
            version
            for version, pin in self._pins.items()
            if version not in window and pin.slot is not None
        )
        for version in release:
            del self._pins[version]
        self._pins.update((version, Pin()) for version in acquire)
        return PinChanges(acquire, release)

    def _first(self, wanted: Iterable[AdapterVersion]) -> dict[AdapterVersion, None]:
        window: dict[AdapterVersion, None] = {}
        for version in wanted:
            if len(window) == self._max_pins:
                break
            window[version] = None
        return window

    def num_held(self) -> int:
        return sum(pin.slot is not None for pin in self._pins.values())
