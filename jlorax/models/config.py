"""The base model's shape, read from a Hugging Face ``config.json``. Plain: no jax.

transformers' own config classes do the reading, so that the keys of its versions 4 and 5 both work;
what the Flax port needs is then picked out, and anything it would compute differently is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlorax.errors import JLoraxError, ModelInvalid, UnsupportedModel
from jlorax.hugging_face import import_transformers
from jlorax.types import Projection


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. ``inv_freq`` has head_dim / 2 entries; cos and sin are multiplied by
    ``attention_scaling``. ``dynamic`` is set when the frequencies follow the sequence's length."""

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    dynamic: DynamicRope | None = None


@dataclass(frozen=True)
class DynamicRope:
    """NTK-aware scaling of a sequence longer than ``max_position``; n is its length.

    theta' = theta * (factor * n / max_position - (factor - 1)) ** (dim / (dim - 2))
    transformers, ``_compute_dynamic_ntk_parameters``.
    """

    theta: float
    factor: float
    max_position: int


@dataclass(frozen=True)
class ModelShape:
    """What every architecture has, and what the engine sizes its memory by."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 2 and 3, SmolLM, and Mistral (``window``, a head_dim of its own)."""

    shape: ModelShape
    rope: Rope
    d_ff: int
    norm_eps: float
    tie_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None

    def projections(self) -> tuple[Projection, ...]:
        s = self.shape
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        linear = {
            "self_attn.q_proj": (s.d_model, q),
            "self_attn.k_proj": (s.d_model, kv),
            "self_attn.v_proj": (s.d_model, kv),
            "self_attn.o_proj": (q, s.d_model),
            "mlp.gate_proj": (s.d_model, self.d_ff),
            "mlp.up_proj": (s.d_model, self.d_ff),
            "mlp.down_proj": (self.d_ff, s.d_model),
        }
        return _projections("model.layers.{layer}.", linear, s)


@dataclass(frozen=True)
class FalconConfig:
    """Falcon 7B (multi-query, parallel), 40B and 11B (new decoder), rw (ALiBi, biases)."""

    shape: ModelShape
    rope: Rope | None  # None: ALiBi
    d_ff: int
    norm_eps: float
    tie_embeddings: bool
    activation: str
    bias: bool
    new_decoder: bool
    parallel_attention: bool
    num_parallel_norms: int  # 2: one for attention and one for the MLP

    def projections(self) -> tuple[Projection, ...]:
        s = self.shape
        fused = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        linear = {
            "self_attention.query_key_value": (s.d_model, fused),
            "self_attention.dense": (s.d_model, s.d_model),
            "mlp.dense_h_to_4h": (s.d_model, self.d_ff),
            "mlp.dense_4h_to_h": (self.d_ff, s.d_model),
        }
        return _projections("transformer.h.{layer}.", linear, s)


ModelConfig = LlamaConfig | FalconConfig


def _projections(
    prefix: str, linear: dict[str, tuple[int, int]], shape: ModelShape
) -> tuple[Projection, ...]:
    stacked = tuple(
        Projection(path.rsplit(".", 1)[-1], prefix + path, d_in, d_out, shape.num_layers)
        for path, (d_in, d_out) in linear.items()
    )
    return (*stacked, Projection("lm_head", "lm_head", shape.d_model, shape.vocab_size, 1))


