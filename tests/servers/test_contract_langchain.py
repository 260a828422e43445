"""The unmodified ``langchain-openai`` and ``langchain-huggingface`` against a server process
(marker ``contract_heavy``)."""

from __future__ import annotations

import pytest

from tests.servers.contract_cases import ADAPTER, BASE, PROMPT
from tests.servers.contract_session import ContractSession, Outcomes

pytestmark = pytest.mark.contract_heavy
# langchain-huggingface pins huggingface-hub < 2; langsmith would put a plugin into every pytest
PACKAGES = ("langchain-openai==1.7.4", "langchain-huggingface==1.2.3", "litellm==1.110.2")


@pytest.fixture(scope="module")
def found(session: ContractSession) -> Outcomes:
    python = session.python_with(*PACKAGES)
    return Outcomes(python, "tests.servers.contract_langchain", session.server.url)


def test_a_chat(found: Outcomes, session: ContractSession) -> None:
    whole = session.chat(ADAPTER, ("system", "Be kind."), ("user", PROMPT))
    answer = found["invoke"]
    assert answer["content"] == whole["choices"][0]["message"]["content"]
    assert (answer["finish_reason"], answer["model"]) == ("length", ADAPTER)
    usage = answer["usage"]
    assert usage["output_tokens"] == 6
    assert usage["input_tokens"] == whole["usage"]["prompt_tokens"]


def test_the_adapter_is_asked_and_not_the_base(found: Outcomes, session: ContractSession) -> None:
    assert found["invoke_the_base"] == session.chat_text(BASE, PROMPT)
    assert found["ainvoke"] == session.chat_text(ADAPTER, PROMPT) != found["invoke_the_base"]


def test_a_stream_gives_the_same_text_and_its_usage(
    found: Outcomes, session: ContractSession
) -> None:
    streamed = found["stream"]
    assert streamed["content"] == session.chat_text(ADAPTER, PROMPT)
    assert streamed["usage"]["output_tokens"] == 6


def test_a_batch(found: Outcomes, session: ContractSession) -> None:
    assert found["batch"] == [session.chat_text(ADAPTER, text) for text in (PROMPT, "The ship")]


def test_logprobs(found: Outcomes) -> None:
    tokens = found["logprobs"]
    assert len(tokens) == 6
    for token in tokens:
        assert len(token["top_logprobs"]) == 2
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] < 0


def test_samples_differ(found: Outcomes) -> None:
    one, other = found["samples"]
    assert one != other


def test_a_stop_string_ends_the_answer_and_is_not_in_it(found: Outcomes) -> None:
    text = found["stop"]
    assert text.startswith("a") and set(text[1:]) <= {"b"}


@pytest.mark.parametrize("how", ["structured_by_schema", "structured_by_function"])
def test_structured_output_is_an_object_of_the_class(found: Outcomes, how: str) -> None:
    verdict = found[how]
    assert verdict["word"] in ("good", "bad") and type(verdict["sure"]) is bool


def test_tools(found: Outcomes) -> None:
    called = found["tool_and_its_answer"]
    assert called["name"] == "weather"
    assert list(called["args"]) == ["day"] and called["args"]["day"] in ("today", "tomorrow")
    (streamed,) = found["streamed_tool"]
    assert streamed == {"name": called["name"], "args": called["args"]}
    assert isinstance(called["later"], str)


def test_responses(found: Outcomes, session: ContractSession) -> None:
    assert found["responses"] == session.chat_text(ADAPTER, PROMPT)


def test_an_unknown_model_is_its_own_class(found: Outcomes) -> None:
    assert found["unknown_model"] == "OpenAIModelNotFoundError"


def test_too_many_tokens_are_its_own_class(found: Outcomes) -> None:
    """By which chains shorten their history; it goes by the words "prompt is too long"."""
    assert found["too_long"] == "OpenAIContextOverflowError"


def test_completions(found: Outcomes, session: ContractSession) -> None:
    texts = [session.completion_text(ADAPTER, text) for text in (PROMPT, "The ship")]
    answer = found["completions"]
    assert answer == {"whole": texts[0], "streamed": texts[0], "batch": texts}


def test_embeddings(found: Outcomes) -> None:
    assert found["embeddings"] == [32, 32]


def test_a_hugging_face_endpoint_with_and_without_an_adapter(
    found: Outcomes, session: ContractSession
) -> None:
    base, adapter = session.completion_text(BASE, PROMPT), session.completion_text(ADAPTER, PROMPT)
    assert base != adapter
    assert found["hugging_face"] == {
        "base": base,
        "adapter": adapter,
        "bound": adapter,
        "streamed": adapter,
        "async": adapter,
        "batch": [adapter, adapter],
    }


def test_a_hugging_face_endpoint_samples_as_it_comes(
    found: Outcomes, session: ContractSession
) -> None:
    one, again = found["hugging_face_as_it_comes"]
    assert one == again  # its seed is read
    assert one != session.completion_text(ADAPTER, PROMPT)


def test_a_hugging_face_endpoint_says_which_adapter_is_unknown(found: Outcomes) -> None:
    assert "nobody" in found["hugging_face_unknown"]
