"""What a name means: (tenant, id) -> version. Single writer: the cache actor.

A name is registered, or is a folder under the adapter root. A version's generation rises when the
files became others (device, inode, size, mtime) or the name was registered anew, so a running
request keeps the weights it started with and a cache never answers with another's.

A miss costs one failed stat, so there is no negative cache to go stale.
"""

from __future__ import annotations

import os
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jlorax.adapters.files import CONFIG_FILE, SourceIdentity, identify, is_unchanged, is_within
from jlorax.adapters.peft import read_config
from jlorax.adapters.peft_config import MAX_RANK, AdapterConfig
from jlorax.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
    InvalidParameter,
)
from jlorax.types import AdapterVersion

BASE_MODEL_ID = "__base_model__"
DEFAULT_TENANT = "default"
LOCAL = "local"
MAX_ID_CHARS = 255
MAX_SUPERSEDED = 4096  # versions that are remembered after a newer one took their name
MAX_SCAN_DEPTH = 3  # "org/name/revision"


@dataclass
class AdapterRecord:
    """One version: where its files are and what its config says. Counts are the registry's."""

    version: AdapterVersion
    folder: Path
    root: Path | None  # links may lead anywhere below it; None: inside the folder only
    source: str  # "registered" | "local"
    identity: SourceIdentity
    config: AdapterConfig
    num_requests: int = 0
    last_used_s: float | None = None  # Unix time

    @property
    def rank(self) -> int:
        return self.config.max_rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self.config.target_names


@dataclass(frozen=True)
class _Name:
    """A name in one place. "x" registered and "x" under the root are two."""

    tenant: str
    adapter_id: str
    source: str


