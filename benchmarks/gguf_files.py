"""The base model and adapters as float32 GGUF files, for llama.cpp.

As llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py write them: the rows of q and k are
interleaved per head, and so are the rows of their lora_B.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from jlorax.models.gguf import interleave

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def write_model(folder: Path, path: Path) -> None:
    """A Hugging Face folder of a tied Llama -> one float32 GGUF."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            module = name.removesuffix(".weight")
            tensor = _reordered(file.get_tensor(name), module, config)
            writer.add_tensor(f"{_gguf_name(module)}.weight", tensor.astype(np.float32, copy=False))
    _finish(writer)


def write_adapter(folder: Path, model: Path, path: Path) -> None:
    """A PEFT folder -> a GGUF adapter. llama.cpp scales by alpha / r itself."""
    config = json.loads((model / "config.json").read_text())
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        is_b = side.startswith("B")
        rows = _reordered(tensor, module, config) if is_b else tensor
        writer.add_tensor(f"{_gguf_name(module)}.weight.lora_{'b' if is_b else 'a'}", rows)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(module: str) -> str:
    """ "model.layers.3.self_attn.q_proj" -> "blk.3.attn_q"."""
    if module in _OTHER_NAMES:
        return _OTHER_NAMES[module]
    layer, _, name = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[name]}"


def _reordered(tensor: np.ndarray, module: str, config: dict[str, Any]) -> np.ndarray:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = heads.get(module.rpartition(".")[2])
    return tensor if kind is None else np.ascontiguousarray(interleave(tensor, config[kind]))


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Needed to load the file; the benchmark gives and takes token ids."""
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {i: text for text, i in tokenizer["model"]["vocab"].items()} | special
    tokens = [by_id.get(i, f"[unused {i}]") for i in range(config["vocab_size"])]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = (m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in special else normal for i in range(len(tokens))])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
