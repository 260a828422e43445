"""A few rows at a time: what takes several arrays of [rows, V] must not take them for all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def in_parts(compute: Callable[[Any], T], whole: Any, num_rows: int, most: int) -> T:
    """``compute`` of ``whole``, a tree of [num_rows, ...], in parts of at most ``most`` rows that
    divide it."""
    size = max(d for d in range(1, most + 1) if num_rows % d == 0)
    if size == num_rows:
        return compute(whole)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
    made = lax.map(compute, parts)
    return jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), made)
