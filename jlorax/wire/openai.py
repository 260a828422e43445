"""OpenAI's JSON for /v1/completions and /v1/chat/completions.

Decisions: an absent temperature is 1.0, as OpenAI documents it (LoRAX's completions are greedy
then); an absent max_tokens is the rest of the context, as LoRAX has it; stop strings are stripped;
top_k also takes -1 and 0 (off), as vLLM's clients send them; a seed is 0 .. 2^64 - 1, and the
samples of one prompt use seed, seed + 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlorax.types import FinishReason, GenerateRequest, GenerateResult, Token
from jlorax.wire.call import (
    MAX_TOP_LOGPROBS,
    Call,
    Limits,
    Presentation,
    parse_adapter_id,
    parse_adapter_source,
    parse_messages,
    parse_sampling,
    spread_seeds,
)
from jlorax.wire.fields import INT32_MAX, Fields, checked_token_ids
from jlorax.wire.strict_json import finite, kind_of
from jlorax.wire.unsupported import (
    refuse_best_of,
    refuse_format,
    refuse_tools,
    refuse_unsupported,
)

Prompt = str | tuple[int, ...]
TokenText = Callable[[int], str]

_FINISH = {
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",  # LoRAX says content_filter: clients read it as censored
    FinishReason.LENGTH: "length",
}


def parse_completion(body: Mapping[str, Any], limits: Limits) -> Call:
    fields = Fields(body)
    model = _parse_model(fields)
    top_logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    show = _parse_presentation(fields, logprobs=top_logprobs is not None)
    request = _parse_request(fields, model, limits, top_logprobs or 0)
    request = replace(request, prompt_logprobs=show.echo and show.logprobs)
    prompts = _parse_prompts(fields, limits)
    special = fields.flag("add_special_tokens", default=True)
    requests = _over(prompts, request, special)
    return _call(fields, requests, len(prompts), show, model, limits)


def parse_chat(body: Mapping[str, Any], limits: Limits) -> Call:
    fields = Fields(body)
    model = _parse_model(fields)
    logprobs = fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top_logprobs and not logprobs:
        raise fields.wrong("top_logprobs", "needs `logprobs` to be true")
    show = _parse_presentation(fields, logprobs=logprobs)
    request = _parse_request(fields, model, limits, top_logprobs or 0)
    _refuse_chat(fields)
    messages = parse_messages(fields, "messages")
    call = _call(fields, (request,), 1, show, model, limits)
    return replace(call, messages=messages)


def _parse_model(fields: Fields) -> str:
    model = fields.text("model")
    if model is None:
        raise fields.wrong("model", "must be a string: the base model's or an adapter's id")
    return model


def _parse_presentation(fields: Fields, logprobs: bool) -> Presentation:
    stream = fields.flag("stream")
    options = Fields(fields.mapping("stream_options") or {}, prefix="stream_options.")
    if fields.get("stream_options") is not None and not stream:
        raise fields.wrong("stream_options", "is only allowed when `stream` is true")
    return Presentation(
        stream=stream,
        echo=fields.flag("echo"),
        logprobs=logprobs,
        return_token_ids=fields.flag("return_token_ids"),
        include_usage=options.flag("include_usage"),
        continuous_usage=options.flag("continuous_usage_stats"),
    )


def _parse_request(
    fields: Fields, model: str, limits: Limits, num_top_logprobs: int
) -> GenerateRequest:
    _refuse(fields)
    adapter_id = parse_adapter_id(model, limits)
    return GenerateRequest(
        prompt="",
        adapter_id=adapter_id,
        adapter_source=parse_adapter_source(fields, adapter_id),
        sampling=parse_sampling(fields, temperature=1.0, top_k_off=-1),
        max_new_tokens=_parse_max_tokens(fields),
        stop=fields.stop(),
        stop_token_ids=fields.token_ids("stop_token_ids", limits.vocab_size),
        ignore_eos=fields.flag("ignore_eos") or fields.flag("ignore_eos_token"),
        include_stop_text=False,
        num_top_logprobs=num_top_logprobs,
    )


def _parse_max_tokens(fields: Fields) -> int | None:
    """``max_completion_tokens`` is the newer name; given both, they must agree."""
    old = fields.integer("max_tokens", 1, INT32_MAX)
    new = fields.integer("max_completion_tokens", 1, INT32_MAX)
    if old is not None and new is not None and old != new:
        raise fields.wrong("max_completion_tokens", f"is {new}, but `max_tokens` is {old}")
    return old if new is None else new


def _refuse(fields: Fields) -> None:
    """By name, never ignored; the values that ask for nothing pass."""
    refuse_unsupported(fields)
    refuse_tools(fields)
    refuse_best_of(fields)
    refuse_format(fields, "text")
    fields.refuse("suffix", "")
    fields.refuse("prompt_logprobs", 0)
    fields.refuse("include_stop_str_in_output", False)
    fields.refuse("truncate_prompt_tokens")
    fields.refuse("skip_special_tokens", True)
    fields.text("user", max_chars=4096)
    metadata = fields.mapping("metadata")
    if metadata is not None and len(metadata) > 64:
        raise fields.wrong("metadata", f"may have at most 64 keys, not {len(metadata)}")
    fields.text("api_token")


def _refuse_chat(fields: Fields) -> None:
    fields.refuse("modalities", ["text"])
    fields.refuse("reasoning_effort", "none")
    fields.refuse("add_special_tokens", False)  # the template writes them
    fields.refuse("add_generation_prompt", True)
    fields.refuse("continue_final_message", False)
    fields.refuse("chat_template_kwargs", {})
    fields.refuse("documents", [])
    for name in ("audio", "guideline", "tool_prompt", "chat_template", "prediction"):
        fields.refuse(name)
    fields.refuse("echo", False)


def _parse_prompts(fields: Fields, limits: Limits) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    prompt = fields.get("prompt")
    if prompt in ("", [], None):
        raise fields.wrong("prompt", "cannot be empty")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list):
        raise fields.wrong("prompt", f"must be a string or a list, not {kind_of(prompt)}")
    if isinstance(prompt[0], str | list):
        if len(prompt) > limits.max_prompts:
            raise fields.wrong(
                "prompt", f"may hold at most {limits.max_prompts} prompts, not {len(prompt)}"
            )
        return tuple(_parse_prompt(fields, prompt[0], item, limits) for item in prompt)
    return (checked_token_ids(fields, "prompt", prompt, limits.vocab_size),)


def _parse_prompt(fields: Fields, first: object, item: object, limits: Limits) -> Prompt:
    if type(item) is not type(first):
        raise fields.wrong("prompt", f"mixes {kind_of(first)} and {kind_of(item)}")
    if not item:
        raise fields.wrong("prompt", "holds an empty prompt")
    if isinstance(item, str):
        return item
    assert isinstance(item, list)
    return checked_token_ids(fields, "prompt", item, limits.vocab_size)


def _over(
    prompts: Sequence[Prompt], request: GenerateRequest, special: bool
) -> tuple[GenerateRequest, ...]:
    """``special``: whether text gets the tokenizer's special tokens; ids stay as they are."""
    return tuple(
        replace(request, prompt=prompt, add_special_tokens=special and isinstance(prompt, str))
        for prompt in prompts
    )


