"""Writes the golden models, adapters and answers: `python -m tests.golden.make_golden`.

transformers and peft compute them (in float32, one row at a time), so that an interpreter without
torch can be held to the same truth. Seeded: the same versions write the same values again.

    data/<family>/model/            config, weights, tokenizer
    data/<family>/<adapter>/        as PEFT saves it
    data/<family>/answers.npz       per row i: prompt_i, tokens_i (greedy), logits_i (before the
                                      first tokens), and who answers: adapter_i ("" is the base)
"""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from tests.lora.oracle import logits_of, write_adapter

FOLDER = Path(__file__).parent / "data"
VOCAB_SIZE = 200
NUM_TOKENS = 32
NUM_LOGITS = 8
_PROMPT_TOKENS = (7, 41)  # less than a KV page, and more than Mistral's window
_TIE = 2e-4  # of the largest logit; a nearer race would make the tokens a matter of rounding

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            **_LLAMA,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 16, "head_dim": 16}),
    "falcon": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
        },
    ),
}
_DENSE = ["q_proj", "v_proj", "down_proj"]
_ADAPTERS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "llama": {
        "rank-11": (
            {"r": 11, "lora_alpha": 16, "target_modules": _DENSE, "use_rslora": True},
            "float32",
        ),
        "head": ({"r": 3, "lora_alpha": 5, "target_modules": ["lm_head", "k_proj"]}, "float16"),
    },
    "mistral": {
        "all-linear": ({"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}, "bfloat16"),
        "one-layer": (
            {
                "r": 2,
                "lora_alpha": 3,
                "target_modules": _DENSE,
                "layers_to_transform": 1,
                "rank_pattern": {"v_proj": 17},
            },
            "float32",
        ),
    },
    "falcon": {
        "fused": ({"r": 9, "lora_alpha": 6, "target_modules": ["query_key_value"]}, "float32"),
        "dense": (
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["dense", "dense_h_to_4h", "dense_4h_to_h"],
                "alpha_pattern": {"dense": 2},
            },
            "float16",
        ),
    },
}


def make_model(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None, **changes
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM  # untyped, as is the tokenizer
    model = auto.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        drawn = torch.randn_like(parameter)
        parameter.data = drawn * 0.15 if parameter.ndim > 1 else parameter.data + drawn * 0.2
    model.eval().save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(tokenizer_object=backend).save_pretrained(folder)
    return model


def answer(model: Any, folder: Path | None, prompt: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Greedy, with a whole forward pass a token: no cache that could be wrong."""
    row = prompt
    for _ in range(NUM_TOKENS):
        logits = logits_of(model, folder, [row])[0]
        row = (*row, int(logits[-1].argmax()))
    tokens = np.array(row[len(prompt) :], np.int32)
    return {"prompt": np.array(prompt, np.int32), "tokens": tokens, "logits": logits[-NUM_TOKENS:]}


def is_tied(logits: np.ndarray) -> bool:
    best = np.sort(logits, axis=-1)[:, -2:]
    return bool((best[:, 1] - best[:, 0]).min() < _TIE * np.abs(logits).max())


def answers(model: Any, folders: list[Path | None], num_tokens: int) -> list[dict[str, np.ndarray]]:
    """Of the first seeded prompt to which nobody's answer comes near a tie."""
    for seed in count():
        random = np.random.default_rng((num_tokens, seed))
        prompt = tuple(random.integers(0, VOCAB_SIZE, num_tokens).tolist())
        made = [answer(model, folder, prompt) for folder in folders]
        if not any(is_tied(row["logits"]) for row in made):
            break
    return made


def make_family(family: str, folder: Path) -> None:
    model = make_model(folder / "model", *_MODELS[family])
    for i, (name, (changes, dtype)) in enumerate(_ADAPTERS[family].items()):
        write_adapter(model, folder / name, changes, dtype, seed=i)
        (folder / name / "README.md").unlink()  # PEFT's model card says nothing here
    folders = [None, *(folder / name for name in _ADAPTERS[family])]
    arrays: dict[str, Any] = {}
    for n in _PROMPT_TOKENS:
        for adapter, made in zip(folders, answers(model, folders, n), strict=True):
            i = len(arrays) // 4
            made["logits"] = made["logits"][:NUM_LOGITS]
            arrays |= {f"{key}_{i}": array for key, array in made.items()}
            arrays[f"adapter_{i}"] = np.array("" if adapter is None else adapter.name)
    np.savez_compressed(folder / "answers.npz", **arrays)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for family in _MODELS:
        make_family(family, FOLDER / family)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER.name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
