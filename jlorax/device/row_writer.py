"""Writes what rows may draw, and what they favour, where the steps read it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlorax.device.executables import ExecutableStore
from jlorax.device.step import RowState
from jlorax.layout import BiasedTokens, RowWrites
from jlorax.types import MAX_LOGIT_BIASES

_MASKS_AT_ONCE = 32
_NOWHERE = 2**31 - 1  # an index beyond every array, and so are those a little smaller


class RowWriter:
    """Two executables; what they write is donated, and only the named rows are touched."""

    def __init__(self, rows: RowState, store: ExecutableStore) -> None:
        num_rows, num_words = rows.masks.shape
        self._num_masks = min(_MASKS_AT_ONCE, num_rows - 1)
        masks = jax.ShapeDtypeStruct((self._num_masks, 1 + num_words), jnp.int32)
        bias = jax.ShapeDtypeStruct((1 + 2 * MAX_LOGIT_BIASES,), jnp.int32)
        ready = store.get_all(
            [
                ("write masks", lambda: write_masks.lower(rows.masks, masks)),
                ("write bias", lambda: write_bias.lower(rows.bias, bias)),
            ]
        )
        self._write_masks: Any = ready["write masks"]
        self._write_bias: Any = ready["write bias"]

    def write(self, rows: RowState, writes: RowWrites) -> RowState:
        """The rows with what they may draw and favour; the old must not be used again."""
        masks, bias = rows.masks, rows.bias
        for first in range(0, len(writes.masks), self._num_masks):
            part = writes.masks[first : first + self._num_masks]
            masks = self._write_masks(masks, self._packed_masks(part, masks.shape[1]))
        for row, tokens in writes.biases:
            bias = self._write_bias(bias, _packed_bias(row, tokens))
        return rows._replace(masks=masks, bias=bias)

    def warm_up(self, rows: RowState) -> RowState:
        """The rows as they are, when a first write takes no longer than the next."""
        masks = self._write_masks(rows.masks, self._packed_masks((), rows.masks.shape[1]))
        return rows._replace(
            masks=masks, bias=self._write_bias(rows.bias, _packed_bias(_NOWHERE, ()))
        )

    def _packed_masks(self, part: tuple[tuple[int, np.ndarray], ...], num_words: int) -> np.ndarray:
        packed = np.empty((self._num_masks, 1 + num_words), np.int32)
        packed[:, 0] = _NOWHERE - np.arange(self._num_masks)
        for line, (row, words) in zip(packed, part, strict=False):
            line[0], line[1:] = row, words
        return packed


def _packed_bias(row: int, tokens: BiasedTokens) -> np.ndarray:
    packed = np.zeros(1 + 2 * MAX_LOGIT_BIASES, np.int32)
    ids, values = packed[1 : 1 + MAX_LOGIT_BIASES], packed[1 + MAX_LOGIT_BIASES :].view(np.float32)
    packed[0] = row
    ids[:] = _NOWHERE - np.arange(MAX_LOGIT_BIASES)
    for i, (token, value) in enumerate(tokens):
        ids[i], values[i] = token, value
    return packed


@partial(jax.jit, donate_argnums=0)
def write_masks(masks: jax.Array, packed: jax.Array) -> jax.Array:
    """masks: i32[R + 1, W]   packed: i32[K, 1 + W], a row's number and its words; numbers differ,
    and those beyond R are dropped."""
    return masks.at[packed[:, 0]].set(packed[:, 1:], mode="drop", unique_indices=True)


@partial(jax.jit, donate_argnums=0)
def write_bias(bias: jax.Array, packed: jax.Array) -> jax.Array:
    """bias: f32[R + 1, V]   packed: i32[1 + 2 * MAX_LOGIT_BIASES], the row, token ids, and as
    many f32s; ids differ, and those beyond V are dropped. Every other token of the row gets 0."""
    ids = packed[1 : 1 + MAX_LOGIT_BIASES]
    values = lax.bitcast_convert_type(packed[1 + MAX_LOGIT_BIASES :], jnp.float32)
    line = (
        jnp.zeros(bias.shape[1:], bias.dtype).at[ids].set(values, mode="drop", unique_indices=True)
    )
    return bias.at[packed[0]].set(line, mode="drop")