@dataclass
class Registry:
    """Names are unique in a tenant; the tenant "default" is seen by all."""

    adapter_root: Path | None = None
    base_model_id: str | None = None
    max_rank: int = MAX_RANK
    clock: Callable[[], float] = time.time
    _registered: dict[tuple[str, str], Path] = field(default_factory=dict)
    _current: dict[_Name, AdapterRecord] = field(default_factory=dict)
    _superseded: OrderedDict[AdapterVersion, AdapterRecord] = field(default_factory=OrderedDict)
    _by_version: dict[AdapterVersion, AdapterRecord] = field(default_factory=dict)
    _generations: dict[tuple[str, str], int] = field(default_factory=dict)

    def register(
        self, adapter_id: str, folder: Path, tenant: str = DEFAULT_TENANT
    ) -> AdapterVersion:
        """Names a folder. Its files are looked at now; an invalid adapter is not registered."""
        check_id(adapter_id)
        if self._is_reserved(adapter_id):
            raise AdapterConflict(f"{adapter_id!r} is the base model's name")
        if (tenant, adapter_id) in self._registered:
            raise AdapterConflict(f"an adapter named {adapter_id!r} is registered already")
        folder = Path(os.path.abspath(folder))
        name = _Name(tenant, adapter_id, "registered")
        record = self._refresh(name, folder, None)
        self._registered[tenant, adapter_id] = folder
        return record.version

    def unregister(self, adapter_id: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion | None:
        """Forgets a registered name; its last version keeps its record for running requests."""
        if self._registered.pop((tenant, adapter_id), None) is None:
            raise AdapterNotFound(adapter_id)
        record = self._current.pop(_Name(tenant, adapter_id, "registered"), None)
        if record is None:
            return None
        self._supersede(record)
        return record.version

    def registered_version(self, adapter_id: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion:
        """The last version of a registered name, whatever became of its files."""
        record = self._current.get(_Name(tenant, adapter_id, "registered"))
        if record is None:
            raise AdapterNotFound(adapter_id)
        return record.version

    def resolve(self, tenant: str, adapter_id: str, source: str | None = None) -> AdapterVersion:
        """The version that a request of this tenant means by the name, now.

        ``source``: None is a registered name, else a folder of the root; "local" the folder only.
        """
        if source not in (None, LOCAL):
            raise InvalidParameter(
                "adapter_source", f"must be {LOCAL!r} or left out, not {source!r}"
            )
        check_id(adapter_id)
        record = None
        if not self._is_reserved(adapter_id):
            if source is None:
                record = self._find_registered(tenant, adapter_id)
            record = record or self._find_local(adapter_id)
        if record is None:
            raise AdapterNotFound(adapter_id)
        record.num_requests += 1
        record.last_used_s = self.clock()
        return record.version

    def record(self, version: AdapterVersion) -> AdapterRecord:
        """Of any version that resolve gave, also when its name means another one by now."""
        record = self._by_version.get(version)
        if record is None:
            raise AdapterNotFound(version.adapter_id)
        return record

    def folder_under_root(self, path: str) -> Path:
        """A folder that the API may name: as an adapter's id, below the root, nowhere else."""
        check_id(path)
        folder = self._local_folder(path)
        if folder is None:
            raise AdapterNotFound(path)
        return folder

    def list(self) -> list[AdapterRecord]:
        """Registered names and the root's folders; those that cannot be read are left out."""
        found = [
            self._readable(_Name(tenant, adapter_id, "registered"), folder)
            for (tenant, adapter_id), folder in self._registered.items()
        ]
        found += [
            self._readable(_Name(DEFAULT_TENANT, adapter_id, LOCAL), folder)
            for adapter_id, folder in self._scan()
        ]
        return [record for record in found if record is not None]

    def _is_reserved(self, adapter_id: str) -> bool:
        return adapter_id in (BASE_MODEL_ID, self.base_model_id)

    def _find_registered(self, tenant: str, adapter_id: str) -> AdapterRecord | None:
        for owner in (tenant, DEFAULT_TENANT):
            folder = self._registered.get((owner, adapter_id))
            if folder is not None:
                return self._refresh(_Name(owner, adapter_id, "registered"), folder, None)
        return None

    def _find_local(self, adapter_id: str) -> AdapterRecord | None:
        folder = self._local_folder(adapter_id)
        if folder is None:
            return None
        return self._refresh(_Name(DEFAULT_TENANT, adapter_id, LOCAL), folder, self.adapter_root)

    def _local_folder(self, adapter_id: str) -> Path | None:
        """The folder, or None when there is none or a link leads out of the root."""
        if self.adapter_root is None:
            return None
        try:
            folder = (self.adapter_root / adapter_id).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return None
        inside = is_within(folder, self.adapter_root.resolve())
        return folder if inside and folder.is_dir() else None

    def _refresh(self, name: _Name, folder: Path, root: Path | None) -> AdapterRecord:
        """The name's record, a new one when the files are not those it was made from."""
        current = self._current.get(name)
        if current and current.folder == folder and is_unchanged(folder, current.identity):
            return current
        identity = identify(folder, name.adapter_id, root)
        if current and (current.identity, current.folder) == (identity, folder):
            return current
        config = read_config(folder, name.adapter_id, root=root, max_rank=self.max_rank)
        version = self._next_version(name)
        record = AdapterRecord(version, folder, root, name.source, identity, config)
        if current:
            self._supersede(current)
        self._current[name] = self._by_version[version] = record
        return record

    def _next_version(self, name: _Name) -> AdapterVersion:
        key = (name.tenant, name.adapter_id)
        generation = self._generations[key] = self._generations.get(key, 0) + 1
        return AdapterVersion(name.tenant, name.adapter_id, generation)

    def _supersede(self, record: AdapterRecord) -> None:
        self._superseded[record.version] = record
        if len(self._superseded) > MAX_SUPERSEDED:
            version, _ = self._superseded.popitem(last=False)
            del self._by_version[version]

    def _readable(self, name: _Name, folder: Path) -> AdapterRecord | None:
        try:
            return self._refresh(name, folder, self.adapter_root if name.source == LOCAL else None)
        except AdapterInvalid:
            return None

    def _scan(self) -> Iterator[tuple[str, Path]]:
        """(id, folder) of every adapter under the root, in order."""
        if self.adapter_root is None:
            return
        root = self.adapter_root
        for parent, folders, files in os.walk(root):
            adapter_id = Path(parent).relative_to(root).as_posix()
            folders.sort()
            is_adapter = CONFIG_FILE in files and parent != str(root)
            if is_adapter or adapter_id.count("/") >= MAX_SCAN_DEPTH - 1:
                folders.clear()
            yield from self._scanned([adapter_id] if is_adapter else [])
            links = (f for f in folders if os.path.islink(os.path.join(parent, f)))
            yield from self._scanned(
                Path(parent, link).relative_to(root).as_posix() for link in links
            )

    def _scanned(self, adapter_ids: Iterable[str]) -> Iterator[tuple[str, Path]]:
        for adapter_id in adapter_ids:
            folder = self._local_folder(adapter_id)
            if is_valid_id(adapter_id) and not self._is_reserved(adapter_id) and folder:
                yield adapter_id, folder


def check_id(adapter_id: str) -> None:
    """Raises InvalidAdapterId for what can be no name: it might be a path, an URL or an option.

    A name is one or more parts with "/" between them, as on the hub; "a--b/c" is not "a/b--c".
    """
    if (reason := _why_invalid(adapter_id)) is not None:
        shown = adapter_id if len(adapter_id) <= 80 else f"{adapter_id[:77]}..."
        raise InvalidAdapterId(f"{shown!r} is no adapter id: {reason}")


def is_valid_id(adapter_id: str) -> bool:
    return _why_invalid(adapter_id) is None


def _why_invalid(adapter_id: str) -> str | None:
    if not adapter_id:
        return "it is empty"
    if len(adapter_id) > MAX_ID_CHARS:
        return f"it has {len(adapter_id)} characters, more than {MAX_ID_CHARS}"
    if bad := next((c for c in adapter_id if _is_bad(c)), None):
        return f"it has the character {bad!r}"
    for part in adapter_id.split("/"):
        if not part.strip("."):
            return f"it has the part {part!r}"
        if part.startswith("-") or part != part.strip():
            return "a part of it begins with '-' or has a blank at an end"
    return None


def _is_bad(char: str) -> bool:
    """':' is in every URL and drive letter, '%' in every escape; Cc, Cf, Zl... are invisible."""
    return char in "\\:%" or (char != " " and unicodedata.category(char)[0] in "CZ")
