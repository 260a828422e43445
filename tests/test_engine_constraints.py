"""The whole engine under constraints: grammars, biases and least lengths, in any company."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from jlorax.config import (
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine
from jlorax.errors import GrammarDeadEnd, InvalidParameter, InvalidRequest, JLoraxError
from jlorax.layout import mask_without
from jlorax.types import (
    Constraint,
    ConstraintKind,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
)
from tests import tiny_llama
from tests.engine_home import Home, all_is_back, answer
from tests.tiny_llama import EOS, VOCAB

PROMPT = (5, 6, 7)
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-_+/()<>=!?ABCDEFG'
REGEX = Constraint(ConstraintKind.REGEX, r"[0-9]{3}-[a-f]{2,5}")
SCHEMA = Constraint(
    ConstraintKind.JSON_SCHEMA,
    json.dumps(
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yz"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
)
CHOICE = Constraint(ConstraintKind.CHOICE, json.dumps(["yes", "no", "maybe"]))
GRAMMAR = Constraint(ConstraintKind.GRAMMAR, 'start: ("ab" | "cd")+ "."')


def write_characters(folder: Path) -> None:
    """A tokenizer whose tokens are single characters: a grammar has to know them as bytes."""
    names = ["<unk>", "<s>", "</s>", *CHARACTERS][:VOCAB]
    model = BPE({name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Rows and pages are short, so that answers are cut and computed anew."""
    folder = tmp_path_factory.mktemp("constraints")
    write_characters(tiny_llama.write_model(folder / "tiny"))
    tiny_llama.write_adapter(folder / "adapters" / "a", seed=1)
    return EngineConfig(
        cache_dir=folder / "cache",
        model=ModelSource(str(folder / "tiny")),
        steps=StepConfig(decode_buckets=(4,), extend_buckets=(32,), tile=8),
        scheduler=SchedulerConfig(max_batch=4),
        kv=KVConfig(max_seq_len=64, cache_bytes=18 * 1024, page_size=4),
        adapters=AdapterConfig(
            root=folder / "adapters", bank_bytes=1 << 20, max_slots=2, max_rank=8
        ),
        executable_dir=folder / "executables",
    )


@pytest.fixture(scope="module")
def home(config: EngineConfig) -> Iterator[Home]:
    with asyncio.Runner() as loop:
        engine = loop.run(Engine.start(config))
        yield Home(engine, loop)
        loop.run(engine.stop())


def asking(constraint: Constraint | None = None, **changes: Any) -> GenerateRequest:
    return replace(GenerateRequest(PROMPT, max_new_tokens=30, constraint=constraint), **changes)


def ids(result: GenerateResult) -> list[int]:
    return [token.id for token in result.tokens]


def text_of(result: GenerateResult) -> str:
    return result.text.removesuffix("</s>")


# ---- grammars


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_every_kind_of_constraint_is_kept(home: Home, temperature: float) -> None:
    async def test() -> None:
        sampling = SamplingParams(temperature=temperature, seed=3)
        asked = {kind: asking(kind, sampling=sampling) for kind in (REGEX, SCHEMA, CHOICE, GRAMMAR)}
        results = await asyncio.gather(*(answer(home.engine, r) for r in asked.values()))
        regex, schema, choice, grammar = map(text_of, results)
        assert re.fullmatch(REGEX.source, regex)
        made = json.loads(schema)
        assert set(made) == {"a", "b"}
        assert made["a"] in (True, False)
        assert made["b"] in ("x", "yz")
        assert choice in json.loads(CHOICE.source)
        assert re.fullmatch(r"(ab|cd)+\.", grammar) or results[3].finish_reason.value == "length"
        for result in results[:3]:
            assert result.finish_reason is FinishReason.EOS_TOKEN
        assert len({text_of(r) for r in results}) == 4

    home.run(test())


def test_an_answer_that_is_cut_short_says_length(home: Home) -> None:
    async def test() -> None:
        result = await answer(home.engine, asking(REGEX, max_new_tokens=4))
        assert result.finish_reason is FinishReason.LENGTH
        assert re.fullmatch(r"[0-9]{3}-", text_of(result))

    home.run(test())


