"""What a name means: (tenant, id) -> version. Single writer: the cache actor.

A name is registered, is a folder under the adapter root, or is one that a remote knows
(``remote_names`` asks it). A version's generation rises when the content became another (of a
file: device, inode, size, mtime) or the name was registered anew, so a running request keeps the
weights it started with and a cache never answers with another's.

A miss costs one failed stat, so there is no negative cache of folders to go stale.
"""

from __future__ import annotations

import os
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jlorax.adapters.derived import DerivedVersions
from jlorax.adapters.files import CONFIG_FILE, identify, is_unchanged, is_within
from jlorax.adapters.merge import merged_config
from jlorax.adapters.peft import read_config
from jlorax.adapters.peft_config import MAX_RANK, AdapterConfig, parse_config
from jlorax.adapters.remote import Described
from jlorax.adapters.sources import LocalFiles, MergedFiles, Origin, OriginalFiles, RemoteFiles
from jlorax.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
)
from jlorax.types import AdapterMerge, AdapterVersion

BASE_MODEL_ID = "__base_model__"
DEFAULT_TENANT = "default"
REGISTERED, LOCAL, MERGED = "registered", "local", "merged"
MAX_ID_CHARS = 255
MAX_SUPERSEDED = 4096  # versions that are remembered after a newer one took their name
MAX_SCAN_DEPTH = 3  # "org/name/revision"


@dataclass(slots=True)
class AdapterRecord:
    """One version: where its files are and what its config says. Counts are the registry's."""

    version: AdapterVersion
    source: str  # REGISTERED, LOCAL, MERGED, or a remote's name
    origin: Origin
    config: AdapterConfig
    num_requests: int = 0
    last_used_s: float | None = None  # Unix time

    @property
    def rank(self) -> int:
        return self.config.max_rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self.config.target_names


@dataclass(frozen=True, slots=True)
class _Name:
    """A name in one place. "x" registered and "x" under the root are two."""

    tenant: str
    adapter_id: str
    source: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What a name's folder holds; ``fresh`` None: what its record says."""

    name: _Name
    fresh: tuple[LocalFiles, AdapterConfig] | None


