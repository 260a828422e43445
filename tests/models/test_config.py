"""Reading config.json: shapes, rotary frequencies as transformers', and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlorax.errors import ModelInvalid, UnsupportedModel
from jlorax.models.config import FalconConfig, LlamaConfig, parse_config, read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    "yarn mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn not truncated": {"rope_type": "yarn", **YARN, "truncate": False},
}
THETAS = (10_000.0, 500_000.0)


def llama(**changes: Any) -> LlamaConfig:
    config = parse_config({**LLAMA, **changes}, "config.json")
    assert isinstance(config, LlamaConfig)
    return config


def falcon(**changes: Any) -> FalconConfig:
    config = parse_config({**FALCON, **changes}, "config.json")
    assert isinstance(config, FalconConfig)
    return config


def old_keys(rope: dict[str, Any], theta: float) -> dict[str, Any]:
    """As transformers 4 wrote them."""
    kind = rope["rope_type"]
    rest = {k: v for k, v in rope.items() if k != "rope_type"}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rest},
        "torch_dtype": "float16",
    }


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("are_old", [False, True], ids=["5", "4"])
def test_frequencies_equal_transformers(name: str, theta: float, are_old: bool) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    new = {"rope_parameters": {**ROPES[name], "rope_theta": theta}}
    rope = llama(**(old_keys(ROPES[name], theta) if are_old else new)).rope
    theirs = LlamaRotaryEmbedding(TheirConfig(**{**LLAMA, **new}))
    np.testing.assert_allclose(rope.inv_freq, theirs.inv_freq.numpy(), rtol=1e-6)
    assert rope.attention_scaling == pytest.approx(theirs.attention_scaling, rel=1e-7)
    assert (rope.dynamic is not None) == (name == "dynamic")


def test_no_rope_keys_at_all() -> None:
    assert llama().rope == llama(rope_theta=10_000.0).rope


def test_dynamic_rope_reaches_beyond_its_training() -> None:
    dynamic = {"type": "dynamic", "factor": 4.0}
    assert llama(rope_scaling=dynamic).shape.max_seq_len == 2048
    assert llama(rope_scaling={"type": "linear", "factor": 4.0}).shape.max_seq_len == 512


def test_head_dim_of_its_own() -> None:
    assert llama(head_dim=24).shape.head_dim == 24
    assert llama().shape.head_dim == 16
    assert llama(head_dim=None).shape.head_dim == 16


def test_mistral_window() -> None:
    assert llama(model_type="mistral", sliding_window=32).window == 32
    assert llama(model_type="mistral", sliding_window=None).window is None
    assert llama().window is None


@pytest.mark.parametrize(
    ("changes", "num_kv_heads", "num_norms"),
    [
        ({"multi_query": True, "num_kv_heads": 4}, 1, 1),  # the 7B's file says 71
        ({"multi_query": False}, 4, 1),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, 2),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            2,
            1,
        ),
    ],
)
def test_falcon_heads_and_norms(changes: dict[str, Any], num_kv_heads: int, num_norms: int) -> None:
    config = falcon(**changes)
    assert config.shape.num_kv_heads == num_kv_heads
    assert config.num_parallel_norms == num_norms


def test_falcon_alibi_has_no_rope() -> None:
    assert falcon(alibi=True).rope is None
    assert falcon().rope is not None


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "gpt_neox"}, ("gpt_neox", "falcon, llama, mistral")),
        ({"architectures": ["BloomForCausalLM"]}, ("BloomForCausalLM", "falcon, llama, mistral")),
        ({}, ("none named", "falcon, llama, mistral")),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, ("gptq", "not supported")),
        ({**LLAMA, "hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({**FALCON, "activation": "tanh"}, ("activation", "tanh", "gelu")),
        ({**LLAMA, "rope_scaling": LONGROPE}, ("longrope", "yarn")),
        ({**LLAMA, "partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    ],
)
def test_unsupported_is_named_with_what_is_known(
    raw: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse_config(raw, "some/config.json")
    assert "some/config.json" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "llama3", "factor": 8.0}},
        {"quantization_config": "gptq"},
        {"architectures": 3, "model_type": None},
    ],
)
def test_a_value_that_cannot_be_is_invalid(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelInvalid, match=r"some/config\.json"):
        parse_config({**LLAMA, **changes}, "some/config.json")


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match=r"config\.json: no such file"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"llama"', b"\xff\xfe{}"])
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        read_config(tmp_path)


def test_reads_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == llama()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-5),
    ],
)
def test_a_size_that_no_model_has_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ModelInvalid, match=key):
        parse_config(LLAMA | {key: value}, "config.json")
