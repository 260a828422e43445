"""The weights that are trained, and how a model's sites see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlorax.adapters.peft_config import AdapterConfig
from jlorax.types import Projection


class LoraWeights(NamedTuple):
    """One module's: y += scaling * (x @ a.T) @ b. ``b`` is PEFT's transposed: its gradient is a
    product of few rows then, which a CPU computes four times as fast as one of few columns."""

    a: jax.Array  # f32[r, d_in]
    b: jax.Array  # f32[r, d_out]


Adapter = dict[str, LoraWeights]
"""Module ("model.layers.0.self_attn.q_proj") -> its weights."""


@dataclass(frozen=True)
class AdapterShape:
    """Which modules are adapted, and how: what the config says, applied to the base model."""

    ranks: Mapping[str, int]  # module -> r
    scaling: Mapping[str, float]  # module -> alpha / r, or alpha / sqrt(r)
    projections: Mapping[str, Projection]  # projection name -> projection
    dropout: float = 0.0

    @property
    def num_parameters(self) -> int:
        return sum(
            self.ranks[p.module(layer)] * (p.d_in + p.d_out)
            for p in self.projections.values()
            for layer in range(p.num_layers)
            if p.module(layer) in self.ranks
        )


def adapter_shape(
    config: AdapterConfig, projections: tuple[Projection, ...], dropout: float = 0.0
) -> AdapterShape:
    """The modules that PEFT would adapt."""
    modules = [
        p.module(layer)
        for p in projections
        for layer in range(p.num_layers)
        if config.selects(p.module(layer), is_output=p.is_output)
    ]
    return AdapterShape(
        ranks={module: config.rank(module) for module in modules},
        scaling={module: config.scaling(module) for module in modules},
        projections={p.name: p for p in projections},
        dropout=dropout,
    )


def initial_adapter(shape: AdapterShape, seed: int) -> Adapter:
    """A uniform in +-1 / sqrt(d_in), B zero: PEFT's default (kaiming_uniform with a = sqrt 5)."""
    key = jax.random.key(seed)
    adapter: Adapter = {}
    for projection in shape.projections.values():
        for layer in range(projection.num_layers):
            module = projection.module(layer)
            if module in shape.ranks:
                own = jax.random.fold_in(key, len(adapter))
                adapter[module] = _initial(own, projection, shape.ranks[module])
    return adapter


def _initial(key: jax.Array, projection: Projection, rank: int) -> LoraWeights:
    bound = 1 / math.sqrt(projection.d_in)
    a = jax.random.uniform(key, (rank, projection.d_in), jnp.float32, -bound, bound)
    return LoraWeights(a, jnp.zeros((rank, projection.d_out), jnp.float32))


class TrainedLora:
    """One adapter for every row, differentiable (trace time only). Computes in its input's dtype.

    ``dropout_key``: of this step; None: nothing is dropped.
    """

    def __init__(
        self, shape: AdapterShape, weights: Adapter, dropout_key: jax.Array | None = None
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._key = dropout_key if shape.dropout > 0 else None

    def covers(self, names: tuple[str, ...]) -> bool:
        return any(
            self._shape.projections[name].module(layer) in self._weights
            for name in names
            for layer in range(self._shape.projections[name].num_layers)
        )

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        names: tuple[str, ...],
        layer: int,
        *,
        early: bool = False,
    ) -> jax.Array:
        """Projection by projection: a reader that splits them again then costs no copy."""
        ends = list(accumulate(self._shape.projections[name].d_out for name in names))[:-1]
        parts = jnp.split(y, ends, axis=-1)
        added = [
            part + self._one(x, name, layer).astype(y.dtype)
            for part, name in zip(parts, names, strict=True)
        ]
        return added[0] if len(added) == 1 else jnp.concatenate(added, axis=-1)

    def delta(self, x: jax.Array, names: tuple[str, ...], layer: int) -> jax.Array:
        parts = [self._one(x, name, layer) for name in names]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def _one(self, x: jax.Array, name: str, layer: int) -> jax.Array:
        """[T, d_out] of one projection; zeros where it has no weights."""
        projection = self._shape.projections[name]
        module = projection.module(layer)
        weights = self._weights.get(module)
        if weights is None:
            return jnp.zeros((x.shape[0], projection.d_out), x.dtype)
        a, b = (w.astype(x.dtype) for w in weights)
        shrunk = self._dropped(x, module) @ a.T
        return (shrunk * jnp.asarray(self._shape.scaling[module], x.dtype)) @ b

    def _dropped(self, x: jax.Array, module: str) -> jax.Array:
        """Each module drops for itself, as in PEFT. Srivastava et al. 2014."""
        if self._key is None:
            return x
        keep = 1 - self._shape.dropout
        key = jax.random.fold_in(self._key, list(self._weights).index(module))
        kept = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)
