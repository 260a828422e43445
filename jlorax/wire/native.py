"""LoRAX's own JSON: ``{"inputs", "parameters"}`` in, ``generated_text`` and ``details`` out.

A superset: ``inputs`` may also be token ids or chat messages; ``parameters`` also take TGI's
grammar and top_n_tokens, vLLM's guided_* and structured_outputs, and min_p, stop_token_ids,
min_new_tokens, logit_bias, adapter_scale, include_stop_text and return_token_ids (which adds what
jlorax's client needs). Sampling is LoRAX's: greedy unless ``do_sample`` or a warper (temperature
other than 0 and 1, top_k, top_p < 1, typical_p < 1, here also min_p) asks for a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.types import (
    Constraint,
    EmbedRequest,
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
from jlorax.wire.constraints import (
    json_schema,
    only_one,
    parse_guided,
    parse_logit_bias,
    parse_response_format,
    regex,
)
from jlorax.wire.fields import INT32_MAX, MAX_TOKENIZED_CHARS, Fields, checked_token_ids
from jlorax.wire.merges import with_adapter
from jlorax.wire.strict_json import finite, kind_of
from jlorax.wire.unsupported import refuse_unsupported

IsSpecial = Callable[[int], bool]


def parse_native(body: Mapping[str, Any], limits: Limits, stream: bool | None = None) -> Call:
    """``stream`` fixed by the route, or None where the field decides (`/`, `/invocations`)."""
    outer = Fields(body)
    asked_stream = outer.flag("stream")
    parameters = Fields(outer.mapping("parameters") or {})
    show = _parse_presentation(parameters, asked_stream if stream is None else stream)
    request = _parse_parameters(parameters, limits, show)
    best_of = _parse_best_of(parameters, limits, request, show)
    call = _parse_inputs(outer, request, show, limits)
    if parameters.flag("apply_chat_template"):
        call = _as_chat(call)
    _refuse_misplaced(outer, parameters)
    return replace(
        call,
        requests=call.requests * best_of,
        num_best=best_of if best_of > 1 else None,
        unknown_fields=outer.unknown() + parameters.unknown(),
    )


def _refuse_misplaced(outer: Fields, parameters: Fields) -> None:
    """A parameter beside `parameters` would do nothing, and nobody would notice."""
    for name in parameters.known():
        value = outer.get(name)
        if value is not False and value not in (None, "", [], {}):
            raise outer.wrong(name, f'belongs inside `parameters`: {{"{name}": ...}}')


def parse_tokenize(body: Mapping[str, Any]) -> tuple[str, bool]:
    fields = Fields(body)
    return _parse_text(fields), fields.flag("add_special_tokens", default=True)


def parse_embed(body: Mapping[str, Any], limits: Limits) -> EmbedRequest:
    fields = Fields(body)
    parameters = Fields(fields.mapping("parameters") or {})
    parameters.refuse("merged_adapters")
    parameters.text("api_token")
    adapter_id = parse_adapter_id(parameters.text("adapter_id"), limits)
    request = EmbedRequest(
        prompt=_parse_text(fields),
        adapter_id=adapter_id,
        adapter_source=parse_adapter_source(parameters, adapter_id),
    )
    if not request.prompt:
        raise fields.wrong("inputs", "cannot be empty")
    _refuse_misplaced(fields, parameters)
    return request


def parse_classify(body: Mapping[str, Any]) -> str:
    return _parse_text(Fields(body))


def parse_classify_batch(body: Mapping[str, Any]) -> list[str]:
    fields = Fields(body)
    texts = fields.items("inputs")
    if texts is None:
        raise fields.wrong("inputs", "must be a list of strings, not null")
    for text in texts:
        if not isinstance(text, str):
            raise fields.wrong("inputs", f"must hold strings, not {kind_of(text)}")
    return texts


def _parse_text(fields: Fields) -> str:
    text = fields.text("inputs", max_chars=MAX_TOKENIZED_CHARS)
    if text is None:
        raise fields.wrong("inputs", "must be a string, not null")
    return text


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
        num_alternatives=fields.integer("return_k_alternatives", 1, MAX_TOP_LOGPROBS) or 0,
        num_top_tokens=fields.integer("top_n_tokens", 0, MAX_TOP_LOGPROBS) or 0,
        echo=fields.flag("return_full_text"),
        return_token_ids=fields.flag("return_token_ids"),
    )


def _parse_parameters(fields: Fields, limits: Limits, show: Presentation) -> GenerateRequest:
    refuse_unsupported(fields)
    fields.text("api_token")  # LoRAX's, for private adapters: here the server's own tokens are used
    request = GenerateRequest(
        prompt="",
        sampling=_parse_sampling(fields),
        max_new_tokens=fields.integer("max_new_tokens", 1, INT32_MAX),
        min_new_tokens=fields.integer("min_new_tokens", 0, INT32_MAX) or 0,
        stop=fields.stop(),
        stop_token_ids=fields.token_ids("stop_token_ids", limits.vocab_size),
        ignore_eos=fields.flag("ignore_eos_token"),
        include_stop_text=fields.flag("include_stop_text", default=True),
        truncate=fields.integer("truncate", 1, limits.max_input_tokens),
        num_top_logprobs=max(show.num_alternatives, show.num_top_tokens),
        prompt_logprobs=show.prefill,
        constraint=_parse_constraint(fields),
        logit_bias=parse_logit_bias(fields, limits.vocab_size),
    )
    _check_least(fields, request)
    adapter_id = parse_adapter_id(fields.text("adapter_id"), limits)
    return with_adapter(request, fields, adapter_id, limits)


def _check_least(fields: Fields, request: GenerateRequest) -> None:
    least, most = request.min_new_tokens, request.max_new_tokens
    if most is not None and least > most:
        raise fields.wrong("min_new_tokens", f"is {least}, but `max_new_tokens` is {most}")


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


def _parse_best_of(
    fields: Fields, limits: Limits, request: GenerateRequest, show: Presentation
) -> int:
    """How many answers are drawn, for the likeliest to be given first."""
    best_of = fields.integer("best_of", 1, limits.max_best_of) or 1
    if best_of == 1:
        return 1
    if show.stream:
        raise fields.wrong("best_of", "!= 1 is not supported when streaming tokens")
    if request.sampling.temperature == 0.0:
        raise fields.wrong("best_of", f"is {best_of}: you must use sampling when it is > 1")
    if request.sampling.seed is not None:
        raise fields.wrong("seed", f"must not be set when `best_of` > 1. Given: {best_of}")
    return best_of


def _parse_constraint(fields: Fields) -> Constraint | None:
    return only_one(
        {
            "response_format": parse_response_format(fields),
            "grammar": _parse_grammar(fields),
            **parse_guided(fields),
        }
    )


def _parse_grammar(fields: Fields) -> Constraint | None:
    """TGI's ``{"type": "json" | "regex" | "json_schema", "value": ...}``."""
    given = fields.mapping("grammar")
    if given is None:
        return None
    form = Fields(given, prefix="grammar.")
    match form.text("type", max_chars=64):
        case "json":
            found = json_schema(form, "value")
        case "regex":
            found = regex(form, "value")
        case "json_schema":
            named = Fields(form.mapping("value") or {}, prefix="grammar.value.")
            named.text("name", max_chars=64)
            found = json_schema(named, "schema")
        case kind:
            raise form.wrong("type", f"must be json, regex or json_schema. Given: {kind!r}")
    if found is None:
        raise form.wrong("value", "is missing: a JSON schema, or the text of a regex")
    return found


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


