"""PEFT is the truth: its own modules say which weights, ranks and scalings an adapter has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jlorax.adapters import peft_config  # noqa: E402
from jlorax.adapters.peft import read_adapter, read_config  # noqa: E402
from jlorax.errors import JLoraxError  # noqa: E402
from jlorax.types import Projection  # noqa: E402

NUM_LAYERS = 3


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        bias=False,
    )
    return transformers.FalconForCausalLM(config)


def projections_of(model: Any) -> tuple[Projection, ...]:
    """From the modules themselves, so that no size is typed twice."""
    found: dict[str, Projection] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            path = ".".join("{layer}" if part.isdecimal() else part for part in name.split("."))
            layers = NUM_LAYERS if "{layer}" in path else 1
            last = path.rpartition(".")[2]
            found[path] = Projection(last, path, module.in_features, module.out_features, layers)
    return tuple(found.values())


def lora_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            yield name, module


def save(model: Any, folder: Path, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A saved adapter with random A and B; returns PEFT's model as loaded from the file again."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **changes)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for _, module in lora_modules(adapted):
        for side in (module.lora_A["default"], module.lora_B["default"]):
            torch.nn.init.normal_(side.weight)
            side.weight.data = side.weight.data.to(dtype)
    adapted.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(
        adapted.unload(), str(folder), autocast_adapter_dtype=False
    )


FEATURES: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "defaults": {"target_modules": ["q_proj"]},
    "rslora": {"r": 7, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj"]},
    "float alpha": {"r": 6, "lora_alpha": 2.5, "target_modules": ["o_proj"]},
    "regex": {"target_modules": r".*\.(q|down)_proj"},
    "regex layers": {"target_modules": r"model\.layers\.[02]\.mlp\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"],
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "full name ignores layers": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "layers pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
    },
    "layers patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "layers"],
    },
    "exclude list": {
        "target_modules": "all-linear",
        "exclude_modules": ["q_proj", "1.mlp.up_proj"],
    },
    "exclude regex": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "rank pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {
            "q_proj": 9,
            r"layers\.1\..*v_proj": 2,
            "^model.layers.2.mlp.down_proj": 3,
        },
    },
    "first pattern wins": {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3},
    },
    "a suffix of a word is no match": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"proj": 2, "_proj": 3},
    },
    "alpha pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {r".*\.0\.self_attn\.(q|v)_proj": 32, "v_proj": 1.5},
        "use_rslora": True,
    },
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "unmatched target": {"target_modules": ["q_proj", "query_key_value"]},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
}

FALCON: dict[str, dict[str, Any]] = {
    "fused": {"target_modules": ["query_key_value"]},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "dense is no suffix": {"target_modules": ["dense"], "rank_pattern": {"dense": 5}},
    "layers": {"target_modules": ["dense_h_to_4h"], "layers_to_transform": [1, 2]},
    "layers h": {
        "target_modules": ["dense_h_to_4h"],
        "layers_to_transform": [0],
        "layers_pattern": "h",
    },
    "lm_head": {"target_modules": ["lm_head", "dense_4h_to_h"]},
}


def check_same(model: Any, folder: Path, dtype: Any = torch.float32, **changes: Any) -> None:
    projections = projections_of(model)
    truth = save(model, folder, dtype, **changes)
    adapter = read_adapter(folder, "a", projections, 256)
    found = {
        p.module(layer): weights
        for p in projections
        for layer, weights in adapter.weights.get(p.name, {}).items()
    }
    expected = dict(lora_modules(truth))
    assert expected and found.keys() == expected.keys()
    for name, module in expected.items():
        weights = found[name]
        assert weights.rank == module.r["default"]
        assert weights.scaling == np.float32(module.scaling["default"])
        for ours, theirs in ((weights.a, module.lora_A), (weights.b, module.lora_B)):
            tensor = theirs["default"].weight.detach()
            assert ours.dtype.name == str(dtype).removeprefix("torch.")
            np.testing.assert_array_equal(ours.astype(np.float32), tensor.float().numpy())
    assert read_config(folder, "a").max_rank >= max(w.rank for w in found.values())


@pytest.mark.parametrize("feature", FEATURES)
def test_llama(feature: str, tmp_path: Path) -> None:
    check_same(llama(), tmp_path, **FEATURES[feature])


@pytest.mark.parametrize("feature", FALCON)
def test_falcon(feature: str, tmp_path: Path) -> None:
    check_same(falcon(), tmp_path, **FALCON[feature])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    check_same(llama(), tmp_path, dtype=getattr(torch, dtype), target_modules=["q_proj"])


def test_all_linear_as_written_by_hand(tmp_path: Path) -> None:
    """PEFT saves the names it found; its own reader also takes the shorthand."""
    model = llama()
    projections = projections_of(model)
    save(model, tmp_path, target_modules="all-linear")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "ALL-linear"}))
    adapter = read_adapter(tmp_path, "a", projections, 256)
    assert set(adapter.weights) == {p.name for p in projections} - {"lm_head"}


def test_tied_lm_head(tmp_path: Path) -> None:
    check_same(llama(tied=True), tmp_path, target_modules=["lm_head"])
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert "base_model.model.lm_head.base_layer.weight" in list(file.keys())


REFUSED: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
}


@pytest.mark.parametrize("feature", REFUSED)
def test_saved_by_peft_and_refused_by_name(feature: str, tmp_path: Path) -> None:
    model = llama()
    projections = projections_of(model)
    changes = {"target_modules": ["q_proj"], **REFUSED[feature]}
    peft.get_peft_model(model, peft.LoraConfig(**changes)).save_pretrained(str(tmp_path))
    with pytest.raises(JLoraxError, match=feature.partition("_niter")[0]):
        read_adapter(tmp_path, "a", projections, 256)


def test_every_field_of_lora_config_is_decided() -> None:
    """A newer PEFT with a new field turns this red: decide whether it changes inference."""
    decided = [
        peft_config.UNDERSTOOD,
        peft_config.HARMLESS,
        frozenset(peft_config.MUST_BE_EMPTY),
    ]
    assert sum(map(len, decided)) == len(frozenset().union(*decided))
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert fields - frozenset().union(*decided) == set()


def test_defaults_are_pefts() -> None:
    theirs = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    theirs.update(target_modules=["q_proj"], peft_type="LORA")
    written = peft_config.parse_config(json.dumps(theirs).encode(), "a")
    bare = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}).encode()
    assert peft_config.parse_config(bare, "a") == written
