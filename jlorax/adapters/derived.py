"""Adapters that requests made of others: merges, and adapters at another scale. Plain.

They are found by their content and have no name: nobody lists, pins or unloads one. Kept here is
what they are made of; their weights go through the tiers like any adapter's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from jlorax.types import AdapterVersion

if TYPE_CHECKING:
    from jlorax.adapters.registry import AdapterRecord

MAX_UNUSED = 1024  # more than requests are between resolving and loading at any time


class DerivedVersions:
    """At most ``max_unused`` that no request uses; the least recently resolved go first."""

    def __init__(self, max_unused: int = MAX_UNUSED) -> None:
        self._max_unused = max_unused
        self._records: OrderedDict[AdapterVersion, AdapterRecord] = OrderedDict()
        self._parts: dict[AdapterVersion, tuple[AdapterVersion, ...]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, version: AdapterVersion) -> AdapterRecord | None:
        return self._records.get(version)

    def parts(self, version: AdapterVersion) -> tuple[AdapterVersion, ...]:
        """What it was last made of; none for what is not derived."""
        return self._parts.get(version, ())

    def made_of(self, part: AdapterVersion) -> list[AdapterVersion]:
        return [version for version, parts in self._parts.items() if part in parts]

    def resolved(self, record: AdapterRecord, parts: Iterable[AdapterVersion]) -> None:
        """A request asks for it, now made of these: equal content may have a newer version."""
        self._records[record.version] = record
        self._records.move_to_end(record.version)
        self._parts[record.version] = tuple(parts)

    def forget_unused(self, is_used: Callable[[AdapterVersion], bool]) -> list[AdapterVersion]:
        """Those that went, for the owner's other books."""
        if len(self) <= self._max_unused:
            return []
        unused = [version for version in self._records if not is_used(version)]
        gone = unused[: max(0, len(unused) - self._max_unused)]
        for version in gone:
            del self._records[version], self._parts[version]
        return gone
