"""What is written for llama.cpp says the same as the folders it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import gguf_files
from benchmarks.make_adapters import make_adapters
from jlorax.models.gguf import deinterleave, read_gguf

HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, LAYERS = 32, 4, 2, 48, 40, 2
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama's folder: random weights, a vocabulary with one special token and one gap."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vocab = {f"t{i}": i for i in range(1, VOCAB - 1)}
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<end>"}],
        "model": {"vocab": vocab, "merges": [["t", "1"]]},
    }
    random = np.random.default_rng(0)
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    drawn = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(drawn, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_the_model_has_every_weight_with_q_and_k_interleaved(model: Path, tmp_path: Path) -> None:
    gguf_files.write_model(model, tmp_path / "model.gguf")
    read = read_gguf(tmp_path / "model.gguf")
    weights = load_file(model / "model.safetensors")
    assert len(read.tensors) == len(weights)
    layer = "model.layers.1.self_attn"
    for name, ours, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
        restored = deinterleave(np.asarray(read.tensors[f"blk.1.{name}.weight"].data), heads)
        assert np.array_equal(restored, weights[f"{layer}.{ours}.weight"])
    down = read.tensors["blk.0.ffn_down.weight"].data
    assert np.array_equal(down, weights["model.layers.0.mlp.down_proj.weight"])


def test_the_vocabulary_is_whole_and_its_special_token_marked(model: Path, tmp_path: Path) -> None:
    gguf_files.write_model(model, tmp_path / "model.gguf")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB
    assert (tokens[0], types[0]) == ("<end>", gguf.TokenType.CONTROL)
    assert (tokens[5], types[5]) == ("t5", gguf.TokenType.NORMAL)
    assert metadata["tokenizer.ggml.merges"] == ["t 1"]


def test_an_adapters_product_is_the_weights_order(model: Path, tmp_path: Path) -> None:
    """B @ A must add to q's rows where the base file put them."""
    folder = make_adapters(model, tmp_path, 1, ranks=(4,))[0]
    gguf_files.write_adapter(folder, model, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    tensors = {t.name: np.asarray(t.data) for t in reader.tensors}
    delta = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    saved = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    expected = saved[f"{key}.lora_B.weight"] @ saved[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(deinterleave(delta, HEADS), expected, rtol=1e-5, atol=1e-6)
    assert len(tensors) == len(saved)
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