@dataclass
class Registry:
    """Names are unique in a tenant; the tenant "default" is seen by all."""

    adapter_root: Path | None = None
    base_model_id: str | None = None
    max_rank: int = MAX_RANK
    clock: Callable[[], float] = time.time
    derived: DerivedVersions = field(default_factory=DerivedVersions)
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
        name = _Name(tenant, adapter_id, REGISTERED)
        record = self._refresh(name, folder, None)
        self._registered[tenant, adapter_id] = folder
        return record.version

    def forget(self, version: AdapterVersion) -> None:
        """Takes a registration back, unless the name means another version by now."""
        name = _Name(version.tenant, version.adapter_id, REGISTERED)
        current = self._current.get(name)
        if current is not None and current.version == version:
            self.unregister(version.adapter_id, version.tenant)

    def restore(self, version: AdapterVersion, folder: Path | None) -> None:
        """Takes a replacement back: the name means its old folder again, if there was one."""
        self.forget(version)
        key = (version.tenant, version.adapter_id)
        if folder is not None and key not in self._registered:
            self._registered[key] = folder

    def unregister(self, adapter_id: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion | None:
        """Forgets a registered name; its last version keeps its record for running requests."""
        if self._registered.pop((tenant, adapter_id), None) is None:
            raise AdapterNotFound(adapter_id)
        record = self._current.pop(_Name(tenant, adapter_id, REGISTERED), None)
        if record is None:
            return None
        self._supersede(record)
        return record.version

    def registered_version(self, adapter_id: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion:
        """The last version of a registered name, whatever became of its files."""
        record = self._current.get(_Name(tenant, adapter_id, REGISTERED))
        if record is None:
            raise AdapterNotFound(adapter_id)
        return record.version

    def find(self, tenant: str, adapter_id: str, source: str | None = None) -> AdapterRecord | None:
        """What this tenant means by the name, now, as far as this machine knows.

        ``source``: None is a registered name, else a folder of the root; "local" the folder only.
        """
        check_id(adapter_id)
        if self._is_reserved(adapter_id):
            return None
        record = None
        if source is None:
            record = self._find_registered(tenant, adapter_id)
        return record or self._find_local(adapter_id)

    def used(self, record: AdapterRecord) -> AdapterVersion:
        """A request names it."""
        record.num_requests += 1
        record.last_used_s = self.clock()
        return record.version

    def resolve(self, tenant: str, adapter_id: str, source: str | None = None) -> AdapterVersion:
        """``find`` for a request. AdapterNotFound when this machine knows no such name."""
        record = self.find(tenant, adapter_id, source)
        if record is None:
            raise AdapterNotFound(adapter_id)
        return self.used(record)

    def learn(self, remote: str, adapter_id: str, described: Described) -> AdapterRecord:
        """The record of what a remote said of a name; a new version when it is another content."""
        if self._is_reserved(adapter_id):
            raise AdapterNotFound(adapter_id)
        name = _Name(DEFAULT_TENANT, adapter_id, remote)
        origin = RemoteFiles(remote, adapter_id, described)
        current = self._current.get(name)
        if current and current.origin.key == origin.key:
            return current
        config = parse_config(described.config, adapter_id, self.max_rank)
        return self._enter(name, origin, config)

    def derive(self, merge: AdapterMerge, parts: Sequence[AdapterVersion]) -> AdapterRecord:
        """The record of what ``merge`` makes of these versions, which ``resolve`` gave.

        One and the same for equal contents; another's part makes it that tenant's. AdapterInvalid
        when the parts' configs allow no such merge.
        """
        records = [self.record(part) for part in parts]
        origin = MergedFiles(merge, tuple(_original(record) for record in records))
        owners = [part.tenant for part in parts if part.tenant != DEFAULT_TENANT]
        version = AdapterVersion(owners[0] if owners else DEFAULT_TENANT, origin.key, 1)
        record = self.derived.get(version)
        if record is None:
            config = merged_config(merge, [record.config for record in records], self.max_rank)
            record = AdapterRecord(version, MERGED, origin, config)
        self.derived.resolved(record, parts)
        return record

    def remote(self, remote: str, adapter_id: str) -> AdapterRecord | None:
        """What ``learn`` gave last."""
        return self._current.get(_Name(DEFAULT_TENANT, adapter_id, remote))

    def replace(
        self, adapter_id: str, folder: Path, tenant: str = DEFAULT_TENANT
    ) -> tuple[AdapterVersion, Path | None]:
        """``register`` for a name that may be taken; the old folder, to be put back if the new one
        turns out to be invalid."""
        old = self._registered.pop((tenant, adapter_id), None)
        try:
            return self.register(adapter_id, folder, tenant), old
        except BaseException:
            if old is not None:
                self._registered[tenant, adapter_id] = old
            raise

    def record(self, version: AdapterVersion) -> AdapterRecord:
        """Of any version that resolve gave, also when its name means another one by now."""
        record = self.known(version)
        if record is None:
            raise AdapterNotFound(version.adapter_id)
        return record

    def known(self, version: AdapterVersion) -> AdapterRecord | None:
        """``record``, or None."""
        return self._by_version.get(version) or self.derived.get(version)

    def known_version(self, adapter_id: str) -> AdapterVersion | None:
        """Of a name that was not registered and that somebody asked for before."""
        for name, record in self._current.items():
            if name.adapter_id == adapter_id and name.source != REGISTERED:
                return record.version
        return None

    @property
    def num_known(self) -> int:
        """Names that were asked for, listed or registered."""
        return len(self._current)

    def is_current(self, version: AdapterVersion) -> bool:
        """Whether new requests may still get it."""
        if parts := self.derived.parts(version):
            return all(map(self.is_current, parts))
        return version in self._by_version and version not in self._superseded

    def folder_under_root(self, path: str) -> Path:
        """A folder that the API may name: as an adapter's id, or with the root's own path before
        it; nowhere else."""
        if self.adapter_root is not None and os.path.isabs(path):
            path = path.removeprefix(f"{self.adapter_root}{os.sep}")
        check_id(path)
        folder = self._local_folder(path)
        if folder is None:
            raise AdapterNotFound(path)
        return folder

    def records(self) -> list[AdapterRecord]:
        """Registered names and the root's folders; those that cannot be read are left out."""
        return self.merge(self.survey()())

    def survey(self) -> Callable[[], list[Seen]]:
        """Looks at every name's files and changes nothing: to be called on any thread."""
        known = dict(self._current)
        registered = dict(self._registered)

        def look() -> list[Seen]:
            named = [
                (_Name(tenant, adapter_id, REGISTERED), folder)
                for (tenant, adapter_id), folder in registered.items()
            ]
            found = [
                (_Name(DEFAULT_TENANT, adapter_id, LOCAL), folder)
                for adapter_id, folder in self._scan()
            ]
            seen = (self._look(name, folder, known.get(name)) for name, folder in named + found)
            return [one for one in seen if one is not None]

        return look

    def merge(self, seen: Iterable[Seen]) -> list[AdapterRecord]:
        """The records of what was seen, and of what remotes told."""
        found = [record for one in seen if (record := self._merged(one)) is not None]
        return found + [r for r in self._current.values() if isinstance(r.origin, RemoteFiles)]

    def _merged(self, seen: Seen) -> AdapterRecord | None:
        """None: the name was taken back, or given to another folder, since it was looked at."""
        name, current = seen.name, self._current.get(seen.name)
        if seen.fresh is None:
            return current
        origin, config = seen.fresh
        is_registered = name.source == REGISTERED
        if is_registered and self._registered.get((name.tenant, name.adapter_id)) != origin.folder:
            return None
        if current is not None and current.origin == origin:
            return current
        return self._enter(name, origin, config)

    def _is_reserved(self, adapter_id: str) -> bool:
        return adapter_id in (BASE_MODEL_ID, self.base_model_id)

    def _find_registered(self, tenant: str, adapter_id: str) -> AdapterRecord | None:
        for owner in (tenant, DEFAULT_TENANT):
            folder = self._registered.get((owner, adapter_id))
            if folder is not None:
                return self._refresh(_Name(owner, adapter_id, REGISTERED), folder, None)
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
        fresh = self._fresh(name, folder, root, self._current.get(name))
        return self._current[name] if fresh is None else self._enter(name, *fresh)

    def _fresh(
        self, name: _Name, folder: Path, root: Path | None, current: AdapterRecord | None
    ) -> tuple[LocalFiles, AdapterConfig] | None:
        """What the folder holds now; None: what ``current`` says."""
        known = current.origin if current else None
        if (
            isinstance(known, LocalFiles)
            and known.folder == folder
            and is_unchanged(folder, known.identity)
        ):
            return None
        found = LocalFiles(folder, root, identify(folder, name.adapter_id, root))
        if found == known:
            return None
        config = read_config(folder, name.adapter_id, root=root, max_rank=self.max_rank)
        return found, config

    def _enter(self, name: _Name, origin: Origin, config: AdapterConfig) -> AdapterRecord:
        version = self._next_version(name)
        record = AdapterRecord(version, name.source, origin, config)
        current = self._current.get(name)
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

    def _look(self, name: _Name, folder: Path, current: AdapterRecord | None) -> Seen | None:
        root = self.adapter_root if name.source == LOCAL else None
        try:
            fresh = self._fresh(name, folder, root, current)
        except AdapterInvalid:
            return None
        return Seen(name, fresh)

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


def _original(record: AdapterRecord) -> OriginalFiles:
    assert not isinstance(record.origin, MergedFiles)  # no name leads to one
    return record.origin


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
