"""Every adapter that the parity tests write: a tiny base model, and PEFT's configs over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.models.tiny import TinyModel


@dataclass(frozen=True)
class Case:
    """A LoRA as PEFT is asked to make it, and the element type of its file."""

    changes: dict[str, Any]
    dtype: str = "float32"


@dataclass(frozen=True)
class Family:
    """A base model with its adapters."""

    model: TinyModel
    cases: dict[str, Case]

    def groups(self, largest: int) -> list[list[str]]:
        """Every case once, dealt out so that neighbours (ranks, targets) share no group."""
        names = list(self.cases)
        count = -(-len(names) // largest)
        return [names[i::count] for i in range(count)]


def _lora(targets: list[str] | str, rank: int = 4, alpha: float = 6, **changes: Any) -> Case:
    dtype = changes.pop("dtype", "float32")
    return Case({"r": rank, "lora_alpha": alpha, "target_modules": targets, **changes}, dtype)


_RANKS = (1, 3, 8, 16, 24, 64, 256)
_RANK_TARGETS: tuple[list[str] | str, ...] = (
    ["q_proj", "v_proj"],
    ["k_proj", "down_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear",
    ["gate_proj", "up_proj"],
    ["v_proj", "o_proj", "lm_head"],
    "all-linear",
)
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
_FALCON_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head")

LLAMA = Family(
    TinyModel("llama", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
    {
        **{
            f"rank {rank}": _lora(targets, rank, 1.5 * rank)
            for rank, targets in zip(_RANKS, _RANK_TARGETS, strict=True)
        },
        **{f"only {name}": _lora([name]) for name in _LAYERS},
        "alpha below rank": _lora(["q_proj", "up_proj"], 8, 2.5),
        "rsLoRA": _lora(["q_proj", "o_proj"], 16, 7, use_rslora=True),
        "rank_pattern": _lora(
            ["q_proj", "v_proj", "down_proj"],
            rank_pattern={"q_proj": 9, r"layers\.1\..*v_proj": 2, r"layers\.2\..*v_proj": 17},
        ),
        "alpha_pattern": _lora(
            ["k_proj", "o_proj", "gate_proj"],
            alpha_pattern={"o_proj": 1, r"layers\.1\..*gate_proj": 11},
        ),
        "both patterns, rsLoRA": _lora(
            ["q_proj", "v_proj"],
            rank_pattern={r"layers\.0\..*q_proj": 12},
            alpha_pattern={r"layers\.0\..*q_proj": 3, "v_proj": 9},
            use_rslora=True,
        ),
        "layers_to_transform one": _lora(["q_proj", "up_proj"], layers_to_transform=1),
        "layers_to_transform list": _lora(["v_proj", "down_proj"], layers_to_transform=[0, 2]),
        "regex": _lora(r".*\.(q|down)_proj"),
        "regex layers": _lora(r"model\.layers\.[02]\.mlp\..*_proj", 6),
        "full names": _lora(["model.layers.1.self_attn.v_proj", "layers.2.mlp.up_proj"]),
        "exclude_modules": _lora("all-linear", exclude_modules=["q_proj", "1.mlp.up_proj"]),
        **{
            f"file {dtype}": _lora(["q_proj", "v_proj", "down_proj"], 10, dtype=dtype)
            for dtype in ("float16", "bfloat16")
        },
    },
)

LLAMA_TIED = Family(
    TinyModel(
        "llama",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 2,
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
    {
        "lm_head": _lora(["lm_head"], 5),
        "lm_head and more": _lora(["lm_head", "q_proj", "down_proj"], 20),
        "all-linear": _lora("all-linear", 8),
    },
)

FALCON = Family(
    TinyModel(
        "falcon",
        {"multi_query": True, "parallel_attn": True, "bias": False, "num_hidden_layers": 2},
    ),
    {
        **{f"only {name}": _lora([name]) for name in _FALCON_LAYERS},
        "all-linear": _lora("all-linear", 24, use_rslora=True),
        "patterns": _lora(
            ["query_key_value", "dense_4h_to_h"],
            rank_pattern={"query_key_value": 11},
            alpha_pattern={"dense_4h_to_h": 2},
        ),
        "layers": _lora(["query_key_value", "dense_h_to_4h"], 64, layers_to_transform=[1]),
    },
)

FALCON_NEW_DECODER = Family(
    TinyModel(
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "bias": False,
            "num_hidden_layers": 2,
        },
    ),
    {"grouped query_key_value": _lora(["query_key_value", "dense"], 12)},
)

MISTRAL = Family(
    TinyModel("mistral", {"sliding_window": 16, "head_dim": 24, "num_hidden_layers": 2}),
    {
        "attention": _lora(["q_proj", "k_proj", "v_proj", "o_proj"], 16),
        "mlp": _lora(["gate_proj", "up_proj", "down_proj"], 3, dtype="bfloat16"),
        "one layer": _lora(["v_proj", "o_proj", "up_proj"], 9, layers_to_transform=[1]),
    },
)

FAMILIES = {
    "llama": LLAMA,
    "llama tied": LLAMA_TIED,
    "falcon": FALCON,
    "falcon new decoder": FALCON_NEW_DECODER,
    "mistral": MISTRAL,
}
