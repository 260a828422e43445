"""The unmodified ``openai`` client (marker ``contract``)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jlorax.errors import Overloaded, Unavailable
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

openai: Any = pytest.importorskip("openai")
pytestmark = pytest.mark.contract

MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(engine: FakeEngine | None = None) -> AsyncIterator[Any]:
    async with (
        serving(engine) as server,
        openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@in_loop
async def test_models() -> None:
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with client_of(engine) as client:
        assert [model.id async for model in client.models.list()] == ["tiny/base", "org/x"]


@in_loop
async def test_completions_of_a_list_with_logprobs() -> None:
    async with client_of() as client:
        answer = await client.completions.create(
            model="tiny/base",
            prompt=["a", "b"],
            n=2,
            logprobs=2,
            max_tokens=4,
            temperature=0,
            extra_body={"return_token_ids": True, "top_k": 3},
        )
        assert [choice.text for choice in answer.choices] == ["Hello, world"] * 4
        assert answer.choices[0].logprobs.token_logprobs == [-0.25, -0.5, -0.75, -1.0]
        assert answer.choices[0].token_ids == [100, 101, 102, 103]
        assert answer.usage.total_tokens == 20


@in_loop
async def test_completion_stream_with_usage() -> None:
    async with client_of() as client:
        stream = await client.completions.create(
            model="tiny/base", prompt="a", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.text for chunk in chunks for c in chunk.choices) == "Hello, world"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 4


@in_loop
async def test_chat() -> None:
    async with client_of() as client:
        answer = await client.chat.completions.create(
            model="",
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=2,
            max_completion_tokens=9,
            n=2,
            stop="x",
        )
        assert [choice.message.content for choice in answer.choices] == ["Hello, world"] * 2
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


@in_loop
async def test_chat_stream_and_its_accumulator() -> None:
    async with client_of() as client:
        async with client.chat.completions.stream(model="", messages=MESSAGES) as stream:
            final = await stream.get_final_completion()
        message = final.choices[0].message
        assert (message.role, message.content) == ("assistant", "Hello, world")
        assert final.choices[0].finish_reason == "stop"


@in_loop
async def test_errors_map_to_the_clients_classes() -> None:
    async with client_of() as client:
        ask = client.completions.create
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(model="nope", prompt="a")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(model="", prompt="a", top_p=7)
        assert caught.value.param == "top_p"
    async with client_of(FakeEngine(error=Overloaded("full"))) as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="", messages=MESSAGES, stream=True)
    async with client_of(FakeEngine(error=Unavailable("dead"), fail_at=1)) as client:
        stream = await client.completions.create(model="", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="dead"):
            async for _ in stream:
                pass
