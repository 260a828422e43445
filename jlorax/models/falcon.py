"""Falcon in Flax NNX: 7B (multi-query, parallel), 40B and 11B (new decoder), rw (ALiBi, biases)."""

from __future__ import annotations

import math

import jax
from flax import nnx

from jlorax.models.causal import CausalModel
from jlorax.models.config import FalconConfig, ModelShape
from jlorax.models.layers import LayerNorm, Norm, Outputs, Site, StepView, add_and_norm
from pallas_kernels.paged_attention.api import (
    AttentionSpec,
    Packed,
    attention,
    fused_attention,
)

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Attention(nnx.Module):
    def __init__(self, config: FalconConfig, dtype: str) -> None:
        s = config.shape
        self.shape = s
        fused = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        self.qkv = Site(("query_key_value",), s.d_model, (fused,), config.bias, dtype)
        self.out = Site(("dense",), s.d_model, (s.d_model,), config.bias, dtype)
        slopes = alibi_slopes(s.num_heads) if config.rope is None else None
        self.spec = AttentionSpec(scale=s.head_dim**-0.5, alibi_slopes=slopes)

    def __call__(
        self, x: jax.Array, step: StepView, pool: jax.Array, layer: int
    ) -> tuple[jax.Array, jax.Array]:
        """[T, H * h] before the output projection, and the pool."""
        rows, batch = x.shape[0], step.batch
        fused = self.qkv.joint(x, step, layer)
        if self.shape.num_kv_heads == 1 and isinstance(batch.queries, Packed):
            qkv = fused.reshape(rows, -1, self.shape.head_dim)
            mixed, pool = fused_attention(
                qkv, step.turn, pool, batch.places, batch.queries, self.spec
            )
        else:
            q, k, v = split_heads(fused, self.shape)
            mixed, pool = attention(
                q, k, v, step.turn, pool, batch.places, batch.queries, self.spec
            )
        return mixed.reshape(rows, -1), pool


def split_heads(fused: jax.Array, shape: ModelShape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[T, fused] -> q [T, H, h], k and v [T, K, h].

    The file interleaves (q * group, k, v) per kv head; multi-query is one such group, and plain
    multi-head (rw) is H groups of one query.
    """
    group = shape.num_heads // shape.num_kv_heads
    heads = fused.reshape(fused.shape[0], shape.num_kv_heads, group + 2, shape.head_dim)
    q = heads[:, :, :group].reshape(fused.shape[0], shape.num_heads, shape.head_dim)
    return q, heads[:, :, group], heads[:, :, group + 1]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Geometric; heads beyond a power of two interleave. Press et al. 2021, arXiv:2108.12409."""
    floor = 2 ** math.floor(math.log2(num_heads))

    def series(count: int, step: int, of: int) -> list[float]:
        base = 2 ** (-(2 ** -(math.log2(of) - 3)))
        return [base**power for power in range(1, 1 + step * count, step)]

    slopes = series(floor, 1, floor)
    return tuple(slopes + series(num_heads - floor, 2, 2 * floor))


class FeedForward(nnx.Module):
    def __init__(self, config: FalconConfig, dtype: str) -> None:
        d, f = config.shape.d_model, config.d_ff
        self.activation = config.activation
        self.up = Site(("dense_h_to_4h",), d, (f,), config.bias, dtype)
        self.down = Site(("dense_4h_to_h",), f, (d,), config.bias, dtype)

    def inner(self, x: jax.Array, step: StepView, layer: int) -> jax.Array:
        """activation(up(x)): [T, F]."""
        return _ACTIVATIONS[self.activation](self.up.joint(x, step, layer))


class Block(nnx.Module):
    """Parallel: x + attention(n(x)) + ffn(m(x)); sequential: as in the original transformer."""

    def __init__(self, config: FalconConfig, dtype: str) -> None:
        self.parallel = config.parallel_attention
        self.attention = Attention(config, dtype)
        self.ffn = FeedForward(config, dtype)
        width, eps = config.shape.d_model, config.norm_eps
        self.attention_norm = LayerNorm(width, eps, dtype)
        self.ffn_norm = LayerNorm(width, eps, dtype) if has_ffn_norm(config) else None

    def __call__(
        self,
        stream: jax.Array,
        normed: jax.Array,
        step: StepView,
        pool: jax.Array,
        layer: int,
        next_norm: Norm,
        outputs: Outputs | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed, pool = self.attention(normed, step, pool, layer)
        step, (stream, normed, mixed) = step.narrowed(outputs, stream, normed, mixed)
        attended = stream + self.attention.out.joint(mixed, step, layer)
        if self.ffn_norm is not None:
            normed = self.ffn_norm(stream if self.parallel else attended)
        inner = self.ffn.inner(normed, step, layer)
        stream, normed = add_and_norm(attended, self.ffn.down, inner, step, layer, next_norm)
        return stream, normed, pool


def build(config: FalconConfig, dtype: str) -> CausalModel:
    s = config.shape
    blocks = [Block(config, dtype) for _ in range(s.num_layers)]
    norm = LayerNorm(s.d_model, config.norm_eps, dtype)
    return CausalModel(s, config.rope, config.tie_embeddings, blocks, norm, dtype)


def has_ffn_norm(config: FalconConfig) -> bool:
    return not config.parallel_attention or config.num_parallel_norms == 2


def tensor_names(config: FalconConfig) -> dict[str, tuple[str, ...]]:
    """Parameter path -> the file's tensors."""
    names: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("transformer.word_embeddings.weight",),
        "norm.weight": ("transformer.ln_f.weight",),
        "norm.bias": ("transformer.ln_f.bias",),
    }
    if not config.tie_embeddings:
        names["head.weight"] = ("lm_head.weight",)
    attention_norm, ffn_norm = "input_layernorm", "post_attention_layernorm"
    if config.num_parallel_norms == 2:
        attention_norm, ffn_norm = "ln_attn", "ln_mlp"
    norms = {"attention_norm": attention_norm}
    if has_ffn_norm(config):
        norms["ffn_norm"] = ffn_norm
    sites = {
        "attention.qkv": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }
    for i in range(config.shape.num_layers):
        block, layer = f"blocks.{i}", f"transformer.h.{i}"
        for ours, theirs in norms.items():
            for kind in ("weight", "bias"):
                names[f"{block}.{ours}.{kind}"] = (f"{layer}.{theirs}.{kind}",)
        for ours, theirs in sites.items():
            for kind in ("weight", "bias") if config.bias else ("weight",):
                names[f"{block}.{ours}.{kind}"] = (f"{layer}.{theirs}.{kind}",)
    return names
