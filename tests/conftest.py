"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The embedded model's folder, in the user's own cache: made once, not once a run."""
    from jlorax.models.embedded import ensure_embedded_model

    cache_dir = Path(os.environ.get("JLORAX_CACHE_DIR", "~/.cache/jlorax")).expanduser()
    return ensure_embedded_model(cache_dir)
