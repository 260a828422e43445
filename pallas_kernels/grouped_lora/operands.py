"""What every implementation of grouped LoRA takes."""

from __future__ import annotations

from typing import NamedTuple

import jax


class ProjectionPages(NamedTuple):
    """One projection's share of the bank, as this step's blocks see it."""

    a_pool: jax.Array
    b_pool: jax.Array
    a_pages: jax.Array
    b_pages: jax.Array
    num_pages: jax.Array
    scale: jax.Array
