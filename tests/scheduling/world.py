"""A world for the policy: a device that computes tokens from a table of KV pages, and a cache.

The device knows nothing but the plan's arrays. It keeps what each page holds, as the real one does,
and a token is a function of all tokens that its page table leads to and of the adapter in its slot:
a wrong page, offset, position, slot or row gives a wrong token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jlorax.layout import LAST_TOKEN, PADDING, StepLayout, StepShape
from jlorax.scheduling.policy import Emission, Policy, PolicyConfig
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import StepPlan
from jlorax.types import AdapterVersion, SamplingParams

VOCAB = 97
EOS = 96
TILE = 4
BASE = AdapterVersion("", "", 0)  # stands for no adapter
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0)


def shapes(
    *, decode: tuple[int, ...] = (1, 4), extend: tuple[int, ...] = (8, 16)
) -> tuple[StepShape, ...]:
    return (
        *(StepShape(n, 1, n) for n in decode),
        *(StepShape(n, TILE, n // TILE) for n in extend),
    )


def config(**changes: object) -> PolicyConfig:
    values: dict[str, object] = {
        "shapes": shapes(),
        "max_batch": 4,
        "num_pages": 9,
        "page_size": 4,
        "max_pages_per_sequence": 8,
        "num_slots": 2,
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
) -> Sequence:
    return Sequence(prompt, sampling, 0, max_new_tokens, frozenset({EOS}), adapter)


def next_token(tokens: list[int], adapter: AdapterVersion) -> int:
    """What follows ``tokens``; depends on their order, their number and the adapter."""
    value = sum(map(ord, adapter.adapter_id)) + 7 * len(tokens)
    for i, token in enumerate(tokens):
        value = (value * 31 + token * (i + 3)) % 100_003
    return value % VOCAB


def alone(seq: Sequence) -> list[int]:
    """The answer that it gets when nobody else is there."""
    tokens = list(seq.prompt)
    while len(tokens) - len(seq.prompt) < seq.max_new_tokens:
        tokens.append(next_token(tokens, seq.version or BASE))
        if tokens[-1] in seq.stop_token_ids:
            break
    return tokens[len(seq.prompt) :]


@dataclass(frozen=True)
class Results:
    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


class FakeDevice:
    """Steps run in the order of their launch; results are read later."""

    def __init__(self, policy_config: PolicyConfig) -> None:
        c = policy_config
        self.config = c
        self.kv = np.full((c.num_pages, c.page_size), -9, np.int64)
        self.last_token = np.full(c.max_batch + 1, -9, np.int64)
        self.bank = {c.num_slots: BASE}

    def launch(self, plan: StepPlan) -> Results:
        shape = plan.shape
        assert plan.num_tokens <= shape.num_tokens
        assert len(plan.outputs) <= shape.num_outputs
        views = StepLayout(shape, self.config.max_pages_per_sequence).views(plan.packed)
        assert (views["positions"] != PADDING).sum() == plan.num_tokens
        for t in range(shape.num_tokens):
            self._write(views, t)
        tokens = [self._draw(views, i, shape.tile) for i in range(len(plan.outputs))]
        for i in range(len(plan.outputs), shape.num_outputs):
            assert views["out_rows"][i] == self.config.max_batch
        return Results(np.array(tokens), np.zeros(len(tokens)))

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
        position, table = views["positions"][t], views["page_table"][t // tile]
        assert views["out_slots"][i] == views["slots"][t // tile]
        assert views["out_rows"][i] == views["token_rows"][t]
        size = self.config.page_size
        history = [int(self.kv[table[p // size], p % size]) for p in range(position + 1)]
        token = next_token(history, self.bank[int(views["out_slots"][i])])
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
    slots: dict[AdapterVersion, int] = field(default_factory=dict)  # pinned
    answers: dict[int, list[int]] = field(default_factory=dict)
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
            self.answers[id(emission.sequence)].append(emission.token)
        self.settle()
        return emissions

    def run(self, max_steps: int = 10_000) -> None:
        """Until nobody is left; every acquire is granted as soon as a slot is free."""
        for _ in range(max_steps):
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

    def answer(self, seq: Sequence) -> list[int]:
        return self.answers[id(seq)]