def test_a_stream_shows_the_last_token_once_and_with_its_reason(home: Home) -> None:
    async def test() -> None:
        request = asking(Constraint(ConstraintKind.REGEX, "[0-9]{3}"), ignore_eos=True)
        events = [event async for event in home.engine.generate(request)]
        assert [event.index for event in events] == list(range(len(events)))
        assert [event.result is None for event in events] == [*[True] * (len(events) - 1), False]
        assert re.fullmatch("[0-9]{3}", text_of(events[-1].result or pytest.fail()))

    home.run(test())


@pytest.mark.parametrize("seed", range(2))
def test_company_changes_nobodys_tokens(home: Home, seed: int) -> None:
    """Constrained or not, through preemption, beside an adapter and a client that goes away."""

    async def test() -> None:
        rng = random.Random(seed)
        requests = [draw(rng) for _ in range(30)]
        before = home.engine._policy.num_preemptions
        leaver = asyncio.create_task(leave_early(home.engine))
        mixed = await asyncio.gather(*(answer(home.engine, r) for r in requests))
        await leaver
        assert home.engine._policy.num_preemptions > before
        for request, result in zip(requests, mixed, strict=True):
            assert ids(result) == ids(await answer(home.engine, request))

    home.run(test())


def draw(rng: random.Random) -> GenerateRequest:
    constraint = rng.choice([None, None, REGEX, SCHEMA, CHOICE, GRAMMAR])
    return asking(
        constraint,
        prompt=tuple(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 20))),
        adapter_id=rng.choice([None, "a"]),
        sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(1 << 63)),
        min_new_tokens=rng.choice([0, 0, 4]),
        logit_bias=rng.choice([(), ((EOS, 4.0), (9, -3.0))]),
        max_new_tokens=rng.randrange(5, 24),
    )


async def leave_early(engine: Engine) -> None:
    async with aclosing(cast(Any, engine.generate(asking(SCHEMA)))) as events:
        await anext(events)
        await anext(events)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(ConstraintKind.REGEX, "[0-9"),
        Constraint(ConstraintKind.JSON_SCHEMA, '{"type": 5}'),
        Constraint(ConstraintKind.GRAMMAR, "start: nothing"),
        Constraint(ConstraintKind.REGEX, "é"),  # no token of this model is a part of it
    ],
)
def test_a_bad_constraint_is_refused_and_nobody_else_notices(
    home: Home, constraint: Constraint
) -> None:
    async def test() -> None:
        beside = asyncio.create_task(answer(home.engine, asking()))
        with pytest.raises(InvalidRequest):
            await answer(home.engine, asking(constraint))
        assert len(ids(await beside)) > 0

    home.run(test())


# ---- at the seam, with grammars of our own


class Scripted:
    """A compiler, grammar and matcher in one: one token after the other, then an end or none."""

    def __init__(self, tokens: list[int], is_deadly: bool = False) -> None:
        self.tokens = tokens
        self.is_deadly = is_deadly
        self.gate = threading.Event()
        self.gate.set()
        self.num_accepted = 0
        self.is_slow = False

    def compile(self, constraint: Constraint) -> Scripted:
        assert self.gate.wait(30)
        return self

    def matcher(self) -> Scripted:
        return self

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.num_accepted]
        self.num_accepted += 1

    def mask(self) -> np.ndarray:
        return ~mask_without(self.tokens[self.num_accepted : self.num_accepted + 1], VOCAB)

    @property
    def is_finished(self) -> bool:
        return self.num_accepted == len(self.tokens) and not self.is_deadly

    @property
    def is_dead(self) -> bool:
        return self.num_accepted == len(self.tokens) and self.is_deadly


