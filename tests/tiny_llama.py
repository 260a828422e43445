"""A tiny random Llama in Hugging Face's files, made without torch, and adapters for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.adapters import helpers

D, KV, FFN, VOCAB, LAYERS, HEADS = 32, 16, 48, 64, 2, 4
EOS = 2
PROJECTIONS = helpers.llama_projections(D, KV, FFN, VOCAB, LAYERS)
TARGETS = ("q_proj", "v_proj", "down_proj")


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS * KV // D,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), folder / "model.safetensors")
    words = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **names}))
    return folder


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        drawn = random.normal(size=(rows, columns)).astype(np.float32)
        return drawn / np.float32(columns**0.5)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, D) * np.float32(D**0.5),
        "lm_head.weight": matrix(VOCAB, D) * np.float32(3),
        "model.norm.weight": np.ones(D, np.float32),
    }
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(D, np.float32)
    for p in PROJECTIONS:
        for layer in range(p.num_layers) if p.name != "lm_head" else ():
            weights[f"{p.module(layer)}.weight"] = matrix(p.d_out, p.d_in)
    return weights


def write_adapter(folder: Path, seed: int) -> Path:
    """One of several ranks that all fill one page, so that all take the same room."""
    rank = 1 + seed % 8
    modules = helpers.modules_of(PROJECTIONS, TARGETS, rank)
    drawn = helpers.tensors_for(modules, PROJECTIONS, seed=seed)
    tensors = {name: (tensor * 0.3).astype(np.float32) for name, tensor in drawn.items()}
    values = helpers.config(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    return helpers.write(folder, values, helpers.safetensors_bytes(tensors))
