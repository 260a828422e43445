"""Any order of arrivals, cancels, adapters ready or failed, late results and late masks: nobody
notices."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jlorax.layout import BiasedTokens
from jlorax.scheduling.policy import Policy
from jlorax.scheduling.sequence import Sequence
from tests.scheduling.world import (
    EOS,
    GREEDY,
    SAMPLED,
    FakeGrammar,
    World,
    alone,
    config,
    constrained,
    shapes,
    version,
)

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
        self.right: dict[int, list[int]] = {}

    @rule(
        data=st.data(),
        adapter=st.sampled_from([None, "A", "B", "C", "D"]),
        sampled=st.booleans(),
        at_hand=st.booleans(),
        tenant=st.sampled_from("xyz"),
        grammar=st.one_of(
            st.none(), st.builds(FakeGrammar, st.integers(0, 2), st.integers(1, 20), st.booleans())
        ),
        bias=st.sampled_from([(), ((EOS, -200.0),), ((5, 30.0), (50, 40.0))]),
        min_new_tokens=st.integers(0, 6),
        wants=st.sampled_from(["", "", "logprobs", "embedding", "embedding alone"]),
    )
    def arrive(
        self,
        data: st.DataObject,
        adapter: str | None,
        sampled: bool,
        at_hand: bool,
        tenant: str,
        grammar: FakeGrammar | None,
        bias: BiasedTokens,
        min_new_tokens: int,
        wants: str,
    ) -> None:
        least = 0 if wants == "embedding alone" else 1
        num_prompt = data.draw(st.integers(1, self.max_tokens - least))
        num_new = data.draw(st.integers(1, self.max_tokens - num_prompt)) if least else 0
        seq = Sequence(
            prompt=tuple((7 * i + len(self.everyone)) % 90 for i in range(num_prompt)),
            sampling=SAMPLED if sampled else GREEDY,
            seed=0,
            max_new_tokens=num_new,
            stop_token_ids=frozenset({EOS, 3, 50}),
            version=None if adapter is None else version(adapter),
            tenant=tenant,
            logit_bias=bias,
            min_new_tokens=min_new_tokens,
            num_alternatives=2 if wants == "logprobs" else 0,
            wants_prompt_logprobs=wants == "logprobs",
            wants_embedding=wants.startswith("embedding"),
            **({} if grammar is None else constrained(grammar)),
        )
        self.everyone.append(self.world.add(seq, at_hand=at_hand))
        self.right[id(seq)] = alone(seq)

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

    @precondition(lambda self: self.world.in_grammars)
    @rule(data=st.data())
    def hear_grammar(self, data: st.DataObject) -> None:
        self.world.hear_grammar(data.draw(st.integers(0, len(self.world.in_grammars) - 1)))

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def everyone_has_a_beginning_of_the_right_answer(self) -> None:
        for seq in getattr(self, "everyone", []):
            answer = self.world.answer(seq)
            assert answer == self.right[id(seq)][: len(answer)]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        self.world.check_empty()
        for seq in self.everyone:
            if not seq.is_cancelled:
                assert self.world.answer(seq) == self.right[id(seq)]
                self.world.check_scores(seq)
            assert seq.is_over


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestInterleavings = Interleavings.TestCase
