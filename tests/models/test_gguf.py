from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from jlorax.errors import ConfigError, ModelInvalid, UnsupportedModel
from jlorax.models import gguf, gguf_tokenizer
from jlorax.models.gguf_config import llama3_divisors, read_shape
from tests.models.gguf_files import (
    HEAD_DIM,
    bpe_metadata,
    gguf_tensors,
    hf_weights,
    llama_metadata,
    spm_metadata,
    tiny_gguf,
    write_gguf,
)

BPE_SIZE = len(bpe_metadata()["tokenizer.ggml.tokens"])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- weights


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_in_hugging_face_order(tmp_path: Path, tied: bool) -> None:
    weights = hf_weights(BPE_SIZE, tied)
    source = write_gguf(
        tmp_path / "m.gguf", llama_metadata() | bpe_metadata(), gguf_tensors(weights)
    )
    folder = gguf.prepare(source, tmp_path / "out")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)
    assert read_json(folder / "config.json")["tie_word_embeddings"] is tied


@pytest.mark.parametrize(
    "kind",
    [
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_1,
    ],
)
def test_quantised_weights_are_the_quantised_values(
    tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_BLOCK_VALUES", 1000)  # several blocks, the last one partial
    weights = hf_weights(BPE_SIZE)
    source = write_gguf(
        tmp_path / "m.gguf", llama_metadata() | bpe_metadata(), gguf_tensors(weights), kind=kind
    )
    written = load_file(gguf.prepare(source, tmp_path / "out") / "model.safetensors")
    for name, weight in weights.items():
        expected = dequantize(quantize(weight, kind), kind) if weight.ndim == 2 else weight
        np.testing.assert_array_equal(written[name], expected, err_msg=name)


def test_deinterleave_inverts_interleave() -> None:
    weight = np.arange(48 * 3, dtype=np.float32).reshape(48, 3)
    mixed = gguf.interleave(weight, num_heads=4)
    assert not np.array_equal(mixed, weight)
    np.testing.assert_array_equal(gguf.deinterleave(mixed, num_heads=4), weight)


def test_large_weights_are_sharded_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "MAX_SHARD_BYTES", 100_000)
    folder = gguf.prepare(tiny_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    index = read_json(folder / "model.safetensors.index.json")
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 1
    assert not (folder / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards.values() for tensor in shard.values()
    )
    for name, weight in hf_weights(BPE_SIZE).items():
        np.testing.assert_array_equal(shards[index["weight_map"][name]][name], weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", ["none", "linear", "yarn", "llama3"])
def test_transformers_computes_the_same_logits(tmp_path: Path, tied: bool, scaling: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    ropes: dict[str, dict[str, Any]] = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    weights = hf_weights(BPE_SIZE, tied)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BPE_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 10000.0, **ropes[scaling]},
        )
    )
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}

    metadata, tensors = llama_metadata() | bpe_metadata(), gguf_tensors(weights)
    if scaling in ("linear", "yarn"):
        metadata |= {"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": 4.0}
        metadata |= {"llama.rope.scaling.original_context_length": 32}
    if scaling == "llama3":
        plain = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    folder = gguf.prepare(write_gguf(tmp_path / "m.gguf", metadata, tensors), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)

    ids = torch.arange(3, 103).reshape(1, 100)
    with torch.no_grad():
        expected, got = model(ids).logits, again(ids).logits
    # the same float32 program; the llama3 divisors went through float32 once more
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if scaling == "llama3" else 1e-6)
    assert expected.std() > 0.1


def test_transformers_reads_the_same_weights_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tiny_gguf(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    folder = gguf.prepare(tmp_path / "m.gguf", tmp_path / "out")
    for name, weight in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(weight, theirs[name].numpy(), err_msg=name)


# --- config


def test_config_is_written_as_transformers_5_writes_it(tmp_path: Path) -> None:
    folder = gguf.prepare(
        tiny_gguf(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=0), tmp_path / "out"
    )
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["rms_norm_eps"] == 1e-5
    assert config["head_dim"] == HEAD_DIM
    assert config["num_key_value_heads"] == 2
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        1,
        [0, 2],
        2,
    )
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [0, 2]


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf", llama__attention__sliding_window=32)
    config = read_json(gguf.prepare(source, tmp_path / "out") / "config.json")
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)


