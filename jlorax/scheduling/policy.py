"""Who runs next. Plain and synchronous: ``plan`` decides a step, ``complete`` takes its tokens.

A step is planned before the last one's tokens are read, so a stop is noticed one step late and that
row's extra token thrown away. Freed pages, rows and slots may be handed out at once all the same:
the device runs steps in order, so what is written for the new owner comes after.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Protocol

import numpy as np

from jlorax.layout import StepShape
from jlorax.scheduling.extend_batch import ExtendBatch, ExtendShapes
from jlorax.scheduling.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, FairShares
from jlorax.scheduling.overtaking import (
    Admissions,
    Holds,
    late_lines,
    not_behind,
    overdue_lines,
    pin_order,
)
from jlorax.scheduling.pages import PagePool
from jlorax.scheduling.pins import PinBook, PinChanges
from jlorax.scheduling.prompt_scores import PromptScores, StepScores
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import Chunk, PlanBuilder, StepPlan, smallest
from jlorax.scheduling.waiting import Line, Waiting, in_turn
from jlorax.types import AdapterVersion, FinishReason


@dataclass(frozen=True)
class PolicyConfig:
    shapes: tuple[StepShape, ...]
    max_batch: int
    num_pages: int
    page_size: int
    max_pages_per_sequence: int
    num_slots: int
    vocab_size: int
    max_overtake_s: float
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Emission:
    """A token for a stream. ``finish_reason`` is set on the last; ``scores`` are the prompt's, with
    the first. No ``token``: only they were asked for."""

    sequence: Sequence
    token: int | None
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    scores: PromptScores | None = None


class StepResults(Protocol):
    """What the device chose, an entry per output of the plan."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def top_tokens(self) -> np.ndarray | None: ...
    @property
    def top_logprobs(self) -> np.ndarray | None: ...
    @property
    def scores(self) -> StepScores | None: ...


