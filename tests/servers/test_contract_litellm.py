"""The unmodified ``litellm`` against a server process, by each provider that a self-hosted server
can be (marker ``contract_heavy``)."""

from __future__ import annotations

import pytest

from tests.servers.contract_cases import ADAPTER, BASE, PROMPT
from tests.servers.contract_session import ContractSession, Outcomes
from tests.servers.test_contract_langchain import PACKAGES

pytestmark = pytest.mark.contract_heavy
CHATS = ("openai", "hosted_vllm", "huggingface")


@pytest.fixture(scope="module")
def found(session: ContractSession) -> Outcomes:
    python = session.python_with(*PACKAGES)
    return Outcomes(python, "tests.servers.contract_litellm", session.server.url)


@pytest.mark.parametrize("provider", CHATS)
def test_a_chat_whole_streamed_and_awaited(
    found: Outcomes, session: ContractSession, provider: str
) -> None:
    whole = session.chat(ADAPTER, ("user", PROMPT))
    text = whole["choices"][0]["message"]["content"]
    answer = found["chats"][provider]
    assert answer["usage"] == [whole["usage"]["prompt_tokens"], 6]
    assert answer["finish_reason"] == "length"
    assert [answer["content"], answer["streamed"], answer["awaited"]] == [text] * 3


def test_the_base_has_an_answer_of_its_own(found: Outcomes, session: ContractSession) -> None:
    assert found["base"] == session.chat_text(BASE, PROMPT) != session.chat_text(ADAPTER, PROMPT)


def test_a_stream_brings_its_usage(found: Outcomes) -> None:
    assert found["streamed_usage"] == 6


def test_a_batch(found: Outcomes, session: ContractSession) -> None:
    assert found["batch"] == [session.chat_text(ADAPTER, text) for text in (PROMPT, "The ship")]


def test_samples_with_logprobs(found: Outcomes) -> None:
    (one, num), (other, other_num) = found["samples"]
    assert one != other
    assert num > 0 and other_num > 0


@pytest.mark.parametrize("provider", CHATS)
def test_structured_output(found: Outcomes, provider: str) -> None:
    verdict = found["structured"][provider]
    assert verdict["word"] in ("good", "bad") and type(verdict["sure"]) is bool


def test_a_tool_is_called(found: Outcomes) -> None:
    call = found["tool"]
    assert call["name"] == "weather" and call["arguments"]["day"] in ("today", "tomorrow")


def test_fields_of_vllm(found: Outcomes) -> None:
    text = found["vllm_fields"]
    assert len(text) == 3 and set(text) <= set("ab")


def test_text_completions(found: Outcomes, session: ContractSession) -> None:
    texts = [session.completion_text(ADAPTER, text) for text in (PROMPT, "The ship")]
    assert found["text_completions"] == {
        "whole": texts[0],
        "streamed": texts[0],
        "several": texts,
        "as a chat": texts[0],
    }


def test_embeddings(found: Outcomes) -> None:
    assert found["embeddings"] == {"openai": [32, 32], "hosted_vllm": [32, 32]}


def test_an_unknown_model_is_its_own_class(found: Outcomes) -> None:
    """Its huggingface provider has none for a 404."""
    assert found["unknown_model"] == {
        "openai": "NotFoundError",
        "hosted_vllm": "NotFoundError",
        "huggingface": "APIError",
    }


def test_too_many_tokens_are_its_own_class(found: Outcomes) -> None:
    """By which a router falls back on another model; it goes by "prompt is too long"."""
    assert found["too_long"] == "ContextWindowExceededError"
