"""Which jlorax this is. Plain."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def own_version() -> str:
    """ "unknown" from a source tree that is not installed."""
    try:
        return version("jlorax")
    except PackageNotFoundError:
        return "unknown"
