"""Llama and Mistral in Flax NNX: RMSNorm, rotary GQA attention, SwiGLU."""

from __future__ import annotations

import jax
from flax import nnx

from jlorax.models.causal import CausalModel
from jlorax.models.config import LlamaConfig
from jlorax.models.layers import (
    RMSNorm,
    Rotation,
    Site,
    TokenBatch,
    attend,
    rotate,
)
from jlorax.models.lora import LoraBatch
from pallas_kernels.paged_attention.api import AttentionSpec


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        s = config.shape
        self.shape = s
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        bias = config.attention_bias
        self.qkv = Site(("q_proj", "k_proj", "v_proj"), s.d_model, (q, kv, kv), bias, dtype)
        self.out = Site(("o_proj",), q, (s.d_model,), bias, dtype)
        self.spec = AttentionSpec(scale=s.head_dim**-0.5, window=config.window)

    def __call__(
        self,
        x: jax.Array,
        turn: Rotation | None,
        batch: TokenBatch,
        pool: jax.Array,
        lora: LoraBatch | None,
        layer: int,
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = (y.reshape(x.shape[0], -1, self.shape.head_dim) for y in self.qkv(x, lora, layer))
        mixed, pool = attend(rotate(q, turn), rotate(k, turn), v, pool, batch, self.spec)
        return self.out(mixed, lora, layer)[0], pool


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)). Shazeer, 2020, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        d, f, bias = config.shape.d_model, config.d_ff, config.mlp_bias
        self.gate_up = Site(("gate_proj", "up_proj"), d, (f, f), bias, dtype)
        self.down = Site(("down_proj",), f, (d,), bias, dtype)

    def __call__(self, x: jax.Array, lora: LoraBatch | None, layer: int) -> jax.Array:
        gate, up = self.gate_up(x, lora, layer)
        return self.down(jax.nn.silu(gate) * up, lora, layer)[0]


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: str) -> None:
        width, eps = config.shape.d_model, config.norm_eps
        self.attention_norm = RMSNorm(width, eps, dtype)
        self.attention = Attention(config, dtype)
        self.ffn_norm = RMSNorm(width, eps, dtype)
        self.ffn = FeedForward(config, dtype)

    def __call__(
        self,
        x: jax.Array,
        turn: Rotation | None,
        batch: TokenBatch,
        pool: jax.Array,
        lora: LoraBatch | None,
        layer: int,
    ) -> tuple[jax.Array, jax.Array]:
        mixed, pool = self.attention(self.attention_norm(x), turn, batch, pool, lora, layer)
        x += mixed
        return x + self.ffn(self.ffn_norm(x), lora, layer), pool


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
