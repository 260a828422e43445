"""What one start leaves for the next, as pickles: whole or not at all, and never a reason to fail.

A config.json's meaning is kept because transformers, which reads it, takes one to two seconds to
import, and no executable can be found before the model's shape is known.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jlorax.models import config
from jlorax.models.config import ModelConfig, read_config


def kept_config(folder: Path, store: Path | None) -> ModelConfig:
    """``read_config``'s answer, by the file's content; ``store`` None keeps nothing."""
    file = folder / "config.json"
    if store is None or not file.is_file():
        return read_config(folder)
    path = store / f"{_digest(file.read_bytes())}.config"
    found = load_kept(path)
    if not isinstance(found, ModelConfig):
        found = read_config(folder)
        keep(path, found)
    return found


def _digest(content: bytes) -> str:
    """Of all that the meaning depends on: our reader and transformers' too."""
    digest = hashlib.sha256(Path(config.__file__).read_bytes())
    digest.update(f"{version('transformers')}\n".encode())
    digest.update(content)
    return digest.hexdigest()[:32]


def load_kept(path: Path) -> Any | None:
    """None: there is no such file, or it is torn or foreign."""
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except Exception:  # unpickling raises many kinds
        return None


def keep(path: Path, value: object) -> None:
    """No room, or no right to write: the next start makes it again."""
    try:
        content = pickle.dumps(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except (OSError, pickle.PickleError):
        return