class Policy:
    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size)
        self.pins = PinBook(config.num_slots)
        self.shares = FairShares(config.tenant_weights)
        self.waiting = Waiting()
        self.running: list[Sequence] = []  # by order of arrival
        self.num_preemptions = 0
        self._decode_shapes = tuple(s for s in config.shapes if s.is_decode)
        self._extend_shapes = ExtendShapes(config.shapes, scores=False)
        self._scoring_shapes = ExtendShapes(config.shapes, scores=True)
        self._decode_capacity = max(s.num_tokens for s in self._decode_shapes)
        self._free_rows = list(range(config.max_batch - 1, -1, -1))
        self._page_tables = np.zeros((config.max_batch, config.max_pages_per_sequence), np.int32)
        self._builder = PlanBuilder(
            self._page_tables, config.page_size, config.num_slots, config.vocab_size
        )
        self._num_started: Counter[AdapterVersion] = Counter()  # whose slot stays until they end
        self._last_was_extend = False
        self._last_extend_scored = False
        self._num_added = 0

    # ---- entering and leaving

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._num_added
        self._num_added += 1
        self.shares.enter(sequence.tenant, sequence.version)
        self.waiting.add(sequence)

    def remove_over(self) -> list[Sequence]:
        """Takes out every sequence that ended or was cancelled; its pages and row are free."""
        over = [
            s
            for s in chain(self.running, self.waiting)
            if s.is_cancelled or s.finish_reason is not None  # is_over, for a thousand at a time
        ]
        if not over:
            return over
        self.waiting.remove([s for s in over if s.row is None])
        for sequence in over:
            self._leave(sequence)
        return over

    def _leave(self, sequence: Sequence) -> None:
        self.shares.leave(sequence.tenant, sequence.version)
        if sequence.row is not None:
            self._vacate(sequence)
        if sequence.is_started and sequence.version is not None:
            self._num_started[sequence.version] -= 1
            if not self._num_started[sequence.version]:
                del self._num_started[sequence.version]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    # ---- adapters

    def waiting_for(self, version: AdapterVersion) -> list[Sequence]:
        """Those that cannot start without it; a preempted one has it still."""
        return [s for line in self.waiting.lines_of(version) for s in line.sequences]

    def at_hand(self, version: AdapterVersion) -> None:
        """Its weights are in RAM or in the bank; from now on only a slot is waited for."""
        self.waiting.at_hand(version, True)

    def not_at_hand(self, version: AdapterVersion) -> None:
        """Its weights left the RAM before it got a slot; they are on their way again."""
        self.waiting.at_hand(version, False)

    def update_pins(self, now_s: float) -> PinChanges:
        """What to acquire and release."""
        return self.pins.update(self._wanted_versions(now_s))

    def _wanted_versions(self, now_s: float) -> Iterator[AdapterVersion]:
        """Whoever started keeps its slot; then in order: those at hand, those still to be loaded.

        So no slot waits for a disk while somebody could use it. Versions of started sequences are
        never more than the slots: each was pinned when its sequence started.
        """
        yield from self._num_started
        late = self._late(now_s)
        lines = [
            line
            for line in not_behind(late, self.waiting, self.shares)
            if line.version is not None and line.version not in self._num_started
        ]
        room = self.config.num_slots - len(self._num_started)
        at_hand = [line for line in lines if line.is_at_hand]
        yield from pin_order(at_hand, late, self.shares, self.pins, room)
        loading = [line for line in lines if not line.is_at_hand]
        yield from pin_order(loading, [], self.shares, self.pins, room)

    def _late(self, now_s: float) -> list[Line]:
        return late_lines(self.waiting, self.config.max_overtake_s, now_s)

    # ---- planning

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run. Extend and decode steps take turns.

        To be called when ``remove_over`` and ``update_pins`` have been.
        """
        if self._last_was_extend:
            plan = self._plan_decode() or self._plan_extend(now_s)
        else:
            plan = self._plan_extend(now_s) or self._plan_decode()
        if plan is not None:
            self._last_was_extend = not plan.shape.is_decode
        return plan

    def _plan_decode(self) -> StepPlan | None:
        chosen: list[Sequence] = []
        for sequence in list(self.running):
            if len(chosen) == self._decode_capacity:
                break
            if sequence.row is None or not sequence.can_decode:
                continue  # preempted in this very loop, or not its turn
            if self._grow(sequence):
                chosen.append(sequence)
        if not chosen or self._would_part(chosen):
            return None
        chunks = [Chunk(s, s.num_computed, 1, self._slot(s), True) for s in chosen]
        chunks.sort(key=lambda chunk: chunk.slot)
        shape = self._shape(self._decode_shapes, len(chunks), chunks)
        plan = self._builder.decode(shape, chunks)
        self._launch(chunks)
        return plan

    def _would_part(self, chosen: list[Sequence]) -> bool:
        """Whether these, who all draw under grammars, would take turns with others who do.

        No grammar knows its next mask before a step is read. Two groups whose steps follow each
        other would stay apart for ever, at two steps a token each; together they have a token a
        step, and the device waits for their masks. A free sequence's steps hide that wait.
        """
        return all(s.matcher is not None for s in chosen) and any(
            s.matcher is not None and s.is_decoding for s in self.running
        )

    def _plan_extend(self, now_s: float) -> StepPlan | None:
        batch = ExtendBatch(self._extend_shapes, self._scoring_shapes)
        admissions = Admissions(self.shares)
        for sequence in self._extend_candidates(now_s, admissions, batch):
            batch.add(sequence, self._slot(sequence))
        self.waiting.note_passed(admissions.passed(self.waiting, self.pins), now_s)
        chunks, shapes = batch.chosen(self._last_extend_scored)
        if not chunks:
            return None
        shape = self._shape(shapes.all, shapes.num_tokens(chunks), chunks)
        plan = self._builder.extend(shape, chunks)
        self._last_extend_scored = shape.scores
        self._launch(chunks)
        return plan

    def _extend_candidates(
        self, now_s: float, admissions: Admissions, batch: ExtendBatch
    ) -> Iterator[Sequence]:
        """Running sequences with prompt left, then waiting ones as they are admitted.

        Nobody passes a sequence that lacks a row or pages, or is preempted and has its last tokens
        still on the device; many pass one that lacks a slot, until it is overdue. One whose grammar
        has not said yet what comes after its last token holds up nobody.
        """
        yield from [s for s in self.running if s.needs_extend and s.may_draw]
        for sequence in list(self.waiting.preempted):
            if batch.is_full or sequence.num_in_flight or not self._admit(sequence):
                return
            if sequence.may_draw:
                yield sequence
        if batch.is_full or not self._free_rows or not self.waiting:
            return
        holds = self._holds(now_s)
        for line in in_turn(self._lines_with_slots(), self.shares):
            if holds.keeps(line, len(self._free_rows)):
                continue
            sequence = line.head
            if not batch.has_room_for(sequence):
                continue
            if not self._admit(sequence):
                return
            admissions.note(sequence)
            self.shares.charge(line.tenant, line.version, INPUT_WEIGHT * len(sequence.prompt))
            yield sequence
            if batch.is_full:
                return

    def _lines_with_slots(self) -> Iterator[Line]:
        for version in (None, *self.pins.ready_versions):
            yield from self.waiting.lines_of(version)

    def _holds(self, now_s: float) -> Holds:
        overdue = overdue_lines(self._late(now_s), self.pins)
        return Holds(overdue, self.shares, self.pins, self._tokens_left() if overdue else {})

    def _tokens_left(self) -> dict[AdapterVersion, int]:
        """Of each started adapter's sequence that has the most to go."""
        left: dict[AdapterVersion, int] = {}
        for sequence in chain(self.running, self.waiting.preempted):
            if sequence.version is not None:
                tokens = sequence.max_new_tokens - sequence.num_answer_planned
                left[sequence.version] = max(tokens, left.get(sequence.version, 0))
        return left

    def _admit(self, sequence: Sequence) -> bool:
        """A row, and pages for all known tokens and the next one; or nothing."""
        num_tokens = len(sequence.tokens)
        num_held = num_tokens + (sequence.max_new_tokens > 0)
        if not self._free_rows or not self.pool.grow(sequence.pages, num_held):
            return False
        self.waiting.take(sequence)
        sequence.row = self._free_rows.pop()
        sequence.num_prefill = num_tokens
        if sequence.version is not None and not sequence.is_started:
            self._num_started[sequence.version] += 1
        sequence.is_started = True
        self._enter_pages(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        return True

    def _shape(
        self, shapes: tuple[StepShape, ...], num_tokens: int, chunks: Many[Chunk]
    ) -> StepShape:
        shape = smallest(
            shapes,
            num_tokens,
            lora=max(self.pins.reach(c.sequence.version) for c in chunks),
            num_sequences=len(chunks),
        )
        assert shape is not None, (num_tokens, len(chunks), shapes)
        return shape

    def _slot(self, sequence: Sequence) -> int:
        if sequence.version is None:
            return self.config.num_slots
        slot = self.pins.slot(sequence.version)
        assert slot is not None, sequence.version
        return slot

    def _launch(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count
            chunk.sequence.num_in_flight += chunk.final

    # ---- pages

    def _grow(self, sequence: Sequence) -> bool:
        """A page for its next token, at the cost of later arrivals, or at last its own."""
        num_held = len(sequence.pages)
        while not self.pool.grow(sequence.pages, sequence.num_computed + 1):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if len(sequence.pages) > num_held:
            self._enter_pages(sequence)
        return True

    def _enter_pages(self, sequence: Sequence) -> None:
        self._page_tables[sequence.row, : len(sequence.pages)] = sequence.pages

    def _preempt(self, sequence: Sequence) -> None:
        """Loses its pages and computes its tokens anew later, before anybody new starts."""
        self.num_preemptions += 1
        self._vacate(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.pages)
        assert sequence.row is not None
        self._page_tables[sequence.row] = 0
        self._free_rows.append(sequence.row)
        sequence.leave_row()

    # ---- results

    def complete(self, plan: StepPlan, results: StepResults) -> list[Emission]:
        """Takes a step's outputs; what came for a sequence that is over is thrown away."""
        if results.scores is not None:
            _take_scores(plan, results.scores)
        emissions = []
        for i, sequence in enumerate(plan.outputs):
            sequence.num_in_flight -= 1
            if sequence.is_over:
                continue
            scores = sequence.scores if sequence.is_to_be_scored else None
            if sequence.max_new_tokens == 0:
                sequence.finish_reason = FinishReason.LENGTH
                emissions.append(Emission(sequence, None, 0.0, (), FinishReason.LENGTH, scores))
                continue
            token = int(results.tokens[i])
            sequence.accept(token)
            emissions.append(
                Emission(
                    sequence,
                    token,
                    float(results.logprobs[i]),
                    _alternatives(results, i, sequence.num_alternatives),
                    sequence.finish_reason,
                    scores,
                )
            )
        self._charge(emissions)
        return emissions

    def _charge(self, emissions: list[Emission]) -> None:
        """At once for those that stand together, as an adapter's do."""
        for (tenant, version), run in groupby(
            emissions, key=lambda e: (e.sequence.tenant, e.sequence.version)
        ):
            num_tokens = sum(emission.token is not None for emission in run)
            self.shares.charge(tenant, version, OUTPUT_WEIGHT * num_tokens)

    def check(self) -> None:
        """Asserts the books: pages, rows, slots, order, and that nobody is in two lists."""
        everyone = [*self.running, *self.waiting]
        assert len(set(map(id, everyone))) == len(everyone)
        self.pool.check([s.pages for s in everyone])
        rows = sorted([*self._free_rows, *(s.row for s in self.running if s.row is not None)])
        assert rows == list(range(self.config.max_batch)), rows
        assert all(not s.pages and s.row is None for s in self.waiting)
        tables = np.zeros_like(self._page_tables)
        for s in self.running:
            tables[s.row, : len(s.pages)] = s.pages
        assert np.array_equal(tables, self._page_tables)
        assert all(
            self.pins.slot(s.version) is not None
            for s in everyone
            if s.version is not None and s.is_started
        )
        assert self.running == sorted(self.running, key=lambda s: s.order)
        self.waiting.check()
        assert len(self.waiting) == len(list(self.waiting))
        assert self._num_started == Counter(
            s.version for s in everyone if s.version is not None and s.is_started
        )
        self.shares.check(Counter((s.tenant, s.version) for s in everyone))


def _take_scores(plan: StepPlan, scores: StepScores) -> None:
    for i, (chunk, first) in enumerate(plan.scored):
        if chunk.sequence.scores is not None and not chunk.sequence.is_over:
            chunk.sequence.scores.take(chunk.start, chunk.count, scores, first, i)


def _alternatives(results: StepResults, i: int, count: int) -> tuple[tuple[int, float], ...]:
    if not count or results.top_tokens is None or results.top_logprobs is None:
        return ()
    tokens, logprobs = results.top_tokens[i, :count], results.top_logprobs[i, :count]
    return tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True))
