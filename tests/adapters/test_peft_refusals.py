"""One case per fault: each is AdapterInvalid (or UnsupportedAdapter), with the numbers in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlorax.adapters.peft import read_adapter, read_config
from jlorax.adapters.peft_config import MUST_BE_EMPTY, parse_config
from jlorax.errors import AdapterInvalid, UnsupportedAdapter
from tests.adapters import helpers

PROJECTIONS = helpers.llama_projections()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, np.ndarray]


def good() -> Tensors:
    names = helpers.modules_of(PROJECTIONS, ("q_proj", "v_proj"), 4)
    return helpers.tensors_for(names, PROJECTIONS)


def refusal(folder: Path, max_rank: int = 64) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder, "mine", PROJECTIONS, max_rank)
    assert caught.value.adapter == "mine"
    return caught.value


def test_the_good_one_is_read(tmp_path: Path) -> None:
    helpers.write(tmp_path, helpers.config(), helpers.safetensors_bytes(good(), {"format": "pt"}))
    adapter = read_adapter(tmp_path, "mine", PROJECTIONS, 64)
    assert adapter.ranks == {"q_proj": 4, "v_proj": 4}
    assert adapter.weights["q_proj"][0].scaling == 2


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def put(key: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, value)


def poison(value: float, dtype: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        array = tensors[f"{Q0}.lora_B.weight"].astype(dtype)
        array[3, 1] = value
        tensors[f"{Q0}.lora_B.weight"] = array

    return change


def drop_all(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in [k for k in tensors if part in k]:
            del tensors[key]

    return change


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
LAYER_9999 = Q0.replace("layers.0", "layers.9999")

WEIGHT_FAULTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "A without B": (lambda t: t.__delitem__(B), "layers.0.self_attn.q_proj has no lora_B"),
    "B without A": (lambda t: t.__delitem__(A), "layers.0.self_attn.q_proj has no lora_A"),
    "a layer is missing": (drop_all("layers.1.self_attn.q"), "1 of 4 modules are missing"),
    "all layers are missing": (drop_all("v_proj"), "2 of 4 modules are missing"),
    "empty": (drop_all(""), "4 of 4 modules are missing"),
    "layer 9999": (
        put(f"{LAYER_9999}.lora_A.weight", zeros(4, 16)),
        "layer 9999 of a model with 2",
    ),
    "no prefix": (rename(A, A.removeprefix("base_model.model.")), "does not begin with"),
    "unknown module": (put(f"{Q0}x.lora_A.weight", zeros(4, 16)), "is not a linear layer of this"),
    "unknown key": (put(f"{Q0}.weight", zeros(16, 16)), "is no lora_A.weight or lora_B.weight"),
    "resized head": (put("base_model.model.lm_head.weight", zeros(9, 16)), "is no lora_A.weight"),
    "an untargeted module": (
        lambda t: t.update(
            helpers.tensors_for({"model.layers.0.self_attn.o_proj": 4}, PROJECTIONS)
        ),
        "has weights of model.layers.0.self_attn.o_proj, which the config does not target",
    ),
    "hidden size": (put(A, zeros(4, 32)), "4 x 32, expected 4 x 16: another base model"),
    "output size": (put(B, zeros(32, 4)), "32 x 4, expected 16 x 4: another base model"),
    "rank": (put(A, zeros(5, 16)), "5 x 16, expected 4 x 16: its rank is not the config's"),
    "one dimension": (put(A, zeros(64)), "64, expected 4 x 16"),
    "nan": (poison(np.nan, np.float32), "q_proj.lora_B has NaN or infinite"),
    "inf f16": (poison(np.inf, np.float16), "q_proj.lora_B has NaN or infinite"),
    "-inf bf16": (poison(-np.inf, helpers.BF16), "q_proj.lora_B has NaN or infinite"),
    "nan bf16": (poison(np.nan, helpers.BF16), "q_proj.lora_B has NaN or infinite"),
    "int64": (put(A, zeros(4, 16, dtype=np.int64)), "dtype 'I64' is not one of F32, F16, BF16"),
    "head's copy": (
        put("base_model.model.lm_head.base_layer.weight", zeros(41, 16)),
        "41 x 16, this model's is 40 x 16: the adapter was made for another vocabulary",
    ),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights(fault: str, tmp_path: Path) -> None:
    change, reason = WEIGHT_FAULTS[fault]
    tensors = good()
    change(tensors)
    helpers.write(tmp_path, helpers.config(), helpers.safetensors_bytes(tensors))
    error = refusal(tmp_path)
    assert error.file == "adapter_model.safetensors" and reason in error.reason, error.reason


@pytest.mark.parametrize(
    "key, feature",
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on embeddings"),
        ("base_model.model.model.embed_tokens.weight", "LoRA on embeddings"),
        (f"{Q0}.lora_magnitude_vector", "DoRA"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
        (f"{Q0}.lora_B.bias", "bias"),
        ("base_model.model.model.embed_tokens.token_adapter.x", "trainable_token_indices"),
    ],
)
def test_weights_of_a_feature(key: str, feature: str, tmp_path: Path) -> None:
    if feature == "trainable_token_indices":
        key = key.replace("embed_tokens", "tokens")
    tensors = {**good(), key: zeros(4, 4)}
    helpers.write(tmp_path, helpers.config(), helpers.safetensors_bytes(tensors))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedAdapter) and error.feature == feature


NAN, INF = float("nan"), float("inf")
CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": 8.5}, "r is 8.5"),
    ({"r": True}, "r is True"),
    ({"r": "8"}, "r is '8'"),
    ({"r": 65}, "rank 65 is above the limit of 64"),
    ({"rank_pattern": {"q_proj": 300}}, "rank 300 is above the limit of 64"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}"),
    ({"rank_pattern": {"(": 4}}, "is not a regular expression"),
    ({"rank_pattern": [1]}, "rank_pattern is [1]"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": -1}, "lora_alpha is -1"),
    ({"lora_alpha": 1e38}, "lora_alpha is 1e+38"),
    ({"lora_alpha": NAN}, "lora_alpha is nan"),
    ({"lora_alpha": INF}, "lora_alpha is inf"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1"),
    ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern is {'q_proj': nan}"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": None}, "target_modules is empty"),
    ({"target_modules": ["nothing", "like\nthis"]}, r"'like\nthis', nothing match none of this"),
    ({"target_modules": 7}, "target_modules is 7"),
    ({"target_modules": "(q_proj"}, "is not a regular expression"),
    ({"target_modules": r"(.)\1"}, "not supported in an adapter"),
    ({"exclude_modules": ["q_proj", "v_proj"]}, "match none of this model's linear layers"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "cannot be used when target"),
    ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"layers_to_transform": [0], "layers_pattern": ["(h|layers)"]}, "only plain names"),
    ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]"),
    ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
]


@pytest.mark.parametrize("changes, reason", CONFIG_FAULTS)
def test_config(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    helpers.write(tmp_path, helpers.config(**changes), helpers.safetensors_bytes(good()))
    error = refusal(tmp_path)
    assert error.file == "adapter_config.json" and reason in error.reason, error.reason


FEATURES: list[tuple[str, Any, str]] = [
    ("use_dora", True, "DoRA"),
    ("modules_to_save", ["lm_head"], "modules_to_save"),
    ("bias", "all", "bias"),
    ("bias", "lora_only", "bias"),
    ("lora_bias", True, "lora_bias"),
    ("trainable_token_indices", [1], "trainable_token_indices"),
    ("layer_replication", [[0, 1]], "layer_replication"),
    ("target_parameters", ["mlp.experts.gate_up_proj"], "target_parameters"),
    ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
    ("alora_invocation_tokens", [7], "aLoRA"),
    ("use_qalora", True, "QALoRA"),
    ("arrow_config", {"top_k": 3}, "Arrow"),
    ("velora_config", {"scale": 1.0}, "VeLoRA"),
    ("kasa_config", {"beta": 1}, "KaSA"),
    ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
    ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
    ("ensure_weight_tying", True, "ensure_weight_tying"),
    ("peft_type", "IA3", "peft_type 'IA3'"),
    ("peft_type", "ADALORA", "peft_type 'ADALORA'"),
    *(
        ("init_lora_weights", init, f"init_lora_weights {init!r}")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", 1)
    ),
    ("use_tomorrow", True, "'use_tomorrow'"),
]


@pytest.mark.parametrize("key, value, feature", FEATURES)
def test_feature_is_refused_by_name(key: str, value: Any, feature: str) -> None:
    data = json.dumps(helpers.config(**{key: value})).encode()
    with pytest.raises(UnsupportedAdapter) as caught:
        parse_config(data, "mine")
    assert caught.value.feature == feature


def test_every_refused_key_has_a_case() -> None:
    assert set(MUST_BE_EMPTY) <= {key for key, _, _ in FEATURES}


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_empty_values_are_no_feature(value: Any) -> None:
    keys = {**dict.fromkeys(MUST_BE_EMPTY, value), "use_tomorrow": value}
    parse_config(json.dumps(helpers.config(**keys)).encode(), "mine")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": 4, "r": 8}', b'{"r": ' + b"9" * 5000],
)
def test_config_is_no_json(data: bytes) -> None:
    with pytest.raises(AdapterInvalid, match=r"JSON|peft_type"):
        parse_config(data, "mine")


def test_no_peft_type() -> None:
    with pytest.raises(AdapterInvalid, match="peft_type is missing"):
        parse_config(b'{"model_type": "llama"}', "mine")


def entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    size = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": size, "data_offsets": [start, end]}


def file_of(header: Any, body_bytes: int) -> bytes:
    return helpers.raw_safetensors(json.dumps(header).encode(), b"\0" * body_bytes)


HUGE = 2**31
HEADER_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file has 0 bytes"),
    "seven bytes": (b"\0" * 7, "the file has 7 bytes"),
    "length 2^63": ((2**63).to_bytes(8, "little") + b"{}", "the header claims 9223372036854775808"),
    "length > file": ((99).to_bytes(8, "little") + b"{}", "99 bytes, but the file has only 10"),
    "no json": (helpers.raw_safetensors(b"{", b""), "is not JSON"),
    "no utf-8": (helpers.raw_safetensors(b"\xff", b""), "is not JSON"),
    "nested": (helpers.raw_safetensors(b"[" * 100_000, b""), "is not JSON"),
    "a list": (helpers.raw_safetensors(b"[]", b""), "is not a JSON object"),
    "a key twice": (
        helpers.raw_safetensors(b'{"a": 1, "a": 2}', b""),
        "the key 'a' appears twice",
    ),
    "trailing": (file_of({"a": entry(0, 8)}, 9), "trailing bytes: the tensors take 8"),
    "truncated": (file_of({"a": entry(0, 8)}, 7), "truncated file: the tensors take 8"),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, 12), "'b' overlaps another"),
    "hole": (file_of({"a": entry(0, 8), "b": entry(12, 16)}, 16), "'b' has a hole before it"),
    "not from 0": (file_of({"a": entry(4, 8)}, 8), "'a' has a hole before it"),
    "huge shape": (
        file_of({"a": entry(0, 8, [HUGE, HUGE])}, 8),
        "takes 18446744073709551616 bytes",
    ),
    "zero dim": (file_of({"a": entry(0, 0, [0, 4])}, 0), "has an empty dimension"),
    "negative": (file_of({"a": entry(0, 8, [-2])}, 8), "is not valid"),
    "float shape": (file_of({"a": entry(0, 8, [2.0])}, 8), "is not valid"),
    "bool shape": (file_of({"a": entry(0, 4, [True])}, 4), "is not valid"),
    "float8": (file_of({"a": entry(0, 8, [8], "F8_E4M3")}, 8), "dtype 'F8_E4M3' is not one of"),
    "float64": (file_of({"a": entry(0, 8, [1], "F64")}, 8), "dtype 'F64' is not one of"),
    "odd dtype": (file_of({"a": entry(0, 8, [1], [])}, 8), "dtype [] is not one of"),
    "no entry": (file_of({"a": None}, 0), "must have dtype, shape and data_offsets"),
    "metadata": (file_of({"__metadata__": 1}, 0), "__metadata__ is not an object"),
    "tiny tensors": (
        file_of({str(i): entry(i, i, [0]) for i in range(50_001)}, 0),
        "the file has 50001 tensors; at most 50000",
    ),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_header(fault: str, tmp_path: Path) -> None:
    data, reason = HEADER_FAULTS[fault]
    helpers.write(tmp_path, helpers.config(), data)
    error = refusal(tmp_path)
    assert error.file == "adapter_model.safetensors" and reason in error.reason, error.reason


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    helpers.write(tmp_path, helpers.config(), b"")
    os.truncate(tmp_path / "adapter_model.safetensors", 50 * 10**9)  # sparse
    assert "it has 50000000000 bytes, more than the " in refusal(tmp_path).reason


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "fifo", "directory", "device", "escape", "loop"])
def test_no_regular_file(kind: str, name: str, tmp_path: Path) -> None:
    folder = helpers.write_good(tmp_path / "a")
    path = folder / name
    path.rename(tmp_path / "outside")
    make: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "escape": lambda: path.symlink_to(tmp_path / "outside"),
        "loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    assert refusal(folder).file == name


def test_where_links_may_lead(tmp_path: Path) -> None:
    """Inside the folder, inside a given root, and from a hub snapshot to its blobs."""
    blobs = tmp_path / "models--org--x" / "blobs"
    folder = helpers.write_good(tmp_path / "models--org--x" / "snapshots" / "abc")
    blobs.mkdir()
    config = folder / "adapter_config.json"
    config.rename(blobs / "1234")
    config.symlink_to("../../blobs/1234")
    assert read_config(folder, "x").r == 4
    config.unlink()
    (blobs / "1234").rename(tmp_path / "elsewhere")
    config.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterInvalid, match="leads outside"):
        read_config(folder, "x")
    assert read_config(folder, "x", root=tmp_path).r == 4


def test_only_a_pickle(tmp_path: Path) -> None:
    helpers.write_good(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    assert "adapter_model.bin is an unsafe format" in refusal(tmp_path).reason


def test_no_folder(tmp_path: Path) -> None:
    assert "folder is missing" in refusal(tmp_path / "none").reason


def test_the_heads_copy_is_ignored(tmp_path: Path) -> None:
    tensors = helpers.tensors_for({"lm_head": 4}, PROJECTIONS)
    tensors["base_model.model.lm_head.base_layer.weight"] = zeros(40, 16)
    values = helpers.config(target_modules=["lm_head"])
    helpers.write(tmp_path, values, helpers.safetensors_bytes(tensors))
    assert read_adapter(tmp_path, "a", PROJECTIONS, 8).ranks == {"lm_head": 4}