def read_config(folder: Path) -> ModelConfig:
    """Reads ``folder/config.json``. ModelInvalid, or UnsupportedModel naming what is not ours."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelInvalid(f"{path}: no such file; a model folder holds a config.json") from None
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{path}: cannot be read as JSON: {error}") from error
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], origin: str) -> ModelConfig:
    """A decoded config.json -> ModelConfig; ``origin`` names it in errors."""
    if not isinstance(raw, dict):
        raise ModelInvalid(f"{origin}: holds a {type(raw).__name__}; it must be an object")
    try:
        return _parse(raw, origin)
    except JLoraxError:
        raise
    except Exception as error:  # a user's file, and transformers' validators raise many kinds
        raise ModelInvalid(f"{origin}: {type(error).__name__}: {error}") from error


def _parse(raw: dict[str, Any], origin: str) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in _READERS:
        known = ", ".join(sorted(_READERS))
        named = model_type or ", ".join(raw.get("architectures") or ["none named"])
        raise UnsupportedModel(f"{origin}: unknown architecture {named!r}; known are: {known}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise UnsupportedModel(f"{origin}: quantised weights ({method}) are not supported")
    mapping = import_transformers("CONFIG_MAPPING")
    _check_sizes(raw)
    return _READERS[model_type](mapping[model_type].from_dict(raw), origin)


_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
}
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon")


def _check_sizes(raw: dict[str, Any]) -> None:
    """Of what is given: nonsense is named here, before anything computes with it for hours."""
    for name, most in _MOST.items():
        value = raw.get(name, 1)
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; it must be from 1 to {most}")
    for name in _EPSILONS:
        value = raw.get(name, 1e-5)
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")


def _read_llama(config: Any, origin: str) -> LlamaConfig:
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"{origin}: hidden_act {config.hidden_act!r}; known is: silu")
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return LlamaConfig(
        shape=_shape(config, config.num_key_value_heads, head_dim),
        rope=_rope(config, head_dim, origin),
        d_ff=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        window=getattr(config, "sliding_window", None),
    )


def _read_falcon(config: Any, origin: str) -> FalconConfig:
    if config.activation not in FALCON_ACTIVATIONS:
        known = ", ".join(FALCON_ACTIVATIONS)
        raise UnsupportedModel(f"{origin}: activation {config.activation!r}; known are: {known}")
    head_dim = config.hidden_size // config.num_attention_heads
    grouped = config.new_decoder_architecture or not config.multi_query
    # FalconConfig.num_kv_heads reads 71 for the 7B although it is multi-query
    num_kv_heads = config.num_kv_heads if grouped else 1
    if not config.new_decoder_architecture and grouped:
        num_kv_heads = config.num_attention_heads
    norms = config.num_ln_in_parallel_attn
    if norms is None:
        norms = 2 if config.new_decoder_architecture else 1
    return FalconConfig(
        shape=_shape(config, num_kv_heads, head_dim),
        rope=None if config.alibi else _rope(config, head_dim, origin),
        d_ff=config.ffn_hidden_size,
        norm_eps=config.layer_norm_epsilon,
        tie_embeddings=config.tie_word_embeddings,
        activation=config.activation,
        bias=config.bias,
        new_decoder=config.new_decoder_architecture,
        parallel_attention=config.parallel_attn or config.new_decoder_architecture,
        num_parallel_norms=norms if config.new_decoder_architecture else 1,
    )


FALCON_ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
_READERS: dict[str, Callable[[Any, str], ModelConfig]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "falcon": _read_falcon,
}
KNOWN_ARCHITECTURES = tuple(sorted(_READERS))


def _shape(config: Any, num_kv_heads: int, head_dim: int) -> ModelShape:
    if num_kv_heads < 1:
        raise ValueError(f"the number of kv heads is {num_kv_heads}; it must be at least 1")
    if config.num_attention_heads % num_kv_heads:
        raise ValueError(
            f"{config.num_attention_heads} heads cannot be shared by {num_kv_heads} kv heads"
        )
    return ModelShape(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_seq_len=_max_seq_len(config),
    )


def _max_seq_len(config: Any) -> int:
    """Dynamic RoPE keeps the trained length in max_position_embeddings and reaches beyond it."""
    params = config.rope_parameters or {}
    stretch = params.get("factor", 1.0) if params.get("rope_type") == "dynamic" else 1.0
    return int(config.max_position_embeddings * stretch)


def _rope(config: Any, head_dim: int, origin: str) -> Rope:
    """Frequencies by rope type, as transformers' ``modeling_rope_utils`` computes them in f32."""
    params = dict(config.rope_parameters or {})
    kind = params.get("rope_type", "default")
    if kind not in _ROPES:
        known = ", ".join(_ROPES)
        raise UnsupportedModel(f"{origin}: rope type {kind!r}; known are: {known}")
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"{origin}: partial_rotary_factor is not supported")
    params.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return _ROPES[kind](params, head_dim, config.max_position_embeddings)


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.power(np.float32(theta), exponent)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values.astype(np.float32))


def _default_rope(params: dict[str, Any], dim: int, max_position: int) -> Rope:
    return Rope(_floats(_inverse_frequencies(params["rope_theta"], dim)))


def _linear_rope(params: dict[str, Any], dim: int, max_position: int) -> Rope:
    inv_freq = _inverse_frequencies(params["rope_theta"], dim)
    return Rope(_floats(inv_freq / np.float32(params["factor"])))


def _dynamic_rope(params: dict[str, Any], dim: int, max_position: int) -> Rope:
    return Rope(
        _floats(_inverse_frequencies(params["rope_theta"], dim)),
        dynamic=DynamicRope(params["rope_theta"], params["factor"], max_position),
    )


def _llama3_rope(params: dict[str, Any], dim: int, max_position: int) -> Rope:
    inv_freq = _inverse_frequencies(params["rope_theta"], dim)
    factor, low, high = (
        params["factor"],
        params["low_freq_factor"],
        params["high_freq_factor"],
    )
    old_length = params["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    slow = wavelength > old_length / low
    scaled = np.where(slow, inv_freq / factor, inv_freq)
    smooth = (old_length / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < old_length / high) & ~slow
    return Rope(_floats(np.where(between, blended, scaled)))


def _yarn_rope(params: dict[str, Any], dim: int, max_position: int) -> Rope:
    """YaRN, Peng et al. 2023, arXiv:2309.00071."""
    theta = params["rope_theta"]
    old_length = params["original_max_position_embeddings"]
    factor = params.get("factor") or max_position / old_length

    def correction(rotations: float) -> float:
        return dim * math.log(old_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        correction(params.get("beta_fast") or 32),
        correction(params.get("beta_slow") or 1),
    )
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    inv_freq = _inverse_frequencies(theta, dim)
    return Rope(
        _floats(inv_freq / factor * (1 - kept) + inv_freq * kept),
        attention_scaling=_yarn_attention_factor(params, factor),
    )


def _yarn_attention_factor(params: dict[str, Any], factor: float) -> float:
    given = params.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)


_ROPES = {
    "default": _default_rope,
    "linear": _linear_rope,
    "dynamic": _dynamic_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
