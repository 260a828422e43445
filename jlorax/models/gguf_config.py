"""A GGUF's `llama.*` metadata as config.json of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jlorax.errors import ModelInvalid, UnsupportedModel

_P = "llama."
_KNOWN_KEYS = frozenset(
    _P + key
    for key in (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_log_multiplier",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "expert_count",
        "expert_used_count",
        "tensor_data_layout",
    )
)
# Only these values mean the same in transformers' YaRN.
_YARN_FIXED = {
    "attn_factor": 1.0,
    "yarn_log_multiplier": 0.0,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
}

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class ModelShape:
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    sliding_window: int | None  # tokens; only Mistral's files have it

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of a Hugging Face tensor: (d_out, d_in), or (D,) for a norm."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "embed_tokens": (self.vocab_size, self.hidden_size),
            "lm_head": (self.vocab_size, self.hidden_size),
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.ffn_size, self.hidden_size),
            "up_proj": (self.ffn_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.ffn_size),
        }
        return shapes.get(name.split(".")[-2], (self.hidden_size,))


def read_shape(
    metadata: Metadata, rope_divisors: npt.NDArray[np.float32] | None, file: str
) -> ModelShape:
    """Raises ModelInvalid, which names the key, for what Llama in transformers cannot express."""
    if metadata.get(_P + "expert_count"):
        raise UnsupportedModel(f"{file}: llama.expert_count: mixtures of experts are not supported")
    strange = sorted(k for k in metadata if k.startswith(_P) and k not in _KNOWN_KEYS)
    if strange:
        raise ModelInvalid(f"{file}: unknown keys: {', '.join(strange)}")
    numbers = _Numbers(metadata, file)
    hidden_size = numbers.count("embedding_length")
    num_heads = numbers.count("attention.head_count")
    num_kv_heads = numbers.count("attention.head_count_kv", num_heads)
    head_dim = numbers.count("attention.key_length", hidden_size // num_heads)
    numbers.same("attention.value_length", head_dim)
    numbers.same("rope.dimension_count", head_dim)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelInvalid(
            f"{file}: {num_heads} heads, {num_kv_heads} kv heads of {head_dim} do not fit together"
        )
    max_positions = numbers.count("context_length")
    window = numbers.count("attention.sliding_window", max_positions)
    num_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    return ModelShape(
        num_layers=numbers.count("block_count"),
        hidden_size=hidden_size,
        ffn_size=numbers.count("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=numbers.count("vocab_size", num_tokens),
        max_positions=max_positions,
        rms_norm_eps=numbers.real("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(numbers, rope_divisors, head_dim),
        sliding_window=window if window < max_positions else None,
    )


def model_config(shape: ModelShape, tied: bool) -> dict[str, Any]:
    """config.json, without the token ids."""
    mistral = shape.sliding_window is not None
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": shape.rope_parameters,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if mistral:
        return config | {"sliding_window": shape.sliding_window}
    return config | {"attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class _Numbers:
    """Typed reading of `llama.*`."""

    metadata: Metadata
    file: str

    def count(self, key: str, default: int | None = None) -> int:
        """Files of some models give one value per layer; only uniform ones are expressible."""
        value = self.metadata.get(_P + key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelInvalid(f"{self.file}: {_P}{key} differs between layers: {value}")
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise ModelInvalid(f"{self.file}: {_P}{key} must be a positive number, not {value!r}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(_P + key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelInvalid(f"{self.file}: {_P}{key} must be a finite number, not {value!r}")
        return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06

    def same(self, key: str, expected: int) -> None:
        if self.count(key, expected) != expected:
            raise ModelInvalid(
                f"{self.file}: {_P}{key} is {self.count(key)}; only {expected} can be expressed"
            )


def _rope(
    numbers: _Numbers, divisors: npt.NDArray[np.float32] | None, head_dim: int
) -> dict[str, Any]:
    theta = numbers.real("rope.freq_base", 10000.0)
    kind = numbers.metadata.get(_P + "rope.scaling.type", "none")
    linear = numbers.real("rope.scale_linear", 1.0)  # how it was said before rope.scaling.*
    if kind == "none" and linear != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": linear}
    if divisors is not None and not np.all(divisors == 1.0):
        if kind != "none":
            raise ModelInvalid(
                f"{numbers.file}: rope_freqs.weight together with llama.rope.scaling.type {kind!r}"
            )
        return {"rope_theta": theta, **_llama3(divisors, theta, head_dim, numbers.file)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ModelInvalid(
            f"{numbers.file}: llama.rope.scaling.type is {kind!r}; known are none, linear, yarn"
        )
    extra = _yarn(numbers) if kind == "yarn" else {}
    factor = numbers.real("rope.scaling.factor")
    return {"rope_type": kind, "rope_theta": theta, "factor": factor, **extra}


def _yarn(numbers: _Numbers) -> dict[str, Any]:
    for key, expected in _YARN_FIXED.items():
        value = numbers.real(f"rope.scaling.{key}", expected)
        if value != expected:
            raise ModelInvalid(
                f"{numbers.file}: llama.rope.scaling.{key} is {value}; "
                f"only {expected} can be expressed"
            )
    return {
        "original_max_position_embeddings": numbers.count("rope.scaling.original_context_length"),
        "beta_fast": numbers.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": numbers.real("rope.scaling.yarn_beta_slow", 1.0),
    }


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: float
) -> npt.NDArray[np.float64]:
    """f64[h / 2]: how much slower Llama 3 turns each pair of a head.

    With turns(i) = original * theta^(-2i/h) / 2pi over the original context:
    1 above ``high`` turns, ``factor`` below ``low``, and between them 1 / ((1 - s) / factor + s)
    where s = (turns - low) / (high - low). Source: convert_hf_to_gguf.py and transformers.
    """
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3(
    divisors: npt.NDArray[np.float32], theta: float, head_dim: int, file: str
) -> dict[str, Any]:
    """The parameters behind the baked divisors: recovered, then proved by computing them again.

    (low, high, original) only matter up to a common factor, so low is 1 as in every release.
    """
    factor = float(str(divisors.max()))
    for high, original in [(4.0, 8192), *_fitted(divisors, theta, head_dim, factor)]:
        again = llama3_divisors(theta, head_dim, factor, 1.0, high, original)
        if again.shape == divisors.shape and np.allclose(again, divisors, rtol=1e-4, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ModelInvalid(f"{file}: rope_freqs.weight is not a llama3 scaling of the frequencies")


def _fitted(
    divisors: npt.NDArray[np.float32], theta: float, head_dim: int, factor: float
) -> list[tuple[float, int]]:
    """(high, original) from the line s(1 / wavelength), where two points at least lie on it."""
    if len(divisors) != head_dim // 2 or factor <= 1.0:
        return []
    between = (divisors > 1.0 + 1e-5) & (divisors < factor * (1.0 - 1e-5))
    if between.sum() < 2:
        return []
    smooth = (1.0 / divisors.astype(np.float64) - 1.0 / factor) / (1.0 - 1.0 / factor)
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    slope, intercept = np.polyfit(turns[between], smooth[between], 1)
    high = 1.0 - 1.0 / intercept
    return [(round(float(high), 3), round(float(slope * (high - 1.0))))]
