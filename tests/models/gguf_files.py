"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's stand-ins for the 256 bytes, in order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    stand_in = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [stand_in[b] for b in range(256)]


def bpe_metadata(pre: str = "smollm") -> dict[str, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "12 3"]
    tokens = [*special, *byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


# best first; "el", "lo" and "s>" tempt a merge in the wrong order, or into the token "<s>"
SPM_PIECES = (
    *("he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world"),
    *("aa", "▁▁", "el", "lo", "s>"),
)


def spm_metadata() -> dict[str, Any]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*SPM_PIECES, "▁", *letters, "<", ">", "/"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def llama_metadata() -> dict[str, Any]:
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
    }


def hf_weights(vocab_size: int, tied: bool = True) -> dict[str, np.ndarray]:
    """Random weights by their Hugging Face names, each f32[d_out, d_in]."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        shapes[layer + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[layer + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[layer + "mlp.gate_proj.weight"] = (FFN, HIDDEN)
        shapes[layer + "mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, FFN)
    return {
        name: rng.normal(len(shape) == 1, 0.1, shape).astype(np.float32)  # norms are about 1
        for name, shape in shapes.items()
    }


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renamed, q and k permuted: row by row, so not by the formula that the code inverts."""
    tensors = {}
    for name, weight in weights.items():
        for old, new in _GGUF_NAMES.items():
            name = name.replace(old, new)
        if "attn_q" in name or "attn_k" in name:
            # in each head, row i and row i + h/2 turn together: llama.cpp puts them side by side
            half = HEAD_DIM // 2
            order = [
                head + i + part * half
                for head in range(0, len(weight), HEAD_DIM)
                for i in range(half)
                for part in (0, 1)
            ]
            weight = weight[order]
        tensors[name] = weight
    return tensors


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """``kind`` is for the matrices; norms stay F32, as llama.cpp keeps them."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        as_kind = kind if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tiny_gguf(path: Path, tokenizer: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A whole small model. ``changes`` of metadata: dots of a key are written "__"."""
    tokenizer = bpe_metadata() if tokenizer is None else tokenizer
    metadata = {**llama_metadata(), **tokenizer}
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    weights = hf_weights(len(tokenizer["tokenizer.ggml.tokens"]))
    return write_gguf(path, metadata, gguf_tensors(weights))
