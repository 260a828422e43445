"""An adapter that ships a chat template: used where the configuration allows it, or never."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine
from jlorax.errors import AdapterInvalid, AdapterNotFound
from jlorax.types import GenerateRequest
from tests import tiny_llama

MESSAGES = [{"role": "user", "content": "w5 w6"}]
OWN = "{% for m in messages %}w9 {{ m.content }} w10{% endfor %}"
BASES = "{% for m in messages %}w7 {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("templates")
    tiny_llama.write_model(home / "model")
    config = home / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": BASES}))
    for name in ("plain", "own", "named", "broken", "binary"):
        tiny_llama.write_adapter(home / "root" / name, 1)
    (home / "root" / "own" / "chat_template.jinja").write_text(OWN)
    several = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "w3"}]
    saved = home / "root" / "named" / "tokenizer_config.json"
    saved.write_text(json.dumps({"chat_template": several}))
    (home / "root" / "broken" / "tokenizer_config.json").write_text("[]")
    (home / "root" / "binary" / "chat_template.jinja").write_bytes(b"\xff")
    return home


@asynccontextmanager
async def engine(home: Path, *, own_templates: bool) -> AsyncIterator[Engine]:
    adapters = AdapterConfig(
        root=home / "root", bank_bytes=1 << 20, max_slots=2, max_rank=8, own_templates=own_templates
    )
    config = EngineConfig(
        cache_dir=home / "cache",
        model=ModelSource(str(home / "model")),
        steps=StepConfig((1,), (16,), tile=8),
        scheduler=SchedulerConfig(max_batch=1),
        kv=KVConfig(max_seq_len=32),
        adapters=adapters,
        executable_dir=home / "executables",
    )
    async with await Engine.start(config) as started:
        yield started


async def chat_ids(engine: Engine, adapter_id: str | None) -> list[int]:
    request = GenerateRequest("", adapter_id=adapter_id)
    return (await engine.chat_tokenizer(request)).encode_chat(MESSAGES)


def test_an_adapter_s_own_template_is_used_where_allowed(home: Path) -> None:
    async def test() -> None:
        async with engine(home, own_templates=True) as allowing:
            assert await chat_ids(allowing, None) == [7, 5, 6]
            assert await chat_ids(allowing, "plain") == [7, 5, 6]
            assert await chat_ids(allowing, "own") == [9, 5, 6, 10]
            assert await chat_ids(allowing, "named") == [9, 5, 6, 10]
            assert await chat_ids(allowing, None) == [7, 5, 6]  # nobody else's is changed
            with pytest.raises(AdapterNotFound):
                await chat_ids(allowing, "nobody")
            with pytest.raises(AdapterInvalid, match="tokenizer_config"):
                await chat_ids(allowing, "broken")
            with pytest.raises(AdapterInvalid, match="UTF-8"):
                await chat_ids(allowing, "binary")
            shutil.rmtree(home / "root" / "own")
            with pytest.raises(AdapterNotFound):
                await chat_ids(allowing, "own")

    asyncio.run(test())


@pytest.mark.slow
def test_without_leave_it_is_the_base_s(home: Path) -> None:
    async def test() -> None:
        async with engine(home, own_templates=False) as refusing:
            assert await chat_ids(refusing, "named") == [7, 5, 6]

    asyncio.run(test())