def in_a_new_engine(
    config: EngineConfig, scripted: Any, test: Callable[[Engine], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        engine = await Engine.start(config)
        await engine.stop()
        parts = replace(engine._parts, grammar_compiler=scripted)
        async with asyncio.timeout(60), Engine.of(parts) as engine:
            await test(engine)

    asyncio.run(run())


def test_a_dead_end_ends_the_stream_after_its_tokens(home: Home, config: EngineConfig) -> None:
    async def test(engine: Engine) -> None:
        seen = []
        with pytest.raises(GrammarDeadEnd, match="after 2 tokens") as caught:
            async for event in engine.generate(asking(REGEX)):
                seen.append(event.token.id)
        assert seen == [9, 8]
        assert caught.value.code == "grammar_dead_end"
        await all_is_back(engine)
        assert (await answer(engine, asking(max_new_tokens=2))).tokens

    in_a_new_engine(config, Scripted([9, 8], is_deadly=True), test)


def test_a_slow_compile_delays_its_request_alone(home: Home, config: EngineConfig) -> None:
    scripted = Scripted([9, 8, 7])
    scripted.gate.clear()

    async def test(engine: Engine) -> None:
        slow = asyncio.create_task(answer(engine, asking(REGEX)))
        for _ in range(3):
            await answer(engine, asking(max_new_tokens=4))
        assert not slow.done()
        scripted.gate.set()
        assert ids(await slow) == [9, 8, 7]
        assert (await slow).finish_reason is FinishReason.EOS_TOKEN

    in_a_new_engine(config, scripted, test)


class Broken(Scripted):
    def accept(self, token: int) -> None:
        raise ZeroDivisionError("secret words of the answer")


def test_a_fault_of_a_grammar_is_one_requests_alone(home: Home, config: EngineConfig) -> None:
    async def test(engine: Engine) -> None:
        beside = asyncio.create_task(answer(engine, asking()))
        with pytest.raises(JLoraxError, match="ZeroDivisionError") as caught:
            await answer(engine, asking(REGEX))
        assert "secret" not in str(caught.value)
        assert (await beside).tokens

    in_a_new_engine(config, Broken([9, 8]), test)


# ---- least lengths and biases


def test_no_stop_token_before_the_least_length(home: Home) -> None:
    async def test() -> None:
        eager = asking(logit_bias=((EOS, 100.0),))
        assert ids(await answer(home.engine, eager)) == [EOS]
        later = await answer(home.engine, replace(eager, min_new_tokens=5))
        assert ids(later).index(EOS) == 5
        assert later.finish_reason is FinishReason.EOS_TOKEN
        both = await answer(home.engine, replace(eager, min_new_tokens=5, constraint=GRAMMAR))
        assert len(ids(both)) > 5
        own = replace(eager, logit_bias=((9, 100.0),), stop_token_ids=(9,), min_new_tokens=3)
        assert ids(await answer(home.engine, own)).index(9) == 3

    home.run(test())


def test_a_bias_moves_the_choice_and_not_the_reported_log_probabilities(home: Home) -> None:
    async def test() -> None:
        plain = asking(max_new_tokens=1, num_top_logprobs=5)
        before = await answer(home.engine, plain)
        first, second = (a.id for a in before.tokens[0].alternatives[:2])
        assert ids(before) == [first]
        after = await answer(home.engine, replace(plain, logit_bias=((first, -100.0),)))
        assert ids(after) == [second]
        for ours, theirs in zip(
            after.tokens[0].alternatives, before.tokens[0].alternatives, strict=True
        ):
            assert ours.id == theirs.id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert after.tokens[0].logprob == pytest.approx(before.tokens[0].alternatives[1].logprob)

    home.run(test())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"min_new_tokens": 31}, "min_new_tokens"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "logit_bias"),
        ({"logit_bias": tuple((i, 1.0) for i in range(301))}, "logit_bias"),
    ],
)
def test_what_cannot_be_is_refused(home: Home, changes: dict[str, Any], name: str) -> None:
    async def test() -> None:
        with pytest.raises(InvalidParameter) as caught:
            await answer(home.engine, asking(**changes))
        assert caught.value.name == name

    home.run(test())


def test_a_bias_for_a_token_that_does_not_exist_is_refused(home: Home) -> None:
    async def test() -> None:
        with pytest.raises(InvalidRequest, match=f"vocabulary of {VOCAB}"):
            await answer(home.engine, asking(logit_bias=((VOCAB, 1.0),)))

    home.run(test())
