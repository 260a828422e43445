"""Grammars that are tried where they may fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jlorax.errors import Unavailable
from jlorax.structured import trial
from jlorax.structured.sources import grammar_of
from jlorax.structured.trial import Bounds, Trials, Verdict
from jlorax.types import Constraint
from tests.structured.walks import lark, regex, schema

TOKENS = (b"\xff<eos>", *(bytes([byte]) for byte in range(256)))


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    trials = Trials(TOKENS, (0,), Bounds(compile_s=0.2))
    yield trials
    trials.close()


def tried(trials: Trials, constraint: Constraint) -> Verdict:
    return trials.verdict(grammar_of(constraint))


def chain(length: int) -> Constraint:
    """Rules that refer to each other: every one is a frame of the stack."""
    rules = [f"r{i}: r{i + 1}" for i in range(length)]
    return lark("\n".join(["start: r0", *rules, f'r{length}: "x"']))


def items(count: int) -> Constraint:
    """Every one of them a symbol of its own."""
    return schema(json.dumps({"type": "array", "prefixItems": [{}] * count}))


def test_what_compiles_is_told_with_its_memory(trials: Trials) -> None:
    small, large = tried(trials, items(1)), tried(trials, items(5000))
    assert small.refusal is None and large.refusal is None
    assert 0 < 2 * small.num_bytes < large.num_bytes < Bounds().grammar_bytes


def test_time_and_stack_have_an_end(trials: Trials) -> None:
    too_long = tried(trials, schema('{"type": "integer", "multipleOf": 1000003}'))
    assert too_long.refusal == "is too complex: it takes over 0.2 s to compile"
    too_deep = tried(trials, chain(8000))
    assert too_deep.refusal is not None and "nested too deep" in too_deep.refusal
    assert tried(trials, chain(20)).refusal is None  # and the next is none the worse


def test_memory_has_an_end() -> None:
    trials = Trials(TOKENS, (0,), Bounds(compile_s=5.0, grammar_bytes=16 << 20))
    try:
        assert tried(trials, items(10)).refusal is None
        too_much = tried(trials, items(20_000)).refusal
        assert too_much is not None and "over 16777216 bytes" in too_much
    finally:
        trials.close()


def test_a_step_has_an_end() -> None:
    trials = Trials(TOKENS, (0,), Bounds(step_s=1e-9))
    try:
        slow = tried(trials, regex("a+")).refusal
        assert slow is not None and slow.startswith("is too complex: token 0 of an answer took")
    finally:
        trials.close()


def test_a_text_that_begins_nowhere_or_breaks_off_is_found(trials: Trials) -> None:
    nowhere = tried(trials, lark("start: start"))
    assert nowhere.refusal is not None and "NoExtension" in nowhere.refusal
    options = " | ".join(f'"{i}a"' for i in range(9000))
    wide = tried(trials, lark(f"start: {options}"))
    assert wide.refusal is not None and "Current row has" in wide.refusal


def test_a_process_that_was_ended_is_replaced(trials: Trials) -> None:
    tried(trials, regex("a"))
    process = trials._idle.queue[-1]
    assert process is not None
    process._process.kill()
    with pytest.raises(Unavailable, match="ended with status -9; try again"):
        tried(trials, regex("a"))
    assert tried(trials, regex("a")).refusal is None


def test_more_threads_than_processes_wait(trials: Trials) -> None:
    with ThreadPoolExecutor(6) as threads:
        verdicts = list(threads.map(lambda i: tried(trials, regex(f"a{{{i}}}")), range(1, 13)))
    assert all(verdict.refusal is None for verdict in verdicts)
    assert trials._idle.qsize() == trial.MAX_PROCESSES


def test_closing_ends_the_processes() -> None:
    trials = Trials(TOKENS, (0,))
    tried(trials, regex("a"))
    process = trials._idle.queue[-1]
    assert process is not None and process._process.poll() is None
    trials.close()
    assert process._process.returncode == 0
