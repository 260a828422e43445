"""A world for the policy: a device that computes tokens from a table of KV pages, and a cache.

The device knows nothing but the plan's arrays. It keeps what each page holds, as the real one does,
and a token is a function of all tokens that its page table leads to and of the adapter in its slot:
a wrong page, offset, position, slot or row gives a wrong token. So does a wrong mask or bias: they
are written into rows, and a step names the row of each output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlorax.layout import (
    LAST_TOKEN,
    NO_TARGET,
    OUTPUT_ROWS,
    PADDING,
    RowWrites,
    StepLayout,
    StepShape,
    mask_without,
    mask_words,
)
from jlorax.scheduling.policy import Emission, Policy, PolicyConfig
from jlorax.scheduling.prompt_scores import PromptScores
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import StepPlan
from jlorax.types import AdapterVersion, FinishReason, SamplingParams

VOCAB = 97
EOS = 96
TILE = 4
BASE = AdapterVersion("", "", 0)  # stands for no adapter
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0)


def shapes(
    *,
    decode: tuple[int, ...] = (1, 4),
    extend: tuple[int, ...] = (8, 16),
    scoring: tuple[int, ...] = (8,),
) -> tuple[StepShape, ...]:
    return (
        *(StepShape(n, 1, n) for n in decode),
        *(StepShape(n, TILE, n // TILE) for n in extend),
        *(StepShape(n, TILE, n // TILE, scores=True) for n in scoring),
    )


def config(**changes: object) -> PolicyConfig:
    values: dict[str, object] = {
        "shapes": shapes(),
        "max_batch": 4,
        "num_pages": 9,
        "page_size": 4,
        "max_pages_per_sequence": 8,
        "num_slots": 2,
        "vocab_size": VOCAB,
        "max_overtake_s": 0.5,
    }
    return PolicyConfig(**{**values, **changes})  # type: ignore[arg-type]


def version(name: str) -> AdapterVersion:
    return AdapterVersion("default", name, 1)


def sequence(
    prompt: tuple[int, ...] = (1, 2, 3),
    max_new_tokens: int = 4,
    adapter: AdapterVersion | None = None,
    sampling: SamplingParams = GREEDY,
    **rules: Any,
) -> Sequence:
    return Sequence(prompt, sampling, 0, max_new_tokens, frozenset({EOS}), adapter, **rules)


@dataclass(frozen=True)
class FakeGrammar:
    """Allows a part of the vocabulary that depends on all that was answered; ends after ``length``
    tokens, or is dead then."""

    seed: int
    length: int = 1000
    is_deadly: bool = False

    def allowed(self, answer: list[int]) -> list[int]:
        shift = self.seed + sum(answer)
        return [t for t in range(VOCAB) if (t * 7 + shift) % 3 == 0]

    def mask(self, answer: list[int]) -> np.ndarray:
        return ~mask_without(self.allowed(answer), VOCAB)


def constrained(grammar: FakeGrammar) -> dict[str, Any]:
    """How such a sequence is admitted."""
    return {"matcher": grammar, "mask": grammar.mask([])}


def next_token(tokens: list[int], adapter: AdapterVersion) -> int:
    """What follows ``tokens``; depends on their order, their number and the adapter."""
    value = sum(map(ord, adapter.adapter_id)) + 7 * len(tokens)
    for i, token in enumerate(tokens):
        value = (value * 31 + token * (i + 3)) % 100_003
    return value % VOCAB


def drawn(wanted: int, allowed: np.ndarray, bias: np.ndarray) -> int:
    """The nearest behind ``wanted`` that is allowed; a bias brings a token nearer."""
    distance = (np.arange(VOCAB) - wanted) % VOCAB - bias
    return int(np.where(allowed, distance, np.inf).argmin())


def alone(seq: Sequence) -> list[int]:
    """The answer that it gets when nobody else is there."""
    answer: list[int] = []
    bias = np.zeros(VOCAB)
    for token, value in seq.logit_bias:
        bias[token] = value
    while len(answer) < seq.max_new_tokens:
        wanted = next_token([*seq.prompt, *answer], seq.version or BASE)
        answer.append(drawn(wanted, _allowed(seq, answer), bias))
        if answer[-1] in seq.stop_token_ids:
            break
        if seq.matcher is not None and len(answer) == seq.matcher.length:
            break
    return answer


def _allowed(seq: Sequence, answer: list[int]) -> np.ndarray:
    allowed = np.ones(VOCAB, bool)
    if seq.matcher is not None:
        allowed[:] = False
        allowed[seq.matcher.allowed(answer)] = True
    if len(answer) < seq.min_new_tokens:
        stops = list(seq.stop_token_ids)
        if not set(np.flatnonzero(allowed)) <= set(stops):
            allowed[stops] = False
    return allowed


def token_scores(history: list[int], adapter: AdapterVersion, target: int) -> tuple[float, ...]:
    """(log-probability of the target, best alternative, hidden state) of a history's last token."""
    hidden = next_token(history, adapter)
    return -hidden - target / 128, hidden, hidden


