"""LoRAX's own JSON: ``{"inputs", "parameters"}`` in, ``generated_text`` and ``details`` out.

A superset: ``inputs`` may also be token ids or chat messages, ``parameters`` also take min_p,
stop_token_ids, include_stop_text and return_token_ids (which adds what jlorax's client needs).
Sampling is LoRAX's: greedy unless ``do_sample`` or a warper (temperature other than 0 and 1,
top_k, top_p < 1, typical_p < 1, here also min_p) asks for a draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.types import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    PromptToken,
    SamplingParams,
    Token,
    TokenAlternative,
    TokenEvent,
)
from jlorax.wire.call import (
    MAX_TOP_LOGPROBS,
    Call,
    Limits,
    Message,
    Presentation,
    parse_adapter_id,
    parse_adapter_source,
    parse_messages,
    parse_sampling,
)
from jlorax.wire.fields import INT32_MAX, Fields, checked_token_ids
from jlorax.wire.strict_json import finite, kind_of
from jlorax.wire.unsupported import refuse_best_of, refuse_format, refuse_unsupported


def parse_native(body: Mapping[str, Any], limits: Limits, stream: bool | None = None) -> Call:
    """``stream`` fixed by the route, or None where the field decides (`/`, `/invocations`)."""
    outer = Fields(body)
    asked_stream = outer.flag("stream")
    parameters = Fields(outer.mapping("parameters") or {})
    show = _parse_presentation(parameters, asked_stream if stream is None else stream)
    call = _parse_inputs(outer, _parse_parameters(parameters, limits, show), show, limits)
    if parameters.flag("apply_chat_template"):
        call = _as_chat(call)
    _refuse_misplaced(outer, parameters)
    return replace(call, unknown_fields=outer.unknown() + parameters.unknown())


def _refuse_misplaced(outer: Fields, parameters: Fields) -> None:
    """A parameter beside `parameters` would do nothing, and nobody would notice."""
    for name in parameters.known():
        value = outer.get(name)
        if value is not False and value not in (None, "", [], {}):
            raise outer.wrong(name, f'belongs inside `parameters`: {{"{name}": ...}}')


def parse_tokenize(body: Mapping[str, Any]) -> tuple[str, bool]:
    fields = Fields(body)
    text = fields.text("inputs")
    if text is None:
        raise fields.wrong("inputs", "must be a string, not null")
    return text, fields.flag("add_special_tokens", default=True)


def _parse_presentation(fields: Fields, stream: bool) -> Presentation:
    prefill = fields.flag("decoder_input_details")
    if prefill and stream:
        raise fields.wrong(
            "decoder_input_details", "== true is not supported when streaming tokens"
        )
    return Presentation(
        stream=stream,
        details=fields.flag("details") or prefill,
        prefill=prefill,
        echo=fields.flag("return_full_text"),
        return_token_ids=fields.flag("return_token_ids"),
    )


def _parse_parameters(fields: Fields, limits: Limits, show: Presentation) -> GenerateRequest:
    _refuse_unsupported(fields)
    adapter_id = parse_adapter_id(fields.text("adapter_id"), limits)
    return GenerateRequest(
        prompt="",
        adapter_id=adapter_id,
        adapter_source=parse_adapter_source(fields, adapter_id),
        sampling=_parse_sampling(fields),
        max_new_tokens=fields.integer("max_new_tokens", 1, INT32_MAX),
        stop=fields.stop(),
        stop_token_ids=fields.token_ids("stop_token_ids", limits.vocab_size),
        ignore_eos=fields.flag("ignore_eos_token"),
        include_stop_text=fields.flag("include_stop_text", default=True),
        truncate=fields.integer("truncate", 1, INT32_MAX),
        num_top_logprobs=fields.integer("return_k_alternatives", 1, MAX_TOP_LOGPROBS) or 0,
        prompt_logprobs=show.prefill,
    )


def _refuse_unsupported(fields: Fields) -> None:
    if fields.get("merged_adapters") is not None and fields.get("adapter_id") is not None:
        raise InvalidParameter(
            "merged_adapters",
            "excludes `adapter_id`: at most one of `adapter_id` or `adapters` may be provided",
        )
    refuse_unsupported(fields)
    refuse_best_of(fields)
    refuse_format(fields, "text", "Text")
    fields.refuse("grammar")
    fields.refuse("top_n_tokens", 0)
    fields.text("api_token")  # for private hubs: local adapters need none


def _parse_sampling(fields: Fields) -> SamplingParams:
    do_sample = fields.flag("do_sample")
    sampling = parse_sampling(fields, temperature=1.0, top_k_off=1)
    warped = (
        sampling.temperature != 1.0
        or sampling.top_k > 0
        or sampling.top_p < 1.0
        or sampling.typical_p < 1.0
        or sampling.min_p > 0.0
    )
    return sampling if do_sample or warped else replace(sampling, temperature=0.0)


def _parse_inputs(
    fields: Fields, request: GenerateRequest, show: Presentation, limits: Limits
) -> Call:
    """Text; or, beyond LoRAX, a list of token ids or a list of chat messages."""
    inputs = fields.get("inputs")
    if inputs == "" or inputs == []:
        raise fields.wrong("inputs", "cannot be empty")
    model = request.adapter_id or limits.model_id
    if isinstance(inputs, str):
        return Call((replace(request, prompt=inputs),), show=show, model=model)
    if isinstance(inputs, list) and isinstance(inputs[0], dict):
        messages = parse_messages(fields, "inputs")
        return Call((request,), messages=messages, show=show, model=model)
    if isinstance(inputs, list):
        ids = checked_token_ids(fields, "inputs", inputs, limits.vocab_size)
        request = replace(request, prompt=ids, add_special_tokens=False)
        return Call((request,), show=show, model=model)
    raise fields.wrong("inputs", f"must be a string, not {kind_of(inputs)}")


def _as_chat(call: Call) -> Call:
    """``apply_chat_template``: the text is what the user says."""
    (request,) = call.requests
    if not isinstance(request.prompt, str) or call.messages is not None:
        raise InvalidParameter("apply_chat_template", "needs `inputs` to be a string")
    return replace(call, messages=(Message("user", request.prompt),))


def render_result(result: GenerateResult, show: Presentation, prompt_text: str) -> dict[str, Any]:
    """GenerateResponse; ``prompt_text`` is shown only with return_full_text."""
    text = prompt_text + result.text if show.echo else result.text
    if not show.details:
        return {"generated_text": text}
    details = _stream_details(result, show) | {
        "prefill": [_prefill(token) for token in result.prompt_tokens] if show.prefill else [],
        "tokens": [_token(token) for token in result.tokens],
    }
    return {"generated_text": text, "details": details}


def render_event(event: TokenEvent, show: Presentation, prompt_text: str) -> dict[str, Any]:
    """StreamResponse: all three keys always; text and details with the last one."""
    result = event.result
    text = None
    if result is not None:
        text = prompt_text + result.text if show.echo else result.text
    return {
        "token": _token(event.token),
        "generated_text": text,
        "details": _stream_details(result, show) if result and show.details else None,
    }


def _stream_details(result: GenerateResult, show: Presentation) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": result.finish_reason.value,
        "prompt_tokens": len(result.prompt_token_ids),
        "generated_tokens": len(result.tokens),
        "skipped_tokens": 0,
        "seed": result.seed,
    }
    if show.return_token_ids:
        details["prompt_token_ids"] = list(result.prompt_token_ids)
        details["timings"] = {
            "queue_s": result.queue_s,
            "time_to_first_token_s": result.time_to_first_token_s,
            "total_s": result.total_s,
        }
    return details


def _token(token: Token) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": token.id,
        "text": token.text,
        "logprob": finite(token.logprob),
        "special": token.special,
        "skipped": False,
    }
    if token.alternatives:
        shown["alternative_tokens"] = [
            {"id": a.id, "text": a.text, "logprob": finite(a.logprob)} for a in token.alternatives
        ]
    return shown


def _prefill(token: PromptToken) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": finite(token.logprob)}


# The way back: what jlorax's own client sends and reads.


def render_request(
    request: GenerateRequest, stream: bool, messages: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    sampling = request.sampling
    parameters: dict[str, Any] = {
        "adapter_id": request.adapter_id,
        "adapter_source": request.adapter_source,
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or None,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed,
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos_token": request.ignore_eos,
        "include_stop_text": request.include_stop_text,
        "truncate": request.truncate,
        "return_k_alternatives": request.num_top_logprobs or None,
        "decoder_input_details": request.prompt_logprobs and not stream,
        "details": True,
        "return_token_ids": True,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    return {"inputs": prompt if messages is None else messages, "parameters": given}


def read_result(body: Mapping[str, Any]) -> GenerateResult:
    details = body["details"]
    tokens = tuple(read_token(token) for token in details["tokens"])
    return read_details(details, body["generated_text"], tokens)


def read_details(
    details: Mapping[str, Any], text: str, tokens: tuple[Token, ...]
) -> GenerateResult:
    timings = details.get("timings", {})
    return GenerateResult(
        text=text,
        finish_reason=FinishReason(details["finish_reason"]),
        tokens=tokens,
        prompt_token_ids=tuple(details.get("prompt_token_ids", ())),
        seed=details.get("seed"),
        prompt_tokens=tuple(
            PromptToken(token["id"], token["text"], token["logprob"])
            for token in details.get("prefill", ())
        ),
        **timings,
    )


def read_token(token: Mapping[str, Any]) -> Token:
    return Token(
        id=token["id"],
        text=token["text"],
        logprob=_logprob(token),
        special=token["special"],
        alternatives=tuple(
            TokenAlternative(a["id"], a["text"], _logprob(a))
            for a in token.get("alternative_tokens", ())
        ),
    )


def _logprob(token: Mapping[str, Any]) -> float:
    value = token["logprob"]
    return float("-inf") if value is None else float(value)
