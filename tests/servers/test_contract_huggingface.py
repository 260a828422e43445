"""The unmodified ``huggingface_hub`` InferenceClient (marker ``contract``)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

hub: Any = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.contract


@in_loop
async def test_text_generation() -> None:
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with serving(engine) as server:
        client = hub.AsyncInferenceClient(model=server.url)
        assert await client.text_generation("hi") == "Hello, world"
        whole = await client.text_generation(
            "hi", adapter_id="org/x", details=True, temperature=0.5
        )
        assert whole.details.generated_tokens == 4
        stream = await client.text_generation("hi", details=True, stream=True)
        events = [event async for event in stream]
        assert [event.token.text for event in events] == ["Hello", ",", " ", "world"]
        assert events[-1].generated_text == "Hello, world"
        assert engine.seen[1].adapter_id == "org/x"


@in_loop
async def test_chat_completion() -> None:
    async with serving() as server:
        client = hub.AsyncInferenceClient(base_url=server.url + "/v1", api_key="none")
        messages = [{"role": "user", "content": "hi"}]
        answer = await client.chat_completion(messages, model="tiny/base", max_tokens=5)
        assert answer.choices[0].message.content == "Hello, world"
        stream = await client.chat_completion(messages, model="tiny/base", stream=True)
        text = "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices])
        assert text == "Hello, world"