@pytest.mark.parametrize(("high", "original"), [(4.0, 8192), (3.0, 4096), (8.0, 2048)])
def test_llama3_scaling_is_recovered_from_its_divisors(
    tmp_path: Path, high: float, original: int
) -> None:
    metadata = llama_metadata() | bpe_metadata() | {"llama.rope.freq_base": 500000.0}
    metadata |= {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    metadata |= {"llama.rope.dimension_count": 64}
    divisors = llama3_divisors(500000.0, 64, 32.0, 1.0, high, original).astype(np.float32)
    shape = read_shape(metadata, divisors, "m.gguf")
    assert shape.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": pytest.approx(high, abs=1e-3),
        "original_max_position_embeddings": pytest.approx(original, abs=1),
    }


def test_divisors_that_are_no_llama3_scaling_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(hf_weights(BPE_SIZE))
    tensors["rope_freqs.weight"] = np.linspace(1.0, 8.0, HEAD_DIM // 2, dtype=np.float32)
    source = write_gguf(tmp_path / "m.gguf", llama_metadata() | bpe_metadata(), tensors)
    with pytest.raises(ModelInvalid, match=r"rope_freqs\.weight"):
        gguf.prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"llama__rope__scaling__type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope'"),
        ({"llama__rope__scaling__type": "linear"}, r"llama\.rope\.scaling\.factor"),
        ({"llama__rope__scaling__type": "yarn"}, r"scaling\.original_context_length"),
        ({"llama__rope__dimension_count": 8}, r"llama\.rope\.dimension_count is 8"),
        ({"llama__attention__value_length": 8}, r"llama\.attention\.value_length is 8"),
        ({"llama__attention__head_count_kv": [2, 1]}, r"head_count_kv differs between layers"),
        ({"llama__attention__head_count": 0}, r"llama\.attention\.head_count"),
        ({"llama__logit_scale": 2.0}, r"llama\.logit_scale"),
        ({"llama__vocab_size": 9}, r"token_embd\.weight has shape"),
        ({"llama__block_count": 3}, r"blk\.2\.attn_norm\.weight is missing"),
        ({"llama__block_count": 1}, r"unknown tensors: blk\.1"),
        ({"llama__expert_count": 8}, r"llama\.expert_count"),
        ({"tokenizer__ggml__pre": "klingon"}, r"tokenizer\.ggml\.pre is 'klingon'.*smollm"),
        ({"tokenizer__ggml__model": "rwkv"}, r"tokenizer\.ggml\.model is 'rwkv'.*gpt2"),
        ({"tokenizer__ggml__eos_token_id": 99999}, r"eos_token_id is 99999"),
        ({"tokenizer__ggml__token_type": [1, 1]}, r"token_type has 2 entries"),
        ({"tokenizer__ggml__merges": ["x yy"]}, r"merges: 'x yy'"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    source = tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(ModelInvalid, match=named):
        gguf.prepare(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_another_architecture_is_unsupported(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", {}, {}, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: .*'mamba'; known is 'llama'"):
        gguf.prepare(source, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(hf_weights(BPE_SIZE))
    tensors["blk.1.ffn_up.weight"][5, 5] = np.nan
    source = write_gguf(tmp_path / "m.gguf", llama_metadata() | bpe_metadata(), tensors)
    with pytest.raises(
        ModelInvalid, match=r"blk\.1\.ffn_up\.weight has values that are not finite"
    ):
        gguf.prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for size in (0, 3, 4, 20, 100, 1000, 4000, 10_000, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:size])
        with pytest.raises(ModelInvalid, match=r"broken\.gguf"):
            gguf.prepare(broken, tmp_path / "out")


def test_a_count_far_beyond_the_file_is_refused_at_once(tmp_path: Path) -> None:
    data = bytearray(tiny_gguf(tmp_path / "m.gguf").read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")  # the array's length
    data += bytes(-(len(data) - at) % 4)  # gguf's own reader stumbles only over an odd rest
    (tmp_path / "huge.gguf").write_bytes(data)
    with pytest.raises(ModelInvalid, match=r"huge\.gguf"):
        gguf.prepare(tmp_path / "huge.gguf", tmp_path / "out")


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is not a model, but it is long enough to be read")
    with pytest.raises(ModelInvalid, match=r"text\.gguf.*magic"):
        gguf.prepare(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(ModelInvalid, match="No such file"):
        gguf.prepare(tmp_path / "absent.gguf", tmp_path / "out")


# --- folders


def test_progress_rises_to_one(tmp_path: Path) -> None:
    seen: list[float] = []
    gguf.prepare(
        tiny_gguf(tmp_path / "m.gguf"), tmp_path / "out", lambda _, done: seen.append(done)
    )
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


def test_many_writers_of_one_folder_agree(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: gguf.prepare(source, tmp_path / "out"), range(4)))
    assert set(folders) == {tmp_path / "out"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]
    load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_with_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        gguf.prepare(tiny_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_the_cache_is_keyed_by_content_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny_gguf(tmp_path / "m.gguf")
    first = gguf.prepared_folder(one, tmp_path / "cache")

    moved = tmp_path / "elsewhere" / "m.gguf"
    moved.parent.mkdir()
    moved.write_bytes(one.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "prepare", None)  # a second preparation would fail
        assert gguf.prepared_folder(one, tmp_path / "cache") == first
        assert gguf.prepared_folder(moved, tmp_path / "cache") == first

    tiny_gguf(moved, llama__context_length=64)
    other = gguf.prepared_folder(moved, tmp_path / "cache")
    assert other != first
    assert read_json(other / "config.json")["max_position_embeddings"] == 64


# --- tokenizers

TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" 12³'sh\n")))


def built(metadata: dict[str, Any]) -> Tokenizer:
    return gguf_tokenizer.build_tokenizer(metadata, "m.gguf")


def test_smollm_splits_digits_one_by_one() -> None:
    tokenizer = built(bpe_metadata("smollm"))
    assert tokenizer.encode("hello wor 123").tokens == ["hello", "Ġwor", "Ġ", "1", "2", "3"]
    assert built(bpe_metadata("gpt-2")).encode("wor 123").tokens == ["w", "or", "Ġ", "123"]


@given(TEXTS)
def test_smollm_cuts_where_hugging_face_cuts(text: str) -> None:
    reference = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    assert SMOLLM.pre_tokenizer.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


SMOLLM = built(bpe_metadata("smollm"))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "WE'LL pay 12345 ", ["WE", "'LL", "Ġpay", "Ġ", "123", "45", "Ġ"]),
        ("gpt-2", "WE'LL 12345!?", ["WE", "'", "LL", "Ġ12345", "!?"]),
        ("default", "x==3 12345", ["x", "==", "3", "Ġ", "123", "45"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_as_llama_cpp(pre: str, text: str, words: list[str]) -> None:
    cuts = built(bpe_metadata(pre)).pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cuts] == words


def test_special_tokens_and_ends() -> None:
    tokenizer = built(bpe_metadata() | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("h<|im_end|>").ids[:1] == [1]
    assert tokenizer.encode("h<|im_end|>").ids[-1:] == [2]
    assert tokenizer.encode("h<|im_end|>", add_special_tokens=False).tokens == ["h", "<|im_end|>"]
    both = built(spm_metadata() | {"tokenizer.ggml.add_eos_token": True})
    assert both.encode("a").tokens == ["<s>", "▁", "a", "</s>"]


@given(st.text(st.sampled_from("helowrda <>s/é😀 ")))
def test_sentencepiece_merges_as_its_own_algorithm(text: str) -> None:
    got = SPM_PLAIN.encode(text, add_special_tokens=False).tokens
    assert got == merged_by_score(text) if text else got == []


SPM = built(spm_metadata())
SPM_PLAIN = built(spm_metadata())
SPM_PLAIN.encode_special_tokens = True


def merged_by_score(text: str) -> list[str]:
    """SentencePiece's BPE, told directly: join the pair with the best score, leftmost first."""
    metadata = spm_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    score_of = dict(list(zip(tokens, scores, strict=True))[259:])
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-score_of[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score_of
        ]
        if not joins:
            break
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [
        token
        for piece in pieces
        for token in (
            [piece] if piece in score_of else [f"<0x{byte:02X}>" for byte in piece.encode()]
        )
    ]


@given(st.text(st.sampled_from("helo wrd<>s/é😀你")))
def test_sentencepiece_decodes_what_it_encoded(text: str) -> None:
    assert SPM_PLAIN.decode(SPM_PLAIN.encode(text, add_special_tokens=False).ids) == text


def test_sentencepiece_without_a_space_prefix() -> None:
    tokenizer = built(spm_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert SPM.encode("hello", add_special_tokens=False).tokens == ["▁hello"]


def test_plain_text_cannot_spell_a_control_token() -> None:
    assert SPM.encode("<s>", add_special_tokens=False).ids == [1]
    assert 1 not in SPM_PLAIN.encode("<s>", add_special_tokens=False).ids


# --- the real model


def test_the_real_folder_holds_every_tensor(smollm2_dir: Path) -> None:
    config = read_json(smollm2_dir / "config.json")
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    weights = load_file(smollm2_dir / "model.safetensors")
    assert len(weights) == 272 and "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].shape == (49152, 576)


def test_the_real_model_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
