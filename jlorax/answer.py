"""One request's answer as it grows: ids to text, stop strings, times, and its prompt's scores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

from jlorax.actors.stream import Opened, StreamToken
from jlorax.metrics import Metrics
from jlorax.scheduling.prompt_scores import PromptScores
from jlorax.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from jlorax.types import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    PromptToken,
    Token,
    TokenAlternative,
    TokenEvent,
)


class Answer:
    """One request's answer as it grows: ids to text, stop strings, times. A ``reason`` ends it."""

    def __init__(
        self, tokenizer: Tokenizer, metrics: Metrics, request: GenerateRequest, opened: Opened
    ) -> None:
        self.reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._opened = opened
        self._is_sampled = request.sampling.temperature > 0
        self._text = _answer_text(tokenizer, request, opened.prompt)
        self._tokens: list[Token] = []
        self._prompt_tokens: tuple[PromptToken, ...] = ()
        self._first_token_s = 0.0

    async def take_prompt(self, scores: PromptScores) -> None:
        """On a thread: twenty alternatives for each of a thousand tokens are as many decodes."""
        self._prompt_tokens = await asyncio.to_thread(self._scored_prompt, scores)

    def _scored_prompt(self, scores: PromptScores) -> tuple[PromptToken, ...]:
        first, *rest = self._opened.prompt
        text = self._tokenizer.token_text

        def pairs(ids: list[int], logprobs: list[float]) -> tuple[TokenAlternative, ...]:
            return self._alternatives(zip(ids, logprobs, strict=True))

        lines = zip(
            scores.logprobs.tolist(),
            scores.top_tokens.tolist(),
            scores.top_logprobs.tolist(),
            strict=True,
        )
        scored = [
            PromptToken(token, text(token), logprob, pairs(best, of_best))
            for token, (logprob, best, of_best) in zip(rest, lines, strict=True)
        ]
        return (PromptToken(first, text(first), None), *scored)

    def take(self, item: StreamToken) -> TokenEvent:
        """The next event; with the last token it carries the result."""
        if not self._tokens:
            self._first_token_s = self._elapsed_s()
            self._metrics.first_token(self._first_token_s)
        self.reason = item.finish_reason
        text = ""
        if self._text is not None:
            text = self._text.push(item.token, is_last=self.reason is not None)
            if self._text.is_stopped:
                self.reason = FinishReason.STOP_SEQUENCE
        token = self._token(item, text)
        self._tokens.append(token)
        result = None if self.reason is None else self._result(self.reason)
        return TokenEvent(token, len(self._tokens) - 1, result)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._opened.queue_start_s

    def _token(self, item: StreamToken, text: str) -> Token:
        return Token(
            id=item.token,
            text=text,
            logprob=item.logprob,
            special=self._tokenizer.is_special(item.token),
            alternatives=self._alternatives(item.alternatives) if item.alternatives else (),
        )

    def _alternatives(
        self, alternatives: Iterable[tuple[int, float]]
    ) -> tuple[TokenAlternative, ...]:
        text = self._tokenizer.token_text
        return tuple(TokenAlternative(i, text(i), logprob) for i, logprob in alternatives)

    def _result(self, reason: FinishReason) -> GenerateResult:
        prompt, total_s = self._opened.prompt, self._elapsed_s()
        self._metrics.finished(reason, len(prompt), len(self._tokens), total_s)
        return GenerateResult(
            text="".join(token.text for token in self._tokens),
            finish_reason=reason,
            tokens=tuple(self._tokens),
            prompt_token_ids=prompt,
            prompt_tokens=self._prompt_tokens,
            seed=self._opened.seed if self._is_sampled else None,
            time_to_first_token_s=self._first_token_s,
            total_s=total_s,
        )


def _answer_text(
    tokenizer: Tokenizer, request: GenerateRequest, prompt: tuple[int, ...]
) -> _AnswerText | None:
    """None for a request that wants token ids alone."""
    if not request.detokenize:
        return None
    matcher = StopMatcher(request.stop, request.include_stop_text)
    return _AnswerText(IncrementalDetokenizer(tokenizer, prompt), matcher)


@dataclass
class _AnswerText:
    """The answer's text as it becomes final, cut at the first stop string."""

    detokenizer: IncrementalDetokenizer
    matcher: StopMatcher

    @property
    def is_stopped(self) -> bool:
        return self.matcher.matched is not None

    def push(self, token: int, *, is_last: bool) -> str:
        text = self.matcher.push(self.detokenizer.push(token))
        if is_last and not self.is_stopped:
            text += self.matcher.push(self.detokenizer.finish())
            text += self.matcher.finish()
        return text