def _call(
    fields: Fields,
    requests: tuple[GenerateRequest, ...],
    num_prompts: int,
    show: Presentation,
    model: str,
    limits: Limits,
) -> Call:
    n = fields.integer("n", 1, limits.max_prompts) or 1
    if n * num_prompts > limits.max_prompts:
        raise fields.wrong(
            "n",
            f"is {n}: with {num_prompts} prompts that makes {n * num_prompts} answers, "
            f"but one call may ask for at most {limits.max_prompts}",
        )
    return Call(
        requests=tuple(sample for request in requests for sample in spread_seeds(request, n)),
        num_prompts=num_prompts,
        show=show,
        model=requests[0].adapter_id or limits.model_id,
        unknown_fields=fields.unknown(),
    )


# Answers.


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


def finish_word(result: GenerateResult | None) -> str | None:
    return None if result is None else _FINISH[result.finish_reason]


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
    index: int, result: GenerateResult, show: Presentation, token_text: TokenText
) -> dict[str, Any]:
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": result.text},
        "logprobs": chat_logprobs(result.tokens, token_text) if show.logprobs else None,
        "finish_reason": finish_word(result),
    }
    return choice | _ids(show, result.tokens, result)


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
    index: int, token: Token, show: Presentation, first: bool, token_text: TokenText
) -> dict[str, Any]:
    delta = {"role": "assistant"} if first else {}
    choice = {
        "index": index,
        "delta": delta | {"content": token.text},
        "logprobs": chat_logprobs((token,), token_text) if show.logprobs else None,
        "finish_reason": None,
    }
    return choice | _ids(show, (token,), None)


def chat_end(index: int, result: GenerateResult, show: Presentation) -> dict[str, Any]:
    choice = {
        "index": index,
        "delta": {},
        "logprobs": None,
        "finish_reason": finish_word(result),
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
    """With echo the prompt's tokens come first; their alternatives are not computed: null."""
    start = sum(len(token.text) for token in result.prompt_tokens)
    shown = completion_logprobs(result.tokens, start, token_text)
    offset = 0
    offsets = []
    for token in result.prompt_tokens:
        offsets.append(offset)
        offset += len(token.text)
    prompt = {
        "tokens": [token.text for token in result.prompt_tokens],
        "token_logprobs": [finite(token.logprob) for token in result.prompt_tokens],
        "top_logprobs": [None for _ in result.prompt_tokens],
        "text_offset": offsets,
    }
    return {name: prompt[name] + shown[name] for name in shown}


def _top(token: Token, token_text: TokenText) -> dict[str, float | None]:
    """The alternatives, and always the token itself: up to logprobs + 1 entries, as OpenAI's."""
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
