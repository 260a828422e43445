"""What every kind of remote offers, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jlorax.adapters.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from jlorax.errors import AdapterInvalid, InvalidAdapterId

CHANGED = "changed while it was loaded"


@dataclass(frozen=True)
class Described:
    """What an adapter is now, without its weights."""

    identity: str  # equal exactly when the content is; a key of the disk tier's index
    config: bytes  # adapter_config.json
    weights_bytes: int  # as the source says
    weights_etag: str  # as the source names the weights' content, without quotes; "": it does not
    weights_digest: str | None = None  # "sha256:..." or "md5:..."; None: unknown


class RemoteSource(Protocol):
    def describe(self, adapter_id: str) -> Described:
        """Raises InvalidAdapterId, AdapterNotFound, AdapterInvalid or SourceUnavailable."""

    def fetch(self, adapter_id: str, described: Described, folder: Path, max_bytes: int) -> None:
        """Writes both files of exactly that content into ``folder``, or leaves none there.

        max_bytes: of weights. Raises AdapterInvalid (too large, changed) or SourceUnavailable.
        """


def check_path(adapter_id: str, path: str) -> None:
    """Raises InvalidAdapterId for a path that might lead elsewhere than below where it is put."""
    for part in path.split("/"):
        if part in ("", ".", "..") or not part.isprintable():
            raise InvalidAdapterId(f"{adapter_id!r} is no adapter id: it has the part {part!r}")


def check_weights_size(adapter_id: str, described: Described, max_bytes: int) -> None:
    if described.weights_bytes > max_bytes:
        raise AdapterInvalid(
            adapter_id,
            WEIGHTS_FILE,
            f"it has {described.weights_bytes} bytes, more than the {max_bytes} that an adapter of "
            "the allowed rank on this model can need",
        )


def config_too_large(adapter_id: str) -> AdapterInvalid:
    return AdapterInvalid(adapter_id, CONFIG_FILE, f"it has more than {MAX_CONFIG_BYTES} bytes")


def weights_missing(adapter_id: str, unsafe_file: str | None) -> AdapterInvalid:
    """``unsafe_file``: weights that are there, but as a pickle."""
    reason = "is missing"
    if unsafe_file is not None:
        reason += f"; {unsafe_file} is an unsafe format (pickle), only safetensors is read"
    return AdapterInvalid(adapter_id, WEIGHTS_FILE, reason)
