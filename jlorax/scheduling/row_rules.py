"""What a row's next token may be, and what it favours: which rules a step needs, and which of them
the device still has to be told."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from jlorax.layout import BiasedTokens, RowWrites, mask_without
from jlorax.scheduling.sequence import Sequence

_MASKS_KEPT = 256


class RowRules:
    """A rule stays in a sequence's row until the row is another's: it is written when it differs
    from what the row holds. A sequence without rules costs nothing."""

    def __init__(self, vocab_size: int) -> None:
        self._all_but = lru_cache(_MASKS_KEPT)(
            lambda tokens: mask_without(tokens, vocab_size),
        )

    def fill(self, views: dict[str, np.ndarray], sequences: Iterable[Sequence]) -> RowWrites:
        """Names each output's rules in a step's arrays; gives what is to be written before it."""
        masks: list[tuple[int, np.ndarray]] = []
        biases: list[tuple[int, BiasedTokens]] = []
        for i, sequence in enumerate(sequences):
            if not sequence.has_rules:
                continue
            assert sequence.row is not None
            mask = self._mask(sequence)
            if mask is not None:
                views["mask_rows"][i] = sequence.row
                if mask is not sequence.written_mask:
                    masks.append((sequence.row, mask))
                    sequence.written_mask = mask
            if sequence.logit_bias:
                views["bias_rows"][i] = sequence.row
                if not sequence.is_bias_written:
                    biases.append((sequence.row, sequence.logit_bias))
                    sequence.is_bias_written = True
        return RowWrites(tuple(masks), tuple(biases))

    def _mask(self, sequence: Sequence) -> np.ndarray | None:
        """For the token that is drawn next; None: any.

        A grammar that allows nothing but a stop has the last word: there is no longer answer.
        """
        grammars = sequence.mask
        is_short = sequence.num_answer_planned < sequence.min_new_tokens
        if not is_short or not sequence.stop_token_ids:
            return grammars
        no_stop: np.ndarray = self._all_but(sequence.stop_token_ids)
        if grammars is None:
            return no_stop
        both: np.ndarray = grammars & no_stop
        return both if both.any() else grammars
