"""``load_format`` dummy: a config.json is enough, and the engine over it is whole."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import SHAPES, write_shape
from jlorax.assembly import find_model, load_tokenizer
from jlorax.config import EngineConfig, KVConfig, ModelSource, SchedulerConfig, StepConfig
from jlorax.engine import Engine
from jlorax.errors import ConfigError, InvalidRequest, ModelInvalid
from jlorax.models.config import parse_config, read_config
from jlorax.models.weights import dummy_model, outline, weight_bytes
from jlorax.tokenizer import Tokenizer
from jlorax.types import GenerateRequest, GenerateResult
from servers.cli import main as cli
from tests import tiny_llama

PROMPT = (5, 6, 7)


def config_for(folder: Path, load_format: str = "dummy") -> EngineConfig:
    return EngineConfig(
        cache_dir=folder / "cache",
        model=ModelSource(str(folder / "tiny"), load_format=load_format),
        steps=StepConfig(decode_buckets=(1,), extend_buckets=(16,)),
        scheduler=SchedulerConfig(max_batch=1),
        kv=KVConfig(max_seq_len=64, page_size=16),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds "tiny", a model folder with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("dummy")
    write_shape("tiny", folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(folder: Path, loop: asyncio.Runner) -> Iterator[Engine]:
    engine = loop.run(Engine.start(config_for(folder)))
    yield engine
    loop.run(engine.stop())


async def result_of(engine: Engine, request: GenerateRequest) -> GenerateResult:
    events = [event async for event in engine.generate(request)]
    assert events[-1].result is not None
    return events[-1].result


@pytest.mark.parametrize("shape", ["llama-2-7b", "mistral-7b", "falcon-7b", "smollm2-135m"])
def test_every_shape_is_one_that_we_serve(shape: str) -> None:
    billions = {"llama-2-7b": 6.74, "mistral-7b": 7.24, "falcon-7b": 6.92, "smollm2-135m": 0.1345}
    config = parse_config(dict(SHAPES[shape]), shape)
    assert weight_bytes(config, "bfloat16") / 2e9 == pytest.approx(billions[shape], rel=2e-3)


def test_weights_are_random_and_norms_change_nothing() -> None:
    config = parse_config(dict(SHAPES["tiny"]), "tiny")
    model, wanted = dummy_model(config, "bfloat16"), outline(config, "bfloat16")
    assert [leaf.shape for leaf in model.leaves] == [leaf.shape for leaf in wanted.leaves]
    matrices = [np.asarray(leaf, np.float32) for leaf in model.leaves if leaf.ndim == 2]
    assert all(m.std() == pytest.approx(0.02, rel=0.05) for m in matrices)
    assert len({m.tobytes() for m in matrices}) == len(matrices)
    vectors = [np.asarray(leaf, np.float32) for leaf in model.leaves if leaf.ndim == 1]
    assert all((v == 1).all() for v in vectors)


def test_an_answer_is_finite_and_of_the_length_asked_for(
    engine: Engine, loop: asyncio.Runner
) -> None:
    result = loop.run(result_of(engine, GenerateRequest(PROMPT, max_new_tokens=8)))
    assert len(result.tokens) == 8
    assert all(math.isfinite(t.logprob) for t in result.tokens)
    assert result.text.split() == [str(t.id) for t in result.tokens]


def test_numbers_are_a_prompt_too(engine: Engine, loop: asyncio.Runner) -> None:
    request = GenerateRequest("5 6 7", max_new_tokens=2)
    assert loop.run(result_of(engine, request)).prompt_token_ids == PROMPT


def test_without_detokenizing_the_tokens_are_the_same_and_the_text_is_empty(
    engine: Engine, loop: asyncio.Runner
) -> None:
    request = GenerateRequest(PROMPT, max_new_tokens=8)
    written = loop.run(result_of(engine, request))
    bare = loop.run(result_of(engine, replace(request, detokenize=False)))
    assert [t.id for t in bare.tokens] == [t.id for t in written.tokens]
    assert bare.text == "" and not any(t.text for t in bare.tokens)


def test_stop_strings_need_text(engine: Engine, loop: asyncio.Runner) -> None:
    request = GenerateRequest(PROMPT, max_new_tokens=8, stop=("7",), detokenize=False)
    with pytest.raises(InvalidRequest, match="stop strings"):
        loop.run(result_of(engine, request))


def test_a_tokenizer_that_is_there_is_used(folder: Path, tmp_path: Path) -> None:
    model = tiny_llama.write_model(tmp_path / "model")
    tokenizer = load_tokenizer(config_for(folder), model, read_config(model))
    assert tokenizer.eos_token_ids == (tiny_llama.EOS,)


def test_numbered_tokens_have_no_end_and_no_special_ones() -> None:
    tokenizer = Tokenizer.numbered(100)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (100, ())
    assert tokenizer.decode([3, 0, 99]) == "3 0 99"
    assert tokenizer.encode("what 99") == [0, 99]
    assert tokenizer.token_text(7) == " 7"


def test_without_a_config_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ModelInvalid, match=r"config\.json: no such file"):
        asyncio.run(Engine.start(config_for(tmp_path)))


def test_a_gguf_file_is_no_shape(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    config = replace(config_for(tmp_path), model=ModelSource(str(file), load_format="dummy"))
    with pytest.raises(ModelInvalid, match=r"dummy weights need a folder with a config\.json"):
        find_model(config)


def test_weights_are_not_made_up_unasked(folder: Path) -> None:
    with pytest.raises(ModelInvalid):
        asyncio.run(Engine.start(config_for(folder, "auto")))


def test_an_unknown_load_format_names_the_known() -> None:
    with pytest.raises(ConfigError, match="auto, dummy"):
        ModelSource(load_format="random")


def test_a_dry_run_says_that_the_weights_are_random(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--load-format", "dummy", "--model", str(folder / "tiny"), "--buckets", "1"]
    assert cli(["serve", "--dry-run", *asked, "--cache-dir", str(folder / "cache")]) == 0
    assert "random" in capsys.readouterr().out


def test_only_what_a_shape_needs_is_fetched_from_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[str] = []

    def fetch(model: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(folder / "tiny")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = ModelSource("org/name", load_format="dummy")
    found, _ = find_model(replace(config_for(folder), model=source))
    assert json.loads((found / "config.json").read_text())["model_type"] == "llama"
    assert "*.json" in patterns and "*.safetensors" not in patterns
