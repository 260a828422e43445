"""The unmodified ``huggingface_hub`` InferenceClient against a real server process (marker
``contract``)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.servers.process import ServerProcess

hub: Any = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.contract

SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(contract_server: ServerProcess) -> Any:
    return hub.InferenceClient(model=contract_server.url)


def test_text_generation(client: Any) -> None:
    text = client.text_generation("Hello", max_new_tokens=4)
    whole = client.text_generation(
        "Hello", max_new_tokens=4, details=True, decoder_input_details=True, top_n_tokens=2
    )
    assert whole.generated_text == text
    assert (whole.details.finish_reason, whole.details.generated_tokens) == ("length", 4)
    assert [token.text for token in whole.details.prefill] == list("Hello")
    assert [len(tokens) for tokens in whole.details.top_tokens] == [2] * 4
    adapted = client.text_generation("Hello", max_new_tokens=4, adapter_id="one")
    assert adapted != text
    full = client.text_generation("Hello", max_new_tokens=4, return_full_text=True)
    assert full == "Hello" + text


def test_a_stream(client: Any) -> None:
    stream = client.text_generation("Hello", max_new_tokens=4, details=True, stream=True)
    events = list(stream)
    assert [event.index for event in events] == [1, 2, 3, 4]
    assert events[-1].details.input_length == 5
    assert events[-1].generated_text == client.text_generation("Hello", max_new_tokens=4)


def test_best_of(client: Any) -> None:
    best = client.text_generation(
        "Hello", max_new_tokens=4, details=True, do_sample=True, best_of=2
    )
    (other,) = best.details.best_of_sequences
    assert best.details.seed != other.seed


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "answer", "schema": SCHEMA}},
    ],
)
def test_a_grammar(client: Any, grammar: dict[str, Any]) -> None:
    text = client.text_generation("Hello", max_new_tokens=40, grammar=grammar)
    assert type(json.loads(text)["yes"]) is bool


def test_chat_completion(contract_server: ServerProcess) -> None:
    client = hub.InferenceClient(base_url=contract_server.url + "/v1", api_key="none")
    answer = client.chat_completion(MESSAGES, model="one", max_tokens=4, temperature=0)
    text = answer.choices[0].message.content
    stream = client.chat_completion(MESSAGES, model="one", max_tokens=4, temperature=0, stream=True)
    assert "".join(c.delta.content or "" for chunk in stream for c in chunk.choices) == text
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    said = client.chat_completion(MESSAGES, max_tokens=40, response_format=form)  # the base model
    assert type(json.loads(said.choices[0].message.content)["yes"]) is bool


def test_errors(client: Any) -> None:
    with pytest.raises(hub.errors.ValidationError, match="asks for 1000 more"):
        client.text_generation("Hello", max_new_tokens=1000)
    with pytest.raises(hub.errors.UnknownError, match="no adapter is named 'nope'"):
        client.text_generation("Hello", adapter_id="nope")
