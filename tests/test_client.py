"""jlorax.Client and AsyncClient against the real routes, over the fake engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import jlorax
from jlorax.errors import (
    AdapterConflict,
    AdapterNotFound,
    InvalidParameter,
    JLoraxError,
    Overloaded,
    PromptTooLong,
    RequestCancelled,
    Unavailable,
)
from jlorax.types import FinishReason, SamplingParams, Tier
from jlorax.wire.adapters import ModelCard
from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

MESSAGES = [{"role": "user", "content": "hi"}]


@in_loop
async def test_generate_returns_what_the_engine_said() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        result = await client.generate("hi", num_top_logprobs=2, seed=9, temperature=0.5)
        (request,) = server.engine.seen
        assert request.sampling == SamplingParams(temperature=0.5, seed=9)
        async for event in server.engine.generate(request):
            last = event
        assert result == last.result


@in_loop
async def test_every_option_reaches_the_engine() -> None:
    options: dict[str, Any] = {
        "adapter_id": "org/x",
        "adapter_source": "local",
        "max_new_tokens": 9,
        "stop": ("x",),
        "stop_token_ids": (4,),
        "ignore_eos": True,
        "include_stop_text": False,
        "truncate": 5,
        "num_top_logprobs": 2,
        "prompt_logprobs": True,
    }
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with serving(engine) as server, jlorax.AsyncClient(server.url) as client:
        result = await client.generate([5, 6], top_k=3, top_p=0.5, temperature=1.0, **options)
        (request,) = engine.seen
        assert request.prompt == (5, 6)
        assert {name: getattr(request, name) for name in options} == options
        assert request.sampling == SamplingParams(temperature=1.0, top_k=3, top_p=0.5)
        assert [token.logprob for token in result.prompt_tokens] == [None, -0.5]
        with pytest.raises(TypeError, match="temprature"):
            await client.generate("x", temprature=1)  # type: ignore[call-arg]


@in_loop
async def test_a_string_is_one_stop() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        await client.generate("hi", stop="ab")
        with jlorax.Client(server.url) as blocking:
            await asyncio.to_thread(blocking.generate, "hi", stop="ab")
            await asyncio.to_thread(lambda: list(blocking.stream_chat(MESSAGES, stop="ab")))
        assert [request.stop for request in server.engine.seen] == [("ab",)] * 3


@in_loop
async def test_stream_gives_events_and_the_whole_result() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        events = [event async for event in client.stream("hi")]
        assert [event.token.text for event in events] == ["Hello", ",", " ", "world"]
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert [event.result is None for event in events] == [True, True, True, False]
        assert events[-1].result == await client.generate("hi")


@in_loop
async def test_chat_uses_the_template_and_strips_stops() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        result = await client.chat(MESSAGES)
        streamed = [event async for event in client.stream_chat(MESSAGES)]
        assert streamed[-1].result == result
        assert result.finish_reason is FinishReason.EOS_TOKEN
        for request in server.engine.seen:
            assert request.prompt == tuple(map(ord, "<user>hi"))
            assert not request.include_stop_text


@pytest.mark.parametrize(
    "error",
    [PromptTooLong(9001, 5, 8192), Overloaded("full: 256", 3.0), JLoraxError("lost the device")],
)
@pytest.mark.parametrize("fail_at", [0, 2])
@in_loop
async def test_errors_come_back_typed_with_their_numbers(error: JLoraxError, fail_at: int) -> None:
    """Before the first token by the status, after it by the event in the stream."""
    engine = FakeEngine(error=error, fail_at=fail_at)
    async with serving(engine) as server, jlorax.AsyncClient(server.url) as client:
        with pytest.raises(type(error)) as caught:
            async for _ in client.stream("hi"):
                pass
        assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))
        with pytest.raises(type(error)) as caught:
            await client.generate("hi")
        assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


@in_loop
async def test_validation_errors_name_the_field() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url) as client:
        with pytest.raises(InvalidParameter) as caught:
            await client.generate("hi", top_p=7.0)
        assert caught.value.name == "top_p"


@in_loop
async def test_adapters_models_health() -> None:
    async with serving() as server, jlorax.AsyncClient(server.url + "/") as client:
        info = await client.load_adapter("org/x", "sql")
        assert info == server.engine.registered["org/x"]
        assert await client.adapters() == [info]
        assert await client.models() == [
            ModelCard("tiny/base", None),
            ModelCard("org/x", "tiny/base"),
        ]
        with pytest.raises(AdapterConflict):
            await client.load_adapter("org/x", "sql")
        assert (await client.load_adapter("org/x", "sql", replace=True)).adapter_id == "org/x"
        assert (await client.prefetch_adapter("org/x")).tier is Tier.HOST
        assert (await client.pin_adapter("org/x")).pinned
        assert not (await client.pin_adapter("org/x", False)).pinned
        server.engine.registered["org/x"] = adapter_info("org/x", num_requests=2)
        with pytest.raises(AdapterConflict, match="2 requests"):
            await client.unload_adapter("org/x")
        await client.unload_adapter("org/x", force=True)
        with pytest.raises(AdapterNotFound) as caught:
            await client.unload_adapter("org/x")
        assert caught.value.adapter_id == "org/x"
        assert await client.health()
        server.engine.state = "draining"
        assert not await client.health()


@in_loop
async def test_leaving_a_stream_cancels_the_request() -> None:
    gate = asyncio.Semaphore(1)
    async with serving(FakeEngine(gate=gate)) as server, jlorax.AsyncClient(server.url) as client:
        events = client.stream("hi")
        await anext(events)
        await events.aclose()
        await server.engine.closed.wait()


@in_loop
async def test_nobody_there_is_unavailable() -> None:
    async with jlorax.AsyncClient("http://127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await client.generate("hi")
        assert not await client.health()


async def _cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    event = b'data: {"token":{"id":1,"text":"a","logprob":-1,"special":false},"details":null}\n\n'
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event)
    await writer.drain()
    writer.close()


@in_loop
async def test_a_stream_without_its_end_is_an_error() -> None:
    server = await asyncio.start_server(_cut_off, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, jlorax.AsyncClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(RequestCancelled, match="after 1 tokens"):
            async for _ in client.stream("hi"):
                pass


# The blocking client: its server runs in another thread, as it would in another process.


@contextmanager
def blocking_client(engine: FakeEngine) -> Iterator[jlorax.Client]:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        context = serving(engine)
        server = runner.run(context.__aenter__())
        thread = _loop_thread(loop)
        try:
            with jlorax.Client(server.url) as client:
                yield client
        finally:
            thread()
            runner.run(context.__aexit__(None, None, None))


def _loop_thread(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    import threading

    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    return stop


def test_the_blocking_client_has_the_same_verbs() -> None:
    with blocking_client(FakeEngine()) as client:
        result = client.generate("hi")
        assert result.text == "Hello, world"
        assert [event.token.text for event in client.stream("hi")] == ["Hello", ",", " ", "world"]
        assert client.chat(MESSAGES).text == "Hello, world"
        assert client.chat_with_tools(MESSAGES, []).text == "Hello, world"
        assert len(client.generate_best_of("hi", 2, temperature=1.0)) == 2
        assert len(client.embed(["hi", "ho"])) == 2
        assert [piece.text for piece in client.tokenize("hi")] == ["h", "i"]
        assert [event.index for event in client.stream_chat(MESSAGES)] == [0, 1, 2, 3]
        info = client.load_adapter("org/x", "sql")
        assert client.adapters() == [info]
        assert [card.id for card in client.models()] == ["tiny/base", "org/x"]
        client.unload_adapter("org/x")
        assert client.health()
        with pytest.raises(AdapterNotFound):
            client.generate("hi", adapter_id="org/x")
    with pytest.raises(JLoraxError, match="closed"):
        client.health()
    client.close()


def test_both_clients_have_the_same_verbs() -> None:
    def verbs(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert verbs(jlorax.Client) == verbs(jlorax.AsyncClient)


def test_leaving_a_blocking_stream_cancels_the_request() -> None:
    engine = FakeEngine(script=["x"] * 10_000)
    with blocking_client(engine) as client:
        for event in client.stream("hi"):
            if event.index == 2:
                break
        assert client.health()
    assert engine.num_closed == 1
    assert engine.num_events < 10_000


def test_the_client_imports_no_jax() -> None:
    code = (
        "import sys, jlorax; jlorax.Client; jlorax.AsyncClient; jlorax.errors; jlorax.types\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'transformers', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError):
        jlorax.nothing  # noqa: B018
