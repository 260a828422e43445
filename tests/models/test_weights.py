"""Loading base weights: every leaf lands, and a broken folder is refused with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlorax.errors import ModelInvalid
from jlorax.models.config import ModelConfig, parse_config
from jlorax.models.weights import load_model, outline, weight_bytes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def config_of(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_config({**raw, **changes}, "config.json")


def llama_tensors() -> dict[str, np.ndarray]:
    """As a Llama's file names and shapes them ([d_out, d_in])."""
    layer = {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
        "input_layernorm": (16,),
        "post_attention_layernorm": (16,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": dims for name, dims in layer.items()}
    random = np.random.default_rng(0)
    return {name: random.normal(size=d).astype(np.float32) for name, d in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(llama_tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = llama_tensors()
    place = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if place[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(folder: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(ModelInvalid) as caught:
        load_model(folder, config or config_of(LLAMA), "float32")
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_every_number_arrives(folder: Path) -> None:
    model = load_model(folder, config_of(LLAMA), "float32")
    sizes = sum(leaf.size for leaf in model.leaves)
    assert sizes == sum(tensor.size for tensor in llama_tensors().values())
    mine = np.sort(np.concatenate([np.asarray(leaf).ravel() for leaf in model.leaves]))
    theirs = np.sort(np.concatenate([t.ravel() for t in llama_tensors().values()]))
    np.testing.assert_array_equal(mine, theirs)


def test_shards_hold_the_same(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    single = tmp_path_factory.mktemp("single")
    save_file(llama_tensors(), single / "model.safetensors")
    pair = [load_model(f, config_of(LLAMA), "float32").leaves for f in (sharded, single)]
    for a, b in zip(*pair, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_on_request(folder: Path) -> None:
    model = load_model(folder, config_of(LLAMA), "bfloat16")
    assert {leaf.dtype.name for leaf in model.leaves} == {"bfloat16"}
    assert model.size_bytes == weight_bytes(config_of(LLAMA), "bfloat16")


def test_progress_reaches_the_end(folder: Path) -> None:
    told: list[float] = []
    load_model(folder, config_of(LLAMA), "float32", lambda _, fraction: told.append(fraction))
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_missing_tensors_are_listed(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(Q_PROJ), t.pop("model.norm.weight")])
    message = refusal(folder)
    assert "2 tensors are missing" in message
    assert Q_PROJ in message
    assert "model.norm.weight" in message


def test_left_over_tensors_are_listed(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.extra.weight": np.zeros((2, 2), np.float32)}))
    assert "1 tensors have no place: model.extra.weight" in refusal(folder)


def test_both_lists_at_once_and_shortened(folder: Path) -> None:
    """A config of three layers over a file of two; and biases that the config does not ask for."""
    rewrite(folder, lambda t: t.update({"model.norm.bias": np.zeros(16, np.float32)}))
    message = refusal(folder, config_of(LLAMA, num_hidden_layers=3))
    assert "9 tensors are missing: model.layers.2.input_layernorm.weight" in message
    assert "and 4 more" in message
    assert "model.norm.bias" in message


def test_a_bias_that_the_config_denies_is_left_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda t: t.update({name: np.ones(16, np.float32)}))
    assert name in refusal(folder)


def test_harmless_left_overs_pass(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: np.zeros(2, np.float32)}))
    load_model(folder, config_of(LLAMA), "float32")
    load_model(folder, config_of(LLAMA, tie_word_embeddings=True), "float32")  # a tied lm_head


def test_an_untied_head_may_not_be_missing(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(folder)


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_wrong_shape_with_both_numbers(folder: Path, name: str) -> None:
    """In the files' own order, [d_out, d_in], so that the numbers are found in the file."""
    wrong = tuple(n + 1 for n in llama_tensors()[name].shape)
    rewrite(folder, lambda t: t.update({name: np.zeros(wrong, np.float32)}))
    message = refusal(folder)
    assert name in message
    assert str(wrong) in message
    assert str(llama_tensors()[name].shape) in message


def test_transposed_square_parts_cannot_hide(folder: Path) -> None:
    """q, k and v are joined: sizes that only add up are wrong too."""
    prefix = "model.layers.0.self_attn."
    swapped = {"q": (8, 16), "k": (16, 16)}
    rewrite(
        folder,
        lambda t: t.update(
            {f"{prefix}{n}_proj.weight": np.zeros(d, np.float32) for n, d in swapped.items()}
        ),
    )
    message = refusal(folder)
    assert f"{prefix}q_proj.weight" in message
    assert "(8, 16)" in message


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    message = refusal(sharded)
    assert "1 of 2 shards are missing" in message
    assert SHARDS[1] in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_no_weights_at_all(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert "index.json" in message


@pytest.mark.parametrize("length", [0, 7, 200])
def test_torn_file(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors" in refusal(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({Q_PROJ: np.zeros((16, 16), np.int8)}))
    message = refusal(folder)
    assert Q_PROJ in message
    assert "int8" in message


@pytest.mark.parametrize("raw", [LLAMA, FALCON], ids=["llama", "falcon"])
def test_outline_weighs_what_the_model_will(raw: dict[str, Any]) -> None:
    config = config_of(raw)
    sizes = {dtype: weight_bytes(config, dtype) for dtype in ("float32", "bfloat16")}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert sizes["float32"] == 4 * sum(leaf.size for leaf in outline(config, "float32").leaves)
