"""Adapters as versions: ``root/NAME/1``, ``root/NAME/2``, ... Each is whole, and never changes.

A server whose ``--adapter-root`` is the root serves them as "NAME/1" as soon as they are there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jlorax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from jlorax.adapters.peft import read_config
from jlorax.adapters.registry import check_id
from jlorax.errors import AdapterConflict, ConfigError
from jlorax.models.atomic import new_folder


@dataclass(frozen=True)
class Published:
    """A version that is there: the id by which it is served, and its folder."""

    adapter_id: str
    folder: Path


class Repository:
    """All versions of one name. ConfigError when the name is taken by something else."""

    def __init__(self, root: Path, name: str) -> None:
        check_id(name)
        self._root = root
        self._name = name
        self.folder = root / name
        if (self.folder / CONFIG_FILE).exists():
            raise AdapterConflict(f"{self.folder} is an adapter itself: versions need another name")

    @property
    def versions(self) -> list[int]:
        """Those that are there, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    @property
    def work(self) -> Path:
        """Where a training of this name keeps what it needs to be continued."""
        return self._root / ".training" / self._name

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """For one writer at a time: AdapterConflict while another trains under this name."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work.with_name(f"{self.work.name}.lock"), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ConfigError(f"the folder {self.work} cannot be written: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise AdapterConflict(f"another training writes to {self._name!r}") from None
        finally:
            os.close(lock)

    def publish(self, write: Callable[[Path, str], None]) -> Published:
        """``write(folder, adapter_id)`` fills the next version, which then appears whole."""
        number = max(self.versions, default=0) + 1
        adapter_id = f"{self._name}/{number}"
        target = self.folder / str(number)
        with new_folder(target) as folder:
            write(folder, adapter_id)
        return Published(adapter_id, target)

    def import_folder(self, folder: Path) -> Published:
        """A PEFT folder, copied as the next version; AdapterInvalid when it is none."""
        read_config(folder, self._name)

        def copy(target: Path, adapter_id: str) -> None:
            for name in (CONFIG_FILE, WEIGHTS_FILE, "README.md"):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)

        return self.publish(copy)
