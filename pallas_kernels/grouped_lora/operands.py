"""What the implementations of grouped LoRA take: a projection's pages, a site's, blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK_ROWS = 16  # the least rows of a tile of the matrix units


class ProjectionPages(NamedTuple):
    """One projection's share of the bank, as this step's blocks see it."""

    a_pool: jax.Array
    b_pool: jax.Array
    a_pages: jax.Array
    b_pages: jax.Array
    num_pages: jax.Array
    scale: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["first", "count"], meta_fields=[])
@dataclass(frozen=True)
class RowBlocks:
    """Block b is the rows first[b] ... first[b] + count[b] - 1, all of one adapter.

    Rows are sorted by adapter on the host. NB is fixed at compile time and too many: a block with
    count 0 is empty. A row without an adapter is in no block.
    """

    first: jax.Array  # i32[NB]
    count: jax.Array  # i32[NB]


class SitePages(NamedTuple):
    """A site's projections (they share the input), as this step's blocks see the bank.

    The tables are the whole bank's, gathered by block once a step, and ``rows`` says where in them
    the site's projections stand: cut out for every site and layer, they would be hundreds of
    launches a step, each longer than what it copies.
    """

    a_pool: jax.Array  # [P, L, 8, D]
    b_pools: tuple[jax.Array, ...]  # [P, L, 8, N_i] each, the same array where widths are equal
    tables: jax.Array  # i32[NB, Q, 2, W]: pages of A, of B; all of the bank's Q projections
    num_pages: jax.Array  # i32[NB, Q]: 0 where the block's adapter lacks the projection
    scale: jax.Array  # f32[NB, Q, L]
    rows: tuple[int, ...]  # static: the site's projections among Q

    def projection(self, i: int, layer: int) -> ProjectionPages:
        """The site's i-th projection by itself."""
        row = self.rows[i]
        return ProjectionPages(
            a_pool=self.a_pool,
            b_pool=self.b_pools[i],
            a_pages=self.tables[:, row, 0],
            b_pages=self.tables[:, row, 1],
            num_pages=jnp.max(self.num_pages[:, row]),
            scale=self.scale[:, row, layer],
        )
