"""Logits of the whole engine (paged, chunked, batched) against PEFT's own, alone and mixed.

Tolerance, both in float32: 1e-3 of the largest logit; every adapter moves them by 100 times that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle, islice

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.lora.cases import FAMILIES
from tests.lora.rig import MAX_BATCH, MAX_SLOTS, Answer, Ask, Rig, open_rig
from tests.models.tiny import prompt

_TOLERANCE = 1e-3
_TIE = 1e-4
_PROMPT_TOKENS = 37  # several KV pages, and more than Mistral's window
_LOGIT_TOKENS = 4
_GREEDY_TOKENS = 64
_BY_DEFAULT = ("llama",)  # each family has executables of its own


def _marks(family: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if family in _BY_DEFAULT else (pytest.mark.slow,)


_CASES = [
    pytest.param(family, case, marks=_marks(family))
    for family, made in FAMILIES.items()
    for case in made.cases
]
_GROUPS = [
    pytest.param(family, group, marks=_marks(family))
    for family, made in FAMILIES.items()
    for group in made.groups(MAX_SLOTS)
]


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """One engine per family, opened when it is first asked for."""
    with ExitStack() as stack:

        class Rigs(dict[str, Rig]):
            def __missing__(self, family: str) -> Rig:
                folder = tmp_path_factory.mktemp("rig")
                self[family] = stack.enter_context(open_rig(FAMILIES[family], folder))
                return self[family]

        yield Rigs()


@pytest.mark.parametrize(("family", "case"), _CASES)
def test_alone(rigs: dict[str, Rig], family: str, case: str) -> None:
    rig = rigs[family]
    ask = Ask(case, prompt(_PROMPT_TOKENS))
    _check_moves(rig, ask)
    _check_logits(rig, ask, rig.answer([ask], _LOGIT_TOKENS, logprobs=True)[0])
    _check_greedy(rig, ask, rig.answer([ask], _GREEDY_TOKENS, logprobs=False)[0])


@pytest.mark.parametrize(("family", "group"), _GROUPS, ids=lambda value: str(value)[:30])
def test_sixteen_rows_over_eight_adapters_and_the_base(
    rigs: dict[str, Rig], family: str, group: list[str]
) -> None:
    rig = rigs[family]
    compiled = rig.engine.stats().executables_compiled_after_ready  # counts the whole process
    names = islice(cycle([*group, None]), MAX_BATCH)
    asks = [Ask(name, prompt(9 + 3 * i, seed=i)) for i, name in enumerate(names)]
    for ask, answer in zip(asks, rig.answer(asks, _LOGIT_TOKENS, logprobs=True), strict=True):
        _check_logits(rig, ask, answer)
    for ask, answer in zip(asks, rig.answer(asks, _GREEDY_TOKENS, logprobs=False), strict=True):
        _check_greedy(rig, ask, answer)
    assert rig.engine.stats().executables_compiled_after_ready == compiled


def _check_moves(rig: Rig, ask: Ask) -> None:
    """Or an adapter that is ignored would pass."""
    adapted = rig.truth(ask, (0,))
    moved = np.abs(adapted - rig.truth(Ask(None, ask.prompt), (0,))).max()
    assert moved >= 100 * _TOLERANCE * np.abs(adapted).max()


def _check_logits(rig: Rig, ask: Ask, answer: Answer) -> None:
    expected = rig.truth(ask, answer.tokens)
    logprobs = expected - np.logaddexp.reduce(expected, axis=-1, keepdims=True)
    error = np.abs(answer.logprobs - logprobs).max()
    assert error <= _TOLERANCE * np.abs(expected).max(), (ask.adapter, error)


def _check_greedy(rig: Rig, ask: Ask, answer: Answer) -> None:
    assert len(answer.tokens) == _GREEDY_TOKENS
    expected = rig.truth(ask, answer.tokens)
    for i in np.flatnonzero(expected.argmax(-1) != answer.tokens):
        margin = expected[i].max() - expected[i, answer.tokens[i]]
        assert margin < _TIE * np.abs(expected).max(), (ask.adapter, i, margin)
        print(f"{ask.adapter}: token {i} is a tie, margin {margin:.1e}")
