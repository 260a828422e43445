"""The unmodified ``openai`` client against a server process with a real engine (``contract``)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from jlorax.errors import Overloaded, Unavailable
from tests.fakes import FakeEngine
from tests.servers.process import start_server, write_adapter, write_model
from tests.servers.serving import in_loop, serving

openai: Any = pytest.importorskip("openai")
pydantic: Any = pytest.importorskip("pydantic")
pytestmark = pytest.mark.contract

MESSAGES = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a day.",
    "parameters": {
        "type": "object",
        "properties": {"day": {"enum": ["today", "tomorrow"]}},
        "required": ["day"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = [{"type": "function", "function": WEATHER}]
# The tiny model's tokens are bytes, so it is told the names alone.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("home")
    (write_model(home / "model") / "chat_template.jinja").write_text(TEMPLATE)
    write_adapter(home / "adapters" / "one", 1)
    server = start_server(
        home,
        *("--model", str(home / "model"), "--model-id", "tiny", "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "adapters"), "--max-seq-len", "512", "--max-batch", "4"),
        *("--buckets", "4"),
        env={"JAX_PLATFORMS": "cpu"},
    )
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    server.process.kill()


class Verdict(pydantic.BaseModel):  # type: ignore[misc]
    model_config = pydantic.ConfigDict(extra="forbid")
    word: Literal["yes", "no"]
    sure: bool


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "one"]
    one = client.models.retrieve("one")
    assert (one.parent, one.max_model_len) == ("tiny", 512)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions(client: Any) -> None:
    answer = client.completions.create(
        model="one",
        prompt=["a", "b"],
        n=2,
        best_of=3,
        max_tokens=4,
        seed=1,
        logprobs=2,
        logit_bias={"70": 100},
        extra_body={"ignore_eos": True},
    )
    assert [choice.text for choice in answer.choices] == ["dddd"] * 4
    assert len(answer.choices[0].logprobs.top_logprobs[0]) in (2, 3)
    assert answer.usage.completion_tokens == 2 * 3 * 4


def test_the_log_probabilities_of_a_prompt(client: Any) -> None:
    answer = client.completions.create(
        model="one", prompt=[74, 75, 76], max_tokens=1, echo=True, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 4
    assert logprobs.token_logprobs[0] is None
    for token, own, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == own <= max(top.values())


def test_a_stream_of_a_completion(client: Any) -> None:
    stream = client.completions.create(
        model="",
        prompt="a",
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "guided_regex": "[ab]{5}"},
    )
    *chunks, last = stream
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert len(text) == 5 and set(text) <= {"a", "b"}
    assert (last.choices, last.usage.completion_tokens) == ([], 5)


def test_a_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="one",
        messages=MESSAGES,
        n=2,
        max_completion_tokens=6,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"regex": "[ab]{9}"}},
    )
    for choice in answer.choices:
        assert len(choice.message.content) == 6
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 6
        assert choice.finish_reason == "length"


def test_a_chat_parses_into_a_model(client: Any) -> None:
    answer = client.chat.completions.parse(
        model="one", messages=MESSAGES, response_format=Verdict, max_completion_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_a_chat_stream_accumulates_and_parses(client: Any) -> None:
    with client.chat.completions.stream(
        model="", messages=MESSAGES, response_format=Verdict, max_completion_tokens=100
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Verdict)
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_is_called_and_its_answer_read(client: Any, choice: Any) -> None:
    ask = client.chat.completions.create
    answer = ask(
        model="one", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=200,
        parallel_tool_calls=False,
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["day"] in ("today", "tomorrow")
    told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    later = ask(
        model="one", messages=[*MESSAGES, message, told], tools=TOOLS, tool_choice="none",
        max_tokens=4,
    )  # fmt: skip
    assert later.choices[0].message.tool_calls is None


def test_a_streamed_call_accumulates(client: Any) -> None:
    with client.chat.completions.stream(
        model="one",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    ) as stream:
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.parsed_arguments["day"] in ("today", "tomorrow")


def test_a_response(client: Any) -> None:
    response = client.responses.create(
        model="one", input="hi", instructions="Be kind.", max_output_tokens=5
    )
    assert response.output[0].type == "message"
    assert response.usage.output_tokens == 5 or response.status == "completed"
    parsed = client.responses.parse(model="one", input="hi", text_format=Verdict)
    assert isinstance(parsed.output_parsed, Verdict)


def test_a_response_that_calls_and_goes_on(client: Any) -> None:
    tools = [{"type": "function", **WEATHER}]
    said = [{"role": "user", "content": "hi"}]
    first = client.responses.create(
        model="one",
        input=said,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,  # a second call, drawn at random, may be cut off
        max_output_tokens=200,
    )
    calls = [item for item in first.output if item.type == "function_call"]
    assert json.loads(calls[0].arguments)["day"] in ("today", "tomorrow")
    said += [item.model_dump() for item in first.output]
    said += [{"type": "function_call_output", "call_id": c.call_id, "output": "x"} for c in calls]
    second = client.responses.create(
        model="one", input=said, tools=tools, tool_choice="none", max_output_tokens=4
    )
    assert second.output[-1].type == "message"


def test_a_streamed_response_accumulates(client: Any) -> None:
    with client.responses.stream(model="one", input="hi", text_format=Verdict) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text
    assert isinstance(final.output_parsed, Verdict)


def test_what_needs_storing_is_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="one", input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_embeddings(client: Any) -> None:
    packed = client.embeddings.create(model="one", input=["a", "b"])
    plain = client.embeddings.create(model="one", input=["a", "b"], encoding_format="float")
    assert len(packed.data[0].embedding) == 32
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)
    assert packed.data[0].embedding != packed.data[1].embedding
    base = client.embeddings.create(model="", input="a")
    assert base.data[0].embedding != plain.data[0].embedding


# What a real engine does only in trouble.


@asynccontextmanager
async def client_of(engine: FakeEngine) -> AsyncIterator[Any]:
    async with (
        serving(engine) as server,
        openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@in_loop
async def test_errors_map_to_the_clients_classes() -> None:
    async with client_of(FakeEngine()) as client:
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
    async with client_of(FakeEngine(error=Unavailable("dead"), fail_at=1)) as client:
        stream = await client.responses.create(model="", input="a", stream=True)
        with pytest.raises(openai.APIError, match="dead"):
            async for _ in stream:
                pass