# Answers.


def render_answer(
    results: Sequence[GenerateResult], show: Presentation, prompt_text: str, is_special: IsSpecial
) -> dict[str, Any]:
    """GenerateResponse of the first of ``results``, the likeliest of ``best_of``; the others are in
    its details. ``prompt_text`` is shown only with return_full_text."""
    best, *others = results
    answer: dict[str, Any] = {"generated_text": _text(best, show, prompt_text)}
    if show.details:
        answer["details"] = _details(best, show, is_special)
    if show.details and others:
        answer["details"]["best_of_sequences"] = [
            {"generated_text": _text(other, show, prompt_text)} | _details(other, show, is_special)
            for other in others
        ]
    return answer


def render_event(
    event: TokenEvent, show: Presentation, prompt_text: str, is_special: IsSpecial
) -> dict[str, Any]:
    """StreamResponse: LoRAX's three keys always; text and details with the last one. ``index``
    counts from 1, as TGI's."""
    result = event.result
    shown = {
        "index": event.index + 1,
        "token": _token(event.token, show),
        "generated_text": None if result is None else _text(result, show, prompt_text),
        "details": _stream_details(result, show) if result and show.details else None,
    }
    if show.num_top_tokens:
        shown["top_tokens"] = _top_tokens(event.token, show, is_special)
    return shown


def _text(result: GenerateResult, show: Presentation, prompt_text: str) -> str:
    return prompt_text + result.text if show.echo else result.text


def _details(result: GenerateResult, show: Presentation, is_special: IsSpecial) -> dict[str, Any]:
    details = _result_details(result, show) | {
        "prefill": [_prefill(token, show) for token in result.prompt_tokens]
        if show.prefill
        else [],
        "tokens": [_token(token, show) for token in result.tokens],
    }
    if show.num_top_tokens:
        details["top_tokens"] = [_top_tokens(token, show, is_special) for token in result.tokens]
    return details


def _stream_details(result: GenerateResult, show: Presentation) -> dict[str, Any]:
    """``input_length`` is TGI's word for ``prompt_tokens``."""
    return _result_details(result, show) | {"input_length": len(result.prompt_token_ids)}


def _result_details(result: GenerateResult, show: Presentation) -> dict[str, Any]:
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


def _token(token: Token, show: Presentation) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": token.id,
        "text": token.text,
        "logprob": finite(token.logprob),
        "special": token.special,
        "skipped": False,
    }
    if show.num_alternatives:
        shown["alternative_tokens"] = _alternatives(token.alternatives[: show.num_alternatives])
    return shown


def _prefill(token: PromptToken, show: Presentation) -> dict[str, Any]:
    shown = {"id": token.id, "text": token.text, "logprob": finite(token.logprob)}
    if token.alternatives and show.num_alternatives:
        shown["alternative_tokens"] = _alternatives(token.alternatives[: show.num_alternatives])
    return shown


def _alternatives(alternatives: Sequence[TokenAlternative]) -> list[dict[str, Any]]:
    return [{"id": a.id, "text": a.text, "logprob": finite(a.logprob)} for a in alternatives]


def _top_tokens(token: Token, show: Presentation, is_special: IsSpecial) -> list[dict[str, Any]]:
    """TGI's alternatives, each as a token."""
    most_likely = _alternatives(token.alternatives[: show.num_top_tokens])
    return [shown | {"special": is_special(shown["id"])} for shown in most_likely]
