"""OpenAI's answers: completions and chat completions, whole and as chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jlorax.types import FinishReason, GenerateResult, PromptToken, Token
from jlorax.wire.call import Presentation, ToolCall
from jlorax.wire.strict_json import finite

TokenText = Callable[[int], str]

_FINISH = {
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",  # LoRAX says content_filter: clients read it as censored
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True)
class Envelope:
    """What every object of one answer repeats."""

    id: str
    created_s: int  # Unix time
    model: str
    fingerprint: str

    def around(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def finish_word(result: GenerateResult | None, has_called: bool = False) -> str | None:
    """A call that the length cut off is no call that could be made."""
    if result is None:
        return None
    word = _FINISH[result.finish_reason]
    return "tool_calls" if has_called and word == "stop" else word


def completion_choice(
    index: int, result: GenerateResult, show: Presentation, echo_text: str, token_text: TokenText
) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": echo_text + result.text,
        "logprobs": _result_logprobs(result, token_text) if show.logprobs else None,
        "finish_reason": finish_word(result),
    }
    return choice | _ids(show, result.tokens, result)


def chat_choice(
    index: int,
    result: GenerateResult,
    show: Presentation,
    content: str,
    calls: Sequence[ToolCall],
    token_text: TokenText,
) -> dict[str, Any]:
    """``content`` is what of the answer's text is in no call."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        shown = [_call(call.id, call.name, call.arguments) for call in calls]
        message = {"role": "assistant", "content": content or None, "tool_calls": shown}
    choice = {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(result.tokens, token_text) if show.logprobs else None,
        "finish_reason": finish_word(result, bool(calls)),
    }
    return choice | _ids(show, result.tokens, result)


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def call_begun(place: int, call_id: str, name: str) -> dict[str, Any]:
    """A delta: the answer's call number ``place`` begins; its arguments come in pieces."""
    return {"tool_calls": [{"index": place, **_call(call_id, name, "")}]}


def call_continued(place: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": place, "function": {"arguments": arguments}}]}


def completion_delta(
    index: int,
    token: Token,
    result: GenerateResult | None,
    show: Presentation,
    offset: int,
    token_text: TokenText,
) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": token.text,
        "logprobs": completion_logprobs((token,), offset, token_text) if show.logprobs else None,
        "finish_reason": finish_word(result),
    }
    return choice | _ids(show, (token,), result)


def echo_delta(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def chat_delta(
    index: int,
    delta: dict[str, Any],
    tokens: Sequence[Token],
    show: Presentation,
    token_text: TokenText,
) -> dict[str, Any]:
    """``tokens``: those whose details this chunk carries."""
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(tokens, token_text) if show.logprobs else None,
        "finish_reason": None,
    }
    return choice | _ids(show, tokens, None)


def chat_end(
    index: int, result: GenerateResult, show: Presentation, has_called: bool
) -> dict[str, Any]:
    choice = {
        "index": index,
        "delta": {},
        "logprobs": None,
        "finish_reason": finish_word(result, has_called),
    }
    return choice | _ids(show, (), result)


def completion_logprobs(
    tokens: Sequence[Token], offset: int, token_text: TokenText
) -> dict[str, Any]:
    """The legacy parallel lists; ``offset`` counts characters of the shown text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token_text(token.id) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(token, token_text) for token in tokens],
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Sequence[Token], token_text: TokenText) -> dict[str, Any]:
    content = [
        _chat_logprob(token_text(token.id), token.logprob)
        | {"top_logprobs": [_chat_logprob(a.text, a.logprob) for a in token.alternatives]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _result_logprobs(result: GenerateResult, token_text: TokenText) -> dict[str, Any]:
    """With echo the prompt's tokens come first; of the very first nothing is known: null."""
    start = sum(len(token.text) for token in result.prompt_tokens)
    shown = completion_logprobs(result.tokens, start, token_text)
    offset = 0
    offsets = []
    for token in result.prompt_tokens:
        offsets.append(offset)
        offset += len(token.text)
    prompt = {
        "tokens": [token_text(token.id) for token in result.prompt_tokens],
        "token_logprobs": [finite(token.logprob) for token in result.prompt_tokens],
        "top_logprobs": [_top(token, token_text) for token in result.prompt_tokens],
        "text_offset": offsets,
    }
    return {name: prompt[name] + shown[name] for name in shown}


def _top(token: Token | PromptToken, token_text: TokenText) -> dict[str, float | None] | None:
    """The alternatives, and always the token itself: up to logprobs + 1 entries, as OpenAI's."""
    if token.logprob is None:
        return None
    chosen = {token_text(token.id): finite(token.logprob)}
    return {a.text: finite(a.logprob) for a in token.alternatives} | chosen


def _chat_logprob(text: str, logprob: float) -> dict[str, Any]:
    # OpenAI's type says a number: -9999.0 is its own word for "practically never".
    shown = finite(logprob)
    return {
        "token": text,
        "logprob": -9999.0 if shown is None else shown,
        "bytes": list(text.encode("utf-8", "replace")),
    }


def _ids(
    show: Presentation, tokens: Sequence[Token], result: GenerateResult | None
) -> dict[str, Any]:
    """vLLM's extension: the ids of what is shown, and of the prompt once they are known."""
    if not show.return_token_ids:
        return {}
    ids: dict[str, Any] = {"token_ids": [token.id for token in tokens]}
    if result is not None:
        ids["prompt_token_ids"] = list(result.prompt_token_ids)
    return ids
