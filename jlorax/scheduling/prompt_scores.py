"""What scoring steps find of one prompt, put together from its chunks."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class StepScores(Protocol):
    """Of a step's T tokens and C chunks; A alternatives a token."""

    @property
    def logprobs(self) -> np.ndarray: ...  # f32[T]
    @property
    def top_tokens(self) -> np.ndarray: ...  # i32[T, A]
    @property
    def top_logprobs(self) -> np.ndarray: ...  # f32[T, A]
    @property
    def hidden_sums(self) -> np.ndarray: ...  # f32[C, D]


class PromptScores:
    """Chunks come in their order; of one that is computed again the later result counts.

    Entry i of the arrays is about token i + 1: nothing comes before token 0.
    """

    def __init__(self, num_tokens: int, num_alternatives: int) -> None:
        self.num_tokens = num_tokens
        self.logprobs = np.zeros(num_tokens - 1, np.float32)
        self.top_tokens = np.zeros((num_tokens - 1, num_alternatives), np.int32)
        self.top_logprobs = np.zeros((num_tokens - 1, num_alternatives), np.float32)
        self._hidden_sum: np.ndarray = np.zeros(0, np.float32)

    def take(self, start: int, count: int, scores: StepScores, first: int, chunk: int) -> None:
        """Tokens start .. start + count of the prompt, which were ``first`` .. of the step."""
        ours = slice(start, min(start + count, self.num_tokens - 1))
        theirs = slice(first, first + ours.stop - ours.start)
        width = self.top_tokens.shape[1]
        self.logprobs[ours] = scores.logprobs[theirs]
        self.top_tokens[ours] = scores.top_tokens[theirs, :width]
        self.top_logprobs[ours] = scores.top_logprobs[theirs, :width]
        before = self._hidden_sum if start else np.zeros(scores.hidden_sums.shape[1], np.float32)
        self._hidden_sum = before + scores.hidden_sums[chunk]

    @property
    def mean_hidden(self) -> np.ndarray:
        """f32[D]: of the final hidden states of all its tokens."""
        return self._hidden_sum / np.float32(self.num_tokens)
