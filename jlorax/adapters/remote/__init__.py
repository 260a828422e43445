"""Adapters that live elsewhere: a Hugging Face hub, or S3. Plain and blocking; called in threads.

    describe   what the adapter is now: two small requests, no weights
    fetch      its two files into a folder, verified against that description, or nothing

A request names an id below a remote of the server's configuration, never a URL.
"""

from __future__ import annotations

from jlorax.adapters.remote.settings import FetchLimits, Remote, S3Location, parse_remote
from jlorax.adapters.remote.source import Described, RemoteSource

__all__ = [
    "Described",
    "FetchLimits",
    "Remote",
    "RemoteSource",
    "S3Location",
    "open_remote",
    "parse_remote",
]

_DEFAULT_LIMITS = FetchLimits()


def open_remote(remote: Remote, limits: FetchLimits = _DEFAULT_LIMITS) -> RemoteSource:
    """Connects to nothing yet. Safe to use from several threads."""
    # Imported here: a server without remotes needs no HTTP client.
    if remote.s3 is None:
        from jlorax.adapters.remote.hub import HubSource

        return HubSource(remote.name, limits)
    from jlorax.adapters.remote.s3 import S3Source

    return S3Source(remote.name, remote.s3, limits)
