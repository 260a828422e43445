"""The unmodified ``lm-eval`` (local-completions) against a server process (``contract_heavy``).

It sends token ids with ``echo`` and ``logprobs`` and reads the log-probabilities of the prompt;
transformers and peft say what those are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.servers.contract_cases import ADAPTER, BASE
from tests.servers.contract_session import ContractSession, Outcomes
from tests.servers.process import ROOT

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.contract_heavy

PACKAGE = "lm-eval[api]==0.4.13"
QUESTIONS = ROOT / "tests" / "servers" / "contract_tasks" / "questions.jsonl"
ADAPTERS = {"base": None, "adapter": ADAPTER}
_TOLERANCE = 1e-3  # float32, sums of some twenty logarithms of up to 10

Scores = Callable[[list[int], int], tuple[float, bool]]


@pytest.fixture(scope="module")
def found(session: ContractSession) -> Outcomes:
    python, model = session.python_with(PACKAGE), session.home / "model"
    module, url = "tests.servers.contract_lm_eval", session.server.url
    return Outcomes(python, module, url, model, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return [json.loads(line) for line in QUESTIONS.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(session: ContractSession) -> Any:
    return transformers.AutoTokenizer.from_pretrained(session.home / "model")


@pytest.fixture(scope="module", params=list(ADAPTERS))
def asked(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def scores(session: ContractSession, asked: str) -> Scores:
    """(log-probability of the ids from a place on, whether each of them is the likeliest)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(session.home / "model")
    if (name := ADAPTERS[asked]) is not None:
        model = peft.PeftModel.from_pretrained(model, session.home / "root" / name)

    def scored(ids: list[int], start: int) -> tuple[float, bool]:
        with torch.no_grad():
            before = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        drawn = torch.tensor(ids[start:])
        own = before.gather(-1, drawn[:, None]).sum().item()
        return own, bool((before.argmax(-1) == drawn).all())

    return scored


def test_log_probabilities_of_choices(
    found: Outcomes, asked: str, scores: Scores, tokenizer: Any, documents: list[dict[str, Any]]
) -> None:
    answered = found[asked]
    responses = answered["responses"]["jlorax_choices"]
    num_right = 0
    for document, choices in zip(documents, responses, strict=True):
        start = len(tokenizer.encode(document["question"]))
        for choice, (own, is_greedy) in zip(document["choices"], choices, strict=True):
            ids = tokenizer.encode(document["question"] + choice)
            expected, expected_greedy = scores(ids, start)
            assert own == pytest.approx(expected, abs=_TOLERANCE)
            assert is_greedy == expected_greedy
        likeliest = max(range(len(choices)), key=lambda place: choices[place][0])
        num_right += likeliest == document["right"]
    accuracy = answered["results"]["jlorax_choices"]["acc,none"]
    assert accuracy == pytest.approx(num_right / len(documents))


def test_log_probabilities_of_whole_texts(
    found: Outcomes, asked: str, scores: Scores, tokenizer: Any, documents: list[dict[str, Any]]
) -> None:
    responses = found[asked]["responses"]["jlorax_rolling"]
    for document, (own,) in zip(documents, responses, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(document["question"])]
        assert own == pytest.approx(scores(ids, 1)[0], abs=_TOLERANCE)


def test_greedy_words(
    found: Outcomes, session: ContractSession, asked: str, documents: list[dict[str, Any]]
) -> None:
    model = ADAPTERS[asked] or BASE
    words = [
        session.completion_text(model, document["question"], max_tokens=6, stop=["?"])
        for document in documents
    ]
    assert found[asked]["responses"]["jlorax_words"] == [[text] for text in words]


def test_base_and_adapter_differ_in_every_document(found: Outcomes) -> None:
    for task, of_base in found["base"]["responses"].items():
        pairs = zip(of_base, found["adapter"]["responses"][task], strict=True)
        assert all(base != adapter for base, adapter in pairs), task


def test_some_choice_is_what_the_base_would_write(found: Outcomes) -> None:
    documents = found["base"]["responses"]["jlorax_choices"]
    assert {is_greedy for choices in documents for _, is_greedy in choices} == {True, False}
