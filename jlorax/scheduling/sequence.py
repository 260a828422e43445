"""A request's token state in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlorax.layout import BiasedTokens
from jlorax.scheduling.prompt_scores import PromptScores
from jlorax.types import AdapterVersion, FinishReason, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One request, from admission to its end. The scheduler is its only writer.

    tokens:     [ prompt ................. | answer, as read so far ]
    prefill:    [ known at admission, so computed by extend steps )   num_prefill
    computed:   [ positions whose keys are in the pool, by launched steps )   num_computed
    in flight:  num_in_flight outputs are launched and not yet read; their tokens are on the device
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    version: AdapterVersion | None
    tenant: str = "default"  # whose share it takes; the version's is the adapter's owner
    num_alternatives: int = 0
    logit_bias: BiasedTokens = ()
    min_new_tokens: int = 0  # no stop token is drawn before so many
    matcher: Any = None  # of its grammar, the grammar actor's own; None: any text will do
    mask: np.ndarray | None = None  # i32[ceil(V / 32)]: what the grammar allows next, once known
    wants_prompt_logprobs: bool = False
    wants_embedding: bool = False
    stream: Any = None
    arrival_s: float = 0.0
    order: int = 0  # of arrival; the latest is preempted first
    is_started: bool = False  # was admitted once: it keeps its adapter's slot until it ends

    tokens: list[int] = field(default_factory=list)
    num_prefill: int = 0
    num_computed: int = 0
    num_in_flight: int = 0
    scores: PromptScores | None = None  # None: nobody wants any
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    written_mask: np.ndarray | None = None  # what its row on the device holds
    is_bias_written: bool = False
    finish_reason: FinishReason | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.has_rules = (
            self.matcher is not None or self.logit_bias != () or self.min_new_tokens > 0
        )
        if self.wants_prompt_logprobs or self.wants_embedding:
            self.scores = PromptScores(len(self.prompt), self.num_alternatives)

    @property
    def num_planned_tokens(self) -> int:
        """Length once everything in flight is read."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_answer_planned(self) -> int:
        return self.num_planned_tokens - len(self.prompt)

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.is_cancelled

    @property
    def needs_extend(self) -> bool:
        """Tokens known at admission are still to be computed."""
        return self.num_computed < self.num_prefill

    @property
    def is_decoding(self) -> bool:
        """A decode step that draws for it is in flight."""
        return self.num_in_flight > 0 and self.num_computed > self.num_prefill

    @property
    def is_to_be_scored(self) -> bool:
        """Its prompt is computed in scoring steps; once that is done, and lost, in any."""
        return self.scores is not None and len(self.tokens) == len(self.prompt)

    @property
    def may_draw(self) -> bool:
        """Its grammar has seen every token before the next and said what may come."""
        return self.matcher is None or (self.mask is not None and not self.num_in_flight)

    @property
    def can_decode(self) -> bool:
        """All but the newest token, which the device holds, is computed, and more are wanted."""
        return (
            not self.needs_extend
            and self.may_draw
            and self.num_computed == self.num_planned_tokens - 1
            and self.num_answer_planned < self.max_new_tokens
        )

    def leave_row(self) -> None:
        """What was written there is another's to overwrite."""
        self.row, self.written_mask, self.is_bias_written = None, None, False

    def accept(self, token: int) -> None:
        """Appends a token that the device chose, and notes whether it ends the answer."""
        self.tokens.append(token)
        self.mask = None
        if token in self.stop_token_ids:
            self.finish_reason = FinishReason.EOS_TOKEN
        elif len(self.tokens) - len(self.prompt) >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