def scores_alone(seq: Sequence) -> tuple[list[float], list[int], float]:
    """(log-probabilities, best alternatives, mean hidden state) of its prompt."""
    prompt, adapter = list(seq.prompt), seq.version or BASE
    pairs = zip(range(1, len(prompt)), prompt[1:], strict=True)
    found = [token_scores(prompt[:n], adapter, target) for n, target in pairs]
    hidden = sum(next_token(prompt[:n], adapter) for n in range(1, len(prompt) + 1))
    return [f[0] for f in found], [int(f[1]) for f in found], hidden / len(prompt)


@dataclass(frozen=True)
class Scores:
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray
    hidden_sums: np.ndarray


@dataclass(frozen=True)
class Results:
    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    scores: Scores | None = None


class FakeDevice:
    """Steps run in the order of their launch; results are read later."""

    def __init__(self, policy_config: PolicyConfig) -> None:
        c = policy_config
        self.config = c
        self.kv = np.full((c.num_pages, c.page_size), -9, np.int64)
        self.last_token = np.full(c.max_batch + 1, -9, np.int64)
        self.bank = {c.num_slots: BASE}
        self.masks = np.full((c.max_batch + 1, mask_words(VOCAB)), -1, np.int32)
        self.bias = np.zeros((c.max_batch + 1, VOCAB))
        self.num_mask_writes = 0

    def launch(self, plan: StepPlan) -> Results:
        shape = plan.shape
        self._write_rows(plan.writes)
        assert plan.num_tokens <= shape.num_tokens
        assert len(plan.outputs) <= shape.num_outputs
        views = StepLayout(shape, self.config.max_pages_per_sequence).views(plan.packed)
        assert (views["positions"] != PADDING).sum() == plan.num_tokens
        for t in range(shape.num_tokens):
            self._write(views, t)
        tokens = [self._draw(views, i, shape.tile) for i in range(len(plan.outputs))]
        for i in range(len(plan.outputs), shape.num_outputs):
            for name in OUTPUT_ROWS:
                assert views[name][i] == self.config.max_batch
        scores = self._score(views, shape) if shape.scores else None
        return Results(np.array(tokens), np.zeros(len(tokens)), scores=scores)

    def _score(self, views: dict[str, np.ndarray], shape: StepShape) -> Scores:
        num_tokens, num_chunks = shape.num_tokens, shape.num_outputs
        scores = Scores(
            np.full(num_tokens, 9.0),
            np.full((num_tokens, 20), -9),
            np.zeros((num_tokens, 20)),
            np.zeros((num_chunks, 1)),
        )
        for t, chunk in enumerate(views["score_chunks"]):
            assert (chunk == num_chunks) == (views["positions"][t] == PADDING)
            if chunk == num_chunks:
                assert views["score_targets"][t] == NO_TARGET
                continue
            assert views["score_slots"][t] == views["slots"][t // shape.tile]
            history, target = self._history(views, t, shape.tile), int(views["score_targets"][t])
            adapter = self.bank[int(views["score_slots"][t])]
            logprob, best, hidden = token_scores(history, adapter, target)
            if target != NO_TARGET:
                scores.logprobs[t] = logprob
                scores.top_tokens[t, : views["score_alternatives"][t]] = best
            scores.hidden_sums[chunk] += hidden
        return scores

    def _history(self, views: dict[str, np.ndarray], t: int, tile: int) -> list[int]:
        """All tokens up to the step's t-th, as its page table leads to them."""
        position, table = views["positions"][t], views["page_table"][t // tile]
        size = self.config.page_size
        return [int(self.kv[table[p // size], p % size]) for p in range(position + 1)]

    def _write_rows(self, writes: RowWrites) -> None:
        for row, words in writes.masks:
            assert row < self.config.max_batch
            self.masks[row] = words
            self.num_mask_writes += 1
        for row, tokens in writes.biases:
            assert row < self.config.max_batch
            self.bias[row] = 0
            for token, value in tokens:
                self.bias[row, token] = value

    def _write(self, views: dict[str, np.ndarray], t: int) -> None:
        row, position = views["token_rows"][t], views["positions"][t]
        if position == PADDING:
            assert row == self.config.max_batch
            assert views["kv_pages"][t] == 0
            return
        given = views["tokens"][t]
        token = self.last_token[row] if given == LAST_TOKEN else given
        page, offset = views["kv_pages"][t], views["kv_offsets"][t]
        assert page > 0
        assert 0 <= token < VOCAB
        self.kv[page, offset] = token

    def _draw(self, views: dict[str, np.ndarray], i: int, tile: int) -> int:
        t = views["out_index"][i]
        assert views["out_slots"][i] == views["slots"][t // tile]
        assert views["out_rows"][i] == views["token_rows"][t]
        wanted = next_token(self._history(views, t, tile), self.bank[int(views["out_slots"][i])])
        words = self.masks[views["mask_rows"][i]]
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
        token = drawn(wanted, allowed, self.bias[views["bias_rows"][i]])
        self.last_token[views["out_rows"][i]] = token
        return token


class BlindDevice(FakeDevice):
    """Looks at nothing and draws the same token always: for loads of thousands of tokens."""

    def launch(self, plan: StepPlan) -> Results:
        return Results(np.ones(len(plan.outputs), np.int64), np.zeros(len(plan.outputs)))


@dataclass
class World:
    """The scheduler actor's duties around a policy, one call each, and checks after every one."""

    policy: Policy
    max_in_flight: int = 2
    now_s: float = 0.0
    device: FakeDevice = field(init=False)
    in_flight: deque[tuple[StepPlan, Results]] = field(default_factory=deque)
    asked: list[AdapterVersion] = field(default_factory=list)  # acquired, not answered
    in_grammars: list[Sequence] = field(default_factory=list)  # whose grammar has its last token
    slots: dict[AdapterVersion, int] = field(default_factory=dict)  # pinned
    answers: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, PromptScores] = field(default_factory=dict)
    over: list[Sequence] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = FakeDevice(self.policy.config)

    def add(self, seq: Sequence, *, at_hand: bool = True) -> Sequence:
        self.policy.add(seq)
        self.answers[id(seq)] = []
        if at_hand and seq.version is not None:
            self.policy.at_hand(seq.version)
        self.settle()
        return seq

    def settle(self) -> None:
        """What the scheduler does before it plans."""
        self.over += self.policy.remove_over()
        changes = self.policy.update_pins(self.now_s)
        for released in changes.release:
            del self.slots[released]
        for acquired in changes.acquire:
            assert acquired not in self.asked
            assert acquired not in self.slots
            self.asked.append(acquired)
        self.check()

    def grant(self, i: int = 0) -> bool:
        """Answers an acquire with a slot, when one is free."""
        free = sorted(set(range(self.policy.config.num_slots)) - set(self.slots.values()))
        if not free or i >= len(self.asked):
            return False
        granted = self.asked.pop(i)
        self.slots[granted] = free[0]
        self.device.bank[free[0]] = granted
        self.policy.pins.ready(granted, free[0])
        self.settle()
        return True

    def fail(self, i: int = 0) -> None:
        failed = self.asked.pop(i)
        self.policy.pins.failed(failed)
        for seq in self.policy.waiting_for(failed):
            seq.is_cancelled = True
        self.settle()

    def launch(self) -> StepPlan | None:
        if len(self.in_flight) == self.max_in_flight:
            return None
        plan = self.policy.plan(self.now_s)
        if plan is not None:
            self.in_flight.append((plan, self.device.launch(plan)))
            self.kinds.append("decode" if plan.shape.tile == 1 else "extend")
        self.check()
        return plan

    def read(self) -> list[Emission]:
        """Reads the oldest step in flight."""
        plan, results = self.in_flight.popleft()
        emissions = self.policy.complete(plan, results)
        for emission in emissions:
            if emission.scores is not None:
                assert id(emission.sequence) not in self.scores
                self.scores[id(emission.sequence)] = emission.scores
            if emission.token is not None:
                self.answers[id(emission.sequence)].append(emission.token)
            if emission.sequence.matcher is not None and emission.finish_reason is None:
                self.in_grammars.append(emission.sequence)
        self.settle()
        return emissions

    def hear_grammar(self, i: int = 0) -> None:
        """What may follow, or that nothing may."""
        seq = self.in_grammars.pop(i)
        grammar, answer = seq.matcher, self.answer(seq)
        if len(answer) < grammar.length:
            seq.mask = grammar.mask(answer)
        elif grammar.is_deadly:
            seq.is_cancelled = True
        else:
            seq.finish_reason = FinishReason.EOS_TOKEN
        self.settle()

    def run(self, max_steps: int = 10_000) -> None:
        """Until nobody is left; every acquire is granted as soon as a slot is free."""
        for _ in range(max_steps):
            while self.in_grammars:
                self.hear_grammar()
            while self.grant():
                pass
            while self.launch() is not None:
                pass
            if not self.in_flight:
                break
            self.read()
        assert self.policy.is_idle, (self.policy.running, self.policy.waiting)

    def check(self) -> None:
        self.policy.check()
        assert len(self.in_flight) <= self.max_in_flight

    def check_empty(self) -> None:
        """Everything is back."""
        self.settle()
        self.check()
        policy = self.policy
        assert policy.is_idle
        assert policy.pool.num_free == policy.pool.num_usable
        assert not self.slots
        assert not self.asked

    def check_scores(self, seq: Sequence) -> None:
        """It got what it asked for, and nothing else."""
        if seq.scores is None:
            assert id(seq) not in self.scores
            return
        got, (logprobs, best, hidden) = self.scores[id(seq)], scores_alone(seq)
        if seq.wants_prompt_logprobs:
            np.testing.assert_allclose(got.logprobs, logprobs, rtol=1e-6)
            for column in got.top_tokens.T:
                assert column.tolist() == best
        np.testing.assert_allclose(got.mean_hidden, [hidden], rtol=1e-5)

    def answer(self, seq: Sequence) -> list[int]:
        return self.answers[id(seq)]
