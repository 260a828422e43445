"""What a caller may say beside the prompt, the same for the clients and the embedded engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from jlorax.types import AdapterMerge, Constraint, GenerateRequest, SamplingParams
from jlorax.wire.constraints import only_one, parse_response_format
from jlorax.wire.fields import Fields

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class Options(TypedDict, total=False):
    """Everything of a GenerateRequest and its SamplingParams but the prompt, by the same names.

    ``response_format`` is a ``constraint`` in OpenAI's or LoRAX's words:
    ``{"type": "json_object"}``, ``{"type": "json_schema", "json_schema": {"name", "schema"}}``.
    ``logit_bias`` takes a mapping of token ids too.
    """

    adapter_id: str | None
    adapter_source: str | None
    merge: AdapterMerge | None
    adapter_scale: float
    max_new_tokens: int | None
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_text: bool
    truncate: int | None
    num_top_logprobs: int
    prompt_logprobs: bool
    constraint: Constraint | None
    response_format: Mapping[str, Any] | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None


_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)


def request_of(prompt: Prompt, options: Options) -> GenerateRequest:
    """Ranges are the server's to check. TypeError for an option that there is not."""
    given: dict[str, Any] = dict(options)
    unknown = given.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    sampling = {name: given.pop(name) for name in _SAMPLING & given.keys()}
    stop = given.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    given["logit_bias"] = _biases(given.get("logit_bias", ()))
    given["constraint"] = _constraint(given.get("constraint"), given.pop("response_format", None))
    return GenerateRequest(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        sampling=SamplingParams(**sampling),
        **given,
    )


def chat_options(options: Options) -> Options:
    """A chat's answer ends before its stop string, as OpenAI's does."""
    return {"include_stop_text": False, **options}


def _biases(
    given: Mapping[int, float] | Sequence[tuple[int, float]],
) -> tuple[tuple[int, float], ...]:
    return tuple(given.items() if isinstance(given, Mapping) else given)


def _constraint(
    given: Constraint | None, response_format: Mapping[str, Any] | None
) -> Constraint | None:
    fields = Fields({"response_format": response_format})
    return only_one({"constraint": given, "response_format": parse_response_format(fields)})
