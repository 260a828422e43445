"""The other side of ``wire.native``: what jlorax's own client sends, and how it reads answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlorax.errors import InvalidParameter
from jlorax.types import (
    AdapterMerge,
    Constraint,
    ConstraintKind,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    PromptToken,
    Token,
    TokenAlternative,
)


@dataclass(frozen=True)
class TextPiece:
    """One token of a text, which it is in ``text[start:stop]``; special tokens are in none."""

    id: int
    text: str
    start: int
    stop: int


def render_request(
    request: GenerateRequest,
    messages: list[dict[str, str]] | None = None,
    best_of: int | None = None,
) -> dict[str, Any]:
    sampling = request.sampling
    parameters: dict[str, Any] = {
        **shared_fields(request),
        "adapter_id": request.adapter_id,
        "do_sample": sampling.temperature > 0,
        "top_k": sampling.top_k or None,
        "best_of": best_of,
        "max_new_tokens": request.max_new_tokens,
        "min_new_tokens": request.min_new_tokens,
        "ignore_eos_token": request.ignore_eos,
        "include_stop_text": request.include_stop_text,
        "truncate": request.truncate,
        "return_k_alternatives": request.num_top_logprobs or None,
        "decoder_input_details": request.prompt_logprobs,
        "details": True,
        "return_token_ids": True,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    return {"inputs": prompt if messages is None else messages, "parameters": given}


def shared_fields(request: GenerateRequest) -> dict[str, Any]:
    """What LoRAX's parameters and OpenAI's bodies call by the same names; None: not given."""
    sampling = request.sampling
    return {
        "adapter_source": request.adapter_source,
        "merged_adapters": None if request.merge is None else _merge_as_json(request.merge),
        "adapter_scale": None if request.adapter_scale == 1.0 else request.adapter_scale,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "structured_outputs": _constraint_as_json(request.constraint),
        "logit_bias": {str(token): bias for token, bias in request.logit_bias},
    }


def _merge_as_json(merge: AdapterMerge) -> dict[str, Any]:
    shown = {
        "ids": list(merge.adapter_ids),
        "weights": list(merge.weights),
        "merge_strategy": merge.strategy.value,
        "density": merge.density,
        "majority_sign_method": merge.majority_sign.value,
    }
    if merge.rank is not None:
        shown["rank"] = merge.rank
    if merge.seed:
        shown["seed"] = merge.seed
    return shown


_ASKED_AS = {
    ConstraintKind.JSON_SCHEMA: "json",
    ConstraintKind.REGEX: "regex",
    ConstraintKind.CHOICE: "choice",
    ConstraintKind.GRAMMAR: "grammar",
}


def _constraint_as_json(constraint: Constraint | None) -> dict[str, Any] | None:
    """As vLLM's structured_outputs, the one form that has a word for every kind."""
    if constraint is None:
        return None
    source: Any = constraint.source
    if constraint.kind is ConstraintKind.CHOICE:
        source = json.loads(source)
    if not source:  # a server reads it as "none"
        raise InvalidParameter("constraint", f"of the kind {constraint.kind.value} is empty")
    return {_ASKED_AS[constraint.kind]: source}


def read_result(body: Mapping[str, Any]) -> GenerateResult:
    """The answer; of several, the likeliest."""
    return _read_whole(body["details"], body["generated_text"])


def read_results(body: Mapping[str, Any]) -> list[GenerateResult]:
    """Every answer that ``best_of`` asked for, the likeliest first."""
    others = body["details"].get("best_of_sequences", ())
    return [read_result(body), *(_read_whole(o, o["generated_text"]) for o in others)]


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
        prompt_tokens=tuple(_read_prompt_token(token) for token in details.get("prefill", ())),
        **timings,
    )


def read_token(token: Mapping[str, Any]) -> Token:
    return Token(
        id=token["id"],
        text=token["text"],
        logprob=_logprob(token),
        special=token["special"],
        alternatives=_read_alternatives(token),
    )


def read_pieces(body: list[Mapping[str, Any]]) -> list[TextPiece]:
    """An answer of /tokenize."""
    return [TextPiece(p["id"], p["text"], p["start"], p["stop"]) for p in body]


def _read_whole(details: Mapping[str, Any], text: str) -> GenerateResult:
    return read_details(details, text, tuple(read_token(token) for token in details["tokens"]))


def _read_prompt_token(token: Mapping[str, Any]) -> PromptToken:
    return PromptToken(token["id"], token["text"], token["logprob"], _read_alternatives(token))


def _read_alternatives(token: Mapping[str, Any]) -> tuple[TokenAlternative, ...]:
    return tuple(
        TokenAlternative(a["id"], a["text"], _logprob(a))
        for a in token.get("alternative_tokens", ())
    )


def _logprob(token: Mapping[str, Any]) -> float:
    value = token["logprob"]
    return float("-inf") if value is None else float(value)
