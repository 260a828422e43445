"""Where an adapter's two files are, and how they are read: a folder here, a named remote, or those
of several adapters that are read as one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jlorax.adapters.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    SourceIdentity,
    identify,
    read_file,
)
from jlorax.adapters.merge import merge_adapters, merge_name
from jlorax.adapters.peft import Adapter, max_weights_bytes, parse_adapter
from jlorax.adapters.peft_config import parse_config
from jlorax.adapters.remote import Described, RemoteSource
from jlorax.errors import AdapterChanged, AdapterNotFound
from jlorax.layout import BankLayout
from jlorax.types import AdapterMerge

Memory = Callable[[int], memoryview]


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """``root``: links may lead anywhere below it; None: inside the folder only."""

    folder: Path
    root: Path | None
    identity: SourceIdentity

    @property
    def key(self) -> str:
        """Names this content in the disk tier's index."""
        return self.identity.key


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """``name``: what the remote calls it; ``described.identity`` says which content."""

    remote: str
    name: str
    described: Described

    @property
    def key(self) -> str:
        return f"{self.remote}:{self.name}@{self.described.identity}"


OriginalFiles = LocalFiles | RemoteFiles


@dataclass(frozen=True, slots=True)
class MergedFiles:
    """``parts``: in the merge's order."""

    merge: AdapterMerge
    parts: tuple[OriginalFiles, ...]

    @property
    def key(self) -> str:
        return merge_name(self.merge, [part.key for part in self.parts])


@dataclass(frozen=True, slots=True)
class LocalMerge:
    """The same, when all of them are on this machine."""

    merge: AdapterMerge
    parts: tuple[LocalFiles, ...]


Origin = OriginalFiles | MergedFiles
FilesHere = LocalFiles | LocalMerge


@dataclass(frozen=True)
class Sources:
    """``workspace``: where files from afar lie while they are read; None: the system's own."""

    remotes: Mapping[str, RemoteSource]
    workspace: Path | None = None

    def describe(self, adapter_id: str, remotes: Sequence[str]) -> tuple[str, Described]:
        """(which of these remotes knows the name, what it says); they are asked in order.

        Raises AdapterNotFound, or what a remote raises: one that is down may be the one.
        """
        not_found = AdapterNotFound(adapter_id)
        for remote in remotes:
            try:
                return remote, self.remotes[remote].describe(adapter_id)
            except AdapterNotFound as error:
                not_found = error
        raise not_found

    @contextmanager
    def files(self, origin: Origin, adapter_id: str, layout: BankLayout) -> Iterator[FilesHere]:
        """The adapter's files on this machine, fetched if they are not here; then for so long."""
        with ExitStack() as stack:
            if not isinstance(origin, MergedFiles):
                yield stack.enter_context(self._files(origin, adapter_id, layout))
                return
            parts = [
                stack.enter_context(self._files(part, name, layout))
                for part, name in zip(origin.parts, origin.merge.adapter_ids, strict=True)
            ]
            yield LocalMerge(origin.merge, tuple(parts))

    @contextmanager
    def _files(
        self, origin: OriginalFiles, adapter_id: str, layout: BankLayout
    ) -> Iterator[LocalFiles]:
        if isinstance(origin, LocalFiles):
            yield origin
            return
        limit = max_weights_bytes(layout.projections, layout.max_rank)
        with tempfile.TemporaryDirectory(
            prefix=".jlorax-", suffix=".tmp", dir=self.workspace
        ) as name:
            folder = Path(name)
            remote = self.remotes[origin.remote]
            remote.fetch(origin.name, origin.described, folder, limit)
            yield LocalFiles(folder, None, identify(folder, adapter_id))


def read(files: FilesHere, adapter_id: str, layout: BankLayout, memory: Memory) -> Adapter:
    """``read_files`` of one adapter, or of a merge's parts, which need memory of their own."""
    if isinstance(files, LocalFiles):
        return read_files(files, adapter_id, layout, memory)
    parts = [
        read_files(part, name, layout)
        for part, name in zip(files.parts, files.merge.adapter_ids, strict=True)
    ]
    return merge_adapters(parts, files.merge, layout.max_rank)


def _own_memory(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def read_files(
    origin: LocalFiles, adapter_id: str, layout: BankLayout, memory: Memory = _own_memory
) -> Adapter:
    """The adapter of the very content that ``origin`` names; the tensors lie in ``memory``'s room.

    Other content by now, or while it is read: AdapterChanged; the next request resolves to a new
    version.
    """
    folder, root = origin.folder, origin.root
    config_data, config_file = read_file(folder, CONFIG_FILE, adapter_id, MAX_CONFIG_BYTES, root)
    limit = max_weights_bytes(layout.projections, layout.max_rank)
    weights, weights_file = read_file(folder, WEIGHTS_FILE, adapter_id, limit, root, memory)
    read = SourceIdentity(config_file, weights_file)
    if not read == origin.identity == identify(folder, adapter_id, root):
        raise AdapterChanged(adapter_id, WEIGHTS_FILE)
    config = parse_config(config_data, adapter_id, layout.max_rank)
    return parse_adapter(config, weights, adapter_id, layout.projections)
