"""Any order of arrivals, cancels, adapters ready or failed, and late results: nobody notices."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from tests.scheduling.world import EOS, GREEDY, SAMPLED, World, alone, config, shapes, version

PAGE_SIZE = 4


class Interleavings(RuleBasedStateMachine):
    """Every rule is one event at the scheduler; the books are checked after each."""

    @initialize(num_pages=st.integers(4, 9), max_batch=st.integers(1, 5), slots=st.integers(1, 3))
    def start(self, num_pages: int, max_batch: int, slots: int) -> None:
        self.max_tokens = (num_pages - 1) * PAGE_SIZE
        self.world = World(
            Policy(
                config(
                    shapes=shapes(decode=(1, 5)),
                    num_pages=num_pages,
                    max_batch=max_batch,
                    num_slots=slots,
                    max_pages_per_sequence=num_pages - 1,
                    tenant_weights={"x": 2.0},
                )
            )
        )
        self.everyone: list[Sequence] = []

    @rule(
        data=st.data(),
        adapter=st.sampled_from([None, "A", "B", "C", "D"]),
        sampled=st.booleans(),
        at_hand=st.booleans(),
        tenant=st.sampled_from("xyz"),
    )
    def arrive(
        self, data: st.DataObject, adapter: str | None, sampled: bool, at_hand: bool, tenant: str
    ) -> None:
        num_prompt = data.draw(st.integers(1, self.max_tokens - 1))
        num_new = data.draw(st.integers(1, self.max_tokens - num_prompt))
        seq = Sequence(
            prompt=tuple((7 * i + len(self.everyone)) % 90 for i in range(num_prompt)),
            sampling=SAMPLED if sampled else GREEDY,
            seed=0,
            max_new_tokens=num_new,
            stop_token_ids=frozenset({EOS, 3, 50}),
            version=None if adapter is None else version(adapter),
            tenant=tenant,
        )
        self.everyone.append(self.world.add(seq, at_hand=at_hand))

    @precondition(lambda self: self.everyone)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.everyone)).is_cancelled = True
        self.world.settle()

    @rule(adapter=st.sampled_from("ABCD"), here=st.booleans())
    def load_or_lose(self, adapter: str, here: bool) -> None:
        if here:
            self.world.policy.at_hand(version(adapter))
        else:
            self.world.policy.not_at_hand(version(adapter))
        self.world.settle()

    @precondition(lambda self: self.world.asked)
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.world.grant(data.draw(st.integers(0, len(self.world.asked) - 1)))

    @precondition(lambda self: self.world.asked)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.world.fail(data.draw(st.integers(0, len(self.world.asked) - 1)))

    @rule()
    def launch(self) -> None:
        self.world.launch()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def read(self) -> None:
        self.world.read()

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def everyone_has_a_beginning_of_the_right_answer(self) -> None:
        for seq in getattr(self, "everyone", []):
            answer = self.world.answer(seq)
            assert answer == alone(seq)[: len(answer)]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        self.world.check_empty()
        for seq in self.everyone:
            if not seq.is_cancelled:
                assert self.world.answer(seq) == alone(seq)
            assert seq.is_over


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestInterleavings = Interleavings.TestCase
