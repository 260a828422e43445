"""The pieces that architectures share: sites, norms, rotary embedding, the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jlorax.models.config import Rope
from jlorax.models.lora import Lora
from pallas_kernels.paged_attention.api import Places, Queries, Rotation
from pallas_kernels.skinny_matmul import api as skinny
from pallas_kernels.skinny_matmul.tuning import MAX_ROWS


class TokenBatch(NamedTuple):
    """One step's T tokens. A padded token has position -1 and writes to page 0, nobody's."""

    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rope_lengths: jax.Array  # i32[T]: the length that dynamic RoPE scales by
    places: Places
    queries: Queries


Product = Callable[[jax.Array, jax.Array], jax.Array]
"""[T, d_in] and [d_in, d_out] -> [T, d_out]."""


class Outputs(NamedTuple):
    """The rows whose hidden states are wanted, and their adapters (trace time only)."""

    rows: jax.Array  # i32[B] into the step's tokens
    lora: Lora | None


class StepView(NamedTuple):
    """What all layers of one step share (trace time only)."""

    batch: TokenBatch
    turn: Rotation | None  # None: the model has ALiBi
    lora: Lora | None  # None: every row is the base model's
    implementation: skinny.Implementation
    num_rows: int
    product: Product = jnp.matmul  # of a site's input and weight, where no kernel of ours does it

    @property
    def fuses(self) -> bool:
        """Whether products and what follows them are kernels of ours: few rows on a GPU."""
        return self.implementation != "xla" and self.num_rows <= MAX_ROWS

    def narrowed(
        self, outputs: Outputs | None, *arrays: jax.Array
    ) -> tuple[StepView, tuple[jax.Array, ...]]:
        """After the last layer's attention no other row is read: the view and [T, ...] arrays of
        the wanted rows; as they are where all rows are wanted (None)."""
        if outputs is None:
            return self, arrays
        view = self._replace(lora=outputs.lora, num_rows=outputs.rows.shape[0])
        return view, tuple(x[outputs.rows] for x in arrays)


class Site(nnx.Module):
    """Projections of one input, as one matrix product: y_i = x @ W_i (+ b_i) + LoRA_i."""

    def __init__(
        self, names: tuple[str, ...], d_in: int, d_out: tuple[int, ...], bias: bool, dtype: str
    ) -> None:
        self.names = names
        self.d_out = d_out
        self.weight = nnx.Param(jnp.zeros((d_in, sum(d_out)), dtype))
        self.bias = nnx.Param(jnp.zeros((sum(d_out),), dtype)) if bias else None

    def __call__(self, x: jax.Array, step: StepView, layer: int) -> tuple[jax.Array, ...]:
        """x: [T, d_in] -> one [T, d_out_i] per projection."""
        ends = list(accumulate(self.d_out))[:-1]
        return tuple(jnp.split(self.joint(x, step, layer), ends, axis=-1))

    def joint(self, x: jax.Array, step: StepView, layer: int, *, early: bool = False) -> jax.Array:
        """The projections' outputs side by side: [T, sum of d_out]. ``early`` as in ``lora``."""
        if step.fuses:
            y = skinny.matmul(x, self.weight[...], implementation=step.implementation)
        else:
            y = step.product(x, self.weight[...])
        if self.bias is not None:
            y += self.bias[...]
        if step.lora is not None and step.lora.covers(self.names):
            return step.lora.add(y, x, self.names, layer, early=early)
        return y

    def delta(self, x: jax.Array, step: StepView, layer: int) -> jax.Array | None:
        """What adapters add, [T, sum of d_out]; None where no adapter of the step has any."""
        if step.lora is None or not step.lora.covers(self.names):
            return None
        return step.lora.delta(x, self.names, layer)


def add_and_norm(
    stream: jax.Array, site: Site, x: jax.Array, step: StepView, layer: int, norm: Norm
) -> tuple[jax.Array, jax.Array]:
    """(stream + site(x), its norm), both [T, D]: the residual stream and the next site's input."""
    if not step.fuses or site.bias is not None:
        stream += site.joint(x, step, layer)
        return stream, norm(stream)
    if step.lora is not None and step.lora.covers(site.names):
        # onto the stream, not onto the product: in place, and beside the product's launch
        stream = step.lora.add(stream, x, site.names, layer, early=True)
    return skinny.matmul_add_norm(
        x, site.weight[...], stream, norm.operands(), implementation=step.implementation
    )


class Embedding(nnx.Module):
    """Token embedding [V, D], and the head's weight when the model ties them."""

    def __init__(self, vocab_size: int, d_model: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, d_model), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]


class Head(nnx.Module):
    """lm_head: logits in f32, [B, D] -> [B, V]. ``weight`` [V, D] as in the files."""

    def __init__(self, vocab_size: int, d_model: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, d_model), dtype))


def head_logits(x: jax.Array, weight: jax.Array, lora: Lora | None) -> jax.Array:
    """f32[B, V]. The adapter's share is computed from the head's own input, tied or not."""
    logits = jnp.einsum("bd,vd->bv", x, weight, preferred_element_type=jnp.float32)
    if lora is None or not lora.covers(("lm_head",)):
        return logits
    return lora.add(logits, x, ("lm_head",), 0)


class Norm(Protocol):
    def __call__(self, x: jax.Array) -> jax.Array: ...
    def operands(self) -> skinny.Norm: ...


class RMSNorm(nnx.Module):
    """x / rms(x) * w, in f32. Zhang and Sennrich, 2019, arXiv:1910.07467."""

    def __init__(self, width: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight[...]

    def operands(self) -> skinny.Norm:
        return skinny.Norm("rms", self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * w + b, in f32."""

    def __init__(self, width: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...] + self.bias[...]).astype(x.dtype)

    def operands(self) -> skinny.Norm:
        return skinny.Norm("layer", self.weight[...], self.eps, self.bias[...])


def rotation(rope: Rope, batch: TokenBatch) -> Rotation:
    """Angles of every token of the step, made once."""
    inv_freq = _frequencies(rope, batch.rope_lengths)
    angles = jnp.maximum(batch.positions, 0)[:, None].astype(jnp.float32) * inv_freq
    return Rotation(
        jnp.cos(angles) * rope.attention_scaling, jnp.sin(angles) * rope.attention_scaling
    )


def _frequencies(rope: Rope, lengths: jax.Array) -> jax.Array:
    """f32[1 or T, head_dim / 2]."""
    fixed = jnp.asarray(rope.inv_freq, jnp.float32)[None]
    if rope.dynamic is None:
        return fixed
    dim = 2 * len(rope.inv_freq)
    length = jnp.maximum(lengths, rope.dynamic.max_position).astype(jnp.float32)[:, None]
    factor = rope.dynamic.factor
    stretch = factor * length / rope.dynamic.max_position - (factor - 1)
    theta = rope.dynamic.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
