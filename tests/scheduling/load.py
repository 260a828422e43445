"""Loads for the policy: requests arrive by a fake clock, and steps take fixed times."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jlorax.scheduling.policy import PolicyConfig
from jlorax.scheduling.sequence import Sequence
from tests.scheduling.world import BlindDevice, World, config, sequence, shapes, version

DECODE_S = 0.01
EXTEND_S = 0.02


def load_config(max_batch: int, num_slots: int) -> PolicyConfig:
    """Pages for all: rows and slots are what is short."""
    return config(
        shapes=shapes(decode=(max_batch,), extend=(64, 256)),
        max_batch=max_batch,
        num_pages=max_batch * 16 + 1,
        page_size=16,
        max_pages_per_sequence=16,
        num_slots=num_slots,
    )


def request(
    rng: np.random.Generator, adapter: str, tenant: str = "default", mean_new: int = 64
) -> Sequence:
    """An answer of half to one and a half times ``mean_new`` tokens."""
    num_new = int(rng.integers(mean_new // 2, mean_new + mean_new // 2))
    seq = sequence((1,) * 8, num_new, version(adapter))
    seq.stop_token_ids = frozenset()
    seq.tenant = tenant
    return seq


def zipf(rng: np.random.Generator, num_adapters: int, size: int) -> list[str]:
    weights = 1.0 / np.arange(1, num_adapters + 1)
    return [f"a{i}" for i in rng.choice(num_adapters, size, p=weights / weights.sum())]


@dataclass
class Load(World):
    """A world that is stepped by a clock; two steps in flight, slots granted between steps."""

    admitted_s: dict[int, float] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = BlindDevice(self.policy.config)

    def check(self) -> None:
        """The books are checked by the other tests; here it would be a thousand times a second."""

    def step(self, arrivals: Iterable[Sequence] = ()) -> list[Sequence]:
        """Reads a step; who ended by it."""
        num_over = len(self.over)
        for seq in arrivals:
            seq.arrival_s = self.now_s
            self.policy.add(seq)
            self.answers[id(seq)] = []
            if seq.version is not None:
                self.policy.at_hand(seq.version)
        self.settle()
        while self.grant():
            pass
        while self.launch() is not None:
            pass
        self._note_admitted()
        if self.in_flight:
            shape = self.in_flight[0][0].shape
            self.read()
            self.now_s += DECODE_S if shape.is_decode else EXTEND_S
        else:
            self.now_s += DECODE_S
        return self.over[num_over:]

    def _note_admitted(self) -> None:
        for seq in self.policy.running:
            if id(seq) not in self.admitted_s:
                self.admitted_s[id(seq)] = self.now_s
                self.admitted.append(seq)

    def queueing_s(self, seq: Sequence) -> float:
        return self.admitted_s[id(seq)] - seq.arrival_s


def closed_load(load: Load, adapters: Iterable[str], num_at_once: int, num_steps: int) -> list[int]:
    """Rows that are taken, step by step, while as many requests as before are kept in."""
    rng = np.random.default_rng(0)
    names = iter(adapters)
    arrivals = deque(request(rng, next(names)) for _ in range(num_at_once))
    taken = []
    for _ in range(num_steps):
        over = load.step(arrivals)
        taken.append(len(load.policy.running))
        arrivals = deque(request(rng, next(names)) for _ in over)
    return taken
