"""transformers, imported late (it takes a second) and without its advice to install torch."""

from __future__ import annotations

import logging
from typing import Any


def import_transformers(name: str) -> Any:
    """``transformers.name``."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_not_torch_advice)
    try:
        import transformers

        return getattr(transformers, name)
    finally:
        logger.removeFilter(_is_not_torch_advice)


def _is_not_torch_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
