"""Llama and Mistral in Flax NNX: RMSNorm, rotary GQA attention, SwiGLU."""

from __future__ import annotations

import jax
from flax import nnx

from jlorax.models.causal import CausalModel
from jlorax.models.config import LlamaConfig
from jlorax.models.layers import Norm, Outputs, RMSNorm, Site, StepView, add_and_norm
from pallas_kernels.paged_attention.api import (
    AttentionSpec,
    Packed,
    attention,
    fused_attention,
)
from pallas_kernels.skinny_matmul import api as skinny


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        s = config.shape
        self.head_dim = s.head_dim
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        bias = config.attention_bias
        self.qkv = Site(("q_proj", "k_proj", "v_proj"), s.d_model, (q, kv, kv), bias, dtype)
        self.out = Site(("o_proj",), q, (s.d_model,), bias, dtype)
        self.spec = AttentionSpec(scale=s.head_dim**-0.5, window=config.window)

    def __call__(
        self, x: jax.Array, step: StepView, pool: jax.Array, layer: int
    ) -> tuple[jax.Array, jax.Array]:
        """[T, H * h] before the output projection, and the pool."""
        rows, batch = x.shape[0], step.batch
        if isinstance(batch.queries, Packed):
            qkv = self.qkv.joint(x, step, layer, early=True).reshape(rows, -1, self.head_dim)
            mixed, pool = fused_attention(
                qkv, step.turn, pool, batch.places, batch.queries, self.spec
            )
        else:
            q, k, v = (y.reshape(rows, -1, self.head_dim) for y in self.qkv(x, step, layer))
            mixed, pool = attention(
                q, k, v, step.turn, pool, batch.places, batch.queries, self.spec
            )
        return mixed.reshape(rows, -1), pool


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)). Shazeer, 2020, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        d, f, bias = config.shape.d_model, config.d_ff, config.mlp_bias
        self.gate_up = Site(("gate_proj", "up_proj"), d, (f, f), bias, dtype)
        self.down = Site(("down_proj",), f, (d,), bias, dtype)

    def inner(self, x: jax.Array, step: StepView, layer: int) -> jax.Array:
        """silu(gate(x)) * up(x): [T, F]."""
        site = self.gate_up
        if step.fuses and site.bias is None:
            delta = site.delta(x, step, layer)
            return skinny.matmul_swiglu(
                x, site.weight[...], delta, implementation=step.implementation
            )
        gate, up = site(x, step, layer)
        return jax.nn.silu(gate) * up


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        width, eps = config.shape.d_model, config.norm_eps
        self.attention_norm = RMSNorm(width, eps, dtype)
        self.attention = Attention(config, dtype)
        self.ffn_norm = RMSNorm(width, eps, dtype)
        self.ffn = FeedForward(config, dtype)

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
        step, (stream, mixed) = step.narrowed(outputs, stream, mixed)
        stream, normed = add_and_norm(stream, self.attention.out, mixed, step, layer, self.ffn_norm)
        inner = self.ffn.inner(normed, step, layer)
        stream, normed = add_and_norm(stream, self.ffn.down, inner, step, layer, next_norm)
        return stream, normed, pool


def build(config: LlamaConfig, dtype: str) -> CausalModel:
    s = config.shape
    blocks = [Block(config, dtype) for _ in range(s.num_layers)]
    norm = RMSNorm(s.d_model, config.norm_eps, dtype)
    return CausalModel(s, config.rope, config.tie_embeddings, blocks, norm, dtype)


def tensor_names(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Parameter path -> the file's tensors; several are joined along d_out."""
    names: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
    }
    if not config.tie_embeddings:
        names["head.weight"] = ("lm_head.weight",)
    sites = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "ffn.down": ("mlp.down_proj",),
    }
    for i in range(config.shape.num_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        names[f"{block}.attention_norm.weight"] = (f"{layer}.input_layernorm.weight",)
        names[f"{block}.ffn_norm.weight"] = (f"{layer}.post_attention_layernorm.weight",)
        for site, parts in sites.items():
            has_bias = config.mlp_bias if site.startswith("ffn") else config.attention_bias
            for kind in ("weight", "bias") if has_bias else ("weight",):
                names[f"{block}.{site}.{kind}"] = tuple(f"{layer}.{p}.{kind}" for p in parts)
    return names
