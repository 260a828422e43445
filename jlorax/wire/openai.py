"""OpenAI's requests: the bodies of /v1/completions and /v1/chat/completions.

Decisions: an absent temperature is 1.0, as OpenAI documents it (LoRAX's completions are greedy
then); an absent max_tokens is the rest of the context, as LoRAX has it; stop strings are stripped
unless vLLM's include_stop_str_in_output asks for them; top_k also takes -1 and 0 (off), as vLLM's
clients send them; a seed is 0 .. 2^64 - 1, and the samples of one prompt use seed, seed + 1, ...;
what OpenAI would store (``store``, ``metadata``) or bill by is read and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jlorax.types import Constraint, GenerateRequest
from jlorax.wire.call import (
    MAX_TOP_LOGPROBS,
    Call,
    ChatOptions,
    Limits,
    Presentation,
    parse_adapter_id,
    parse_messages,
    parse_sampling,
    spread_seeds,
)
from jlorax.wire.constraints import parse_constraint, parse_logit_bias
from jlorax.wire.fields import INT32_MAX, Fields, checked_token_ids
from jlorax.wire.merges import with_adapter
from jlorax.wire.strict_json import kind_of
from jlorax.wire.tools import parse_tool_choice, parse_tools
from jlorax.wire.unsupported import refuse_best_of, refuse_unsupported_v1

MAX_DOCUMENTS = 256
MAX_METADATA_KEYS = 64
MAX_NAME_CHARS = 4096

Prompt = str | tuple[int, ...]


def parse_completion(body: Mapping[str, Any], limits: Limits) -> Call:
    fields = Fields(body)
    model = parse_model(fields)
    num_top_logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    show = _parse_presentation(fields, num_top_logprobs is not None)
    if show.echo and show.logprobs and show.stream:
        raise fields.wrong("echo", "with `logprobs` is not supported when `stream` is true")
    _refuse_chat_fields(fields)
    constrained_by, constraint = parse_constraint(fields)
    request = parse_request(fields, model, limits, num_top_logprobs or 0, constraint)
    request = replace(request, prompt_logprobs=show.echo and show.logprobs)
    prompts = parse_prompts(fields, "prompt", limits)
    special = fields.flag("add_special_tokens", default=True)
    requests = tuple(over_prompt(request, prompt, special) for prompt in prompts)
    n, best_of = _parse_samples(fields, len(prompts), show.stream, limits)
    call = Call(
        requests=tuple(sample for request in requests for sample in spread_seeds(request, best_of)),
        num_prompts=len(prompts),
        num_best=n if best_of > n else None,
        constraint_field=constrained_by,
        show=show,
        model=answer_model(request, limits),
    )
    return replace(call, unknown_fields=fields.unknown())


def parse_chat(body: Mapping[str, Any], limits: Limits) -> Call:
    fields = Fields(body)
    model = parse_model(fields)
    logprobs = fields.flag("logprobs")
    num_top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if num_top_logprobs and not logprobs:
        raise fields.wrong("top_logprobs", "needs `logprobs` to be true")
    show = _parse_presentation(fields, logprobs)
    _refuse_completion_fields(fields)
    constrained_by, constraint = parse_constraint(fields)
    request = parse_request(fields, model, limits, num_top_logprobs or 0, constraint)
    n = fields.integer("n", 1, limits.max_prompts) or 1
    tools = parse_tools(fields)
    call = Call(
        requests=spread_seeds(request, n),
        messages=parse_messages(fields, "messages"),
        chat=replace(parse_chat_options(fields), tools=tools),
        tool_choice=parse_tool_choice(fields, tools),
        constraint_field=constrained_by,
        show=show,
        model=answer_model(request, limits),
    )
    return replace(call, unknown_fields=fields.unknown())


def parse_model(fields: Fields) -> str:
    model = fields.text("model")
    if model is None:
        raise fields.wrong("model", "must be a string: the base model's or an adapter's id")
    return model


def answer_model(request: GenerateRequest, limits: Limits) -> str:
    """As the answer names it; a merge has no name of its own."""
    return request.adapter_id or limits.model_id


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


def parse_request(
    fields: Fields,
    model: str,
    limits: Limits,
    num_top_logprobs: int,
    constraint: Constraint | None,
    lengths: Sequence[str] = ("max_tokens", "max_completion_tokens"),
) -> GenerateRequest:
    """What all the routes share. ``lengths`` are the names of the most tokens that may come."""
    refuse_unsupported_v1(fields)
    read_without_effect(fields)
    max_new_tokens = _parse_max_tokens(fields, lengths)
    request = GenerateRequest(
        prompt="",
        sampling=parse_sampling(fields, temperature=1.0, top_k_off=-1),
        max_new_tokens=max_new_tokens,
        min_new_tokens=_parse_min_tokens(fields, max_new_tokens),
        stop=fields.stop(),
        stop_token_ids=fields.token_ids("stop_token_ids", limits.vocab_size),
        ignore_eos=fields.flag("ignore_eos") or fields.flag("ignore_eos_token"),
        include_stop_text=fields.flag("include_stop_str_in_output"),
        num_top_logprobs=num_top_logprobs,
        constraint=constraint,
        logit_bias=parse_logit_bias(fields, limits.vocab_size),
    )
    return with_adapter(request, fields, parse_adapter_id(model, limits), limits)


def _parse_max_tokens(fields: Fields, names: Sequence[str]) -> int | None:
    """Those that are given must agree."""
    given = [(name, fields.integer(name, 1, INT32_MAX)) for name in names]
    found = [(name, value) for name, value in given if value is not None]
    if not found:
        return None
    (first, most), *others = found
    for name, value in others:
        if value != most:
            raise fields.wrong(name, f"is {value}, but `{first}` is {most}")
    return most


def _parse_min_tokens(fields: Fields, max_new_tokens: int | None) -> int:
    least = fields.integer("min_tokens", 0, INT32_MAX) or 0
    if max_new_tokens is not None and least > max_new_tokens:
        raise fields.wrong("min_tokens", f"is {least}, but at most {max_new_tokens} may come")
    return least


def _parse_samples(
    fields: Fields, num_prompts: int, stream: bool, limits: Limits
) -> tuple[int, int]:
    """``n`` and ``best_of``: so many answers are shown of so many that are made of each prompt."""
    n = fields.integer("n", 1, limits.max_prompts) or 1
    best_of = fields.integer("best_of", 1, limits.max_prompts) or n
    if best_of < n:
        raise fields.wrong("best_of", f"is {best_of}, but `n` is {n}: it must be at least that")
    if best_of > n and stream:
        raise fields.wrong("best_of", f"is {best_of}: above `n` it is not supported when streaming")
    if best_of * num_prompts > limits.max_prompts:
        raise fields.wrong(
            "n" if best_of == n else "best_of",
            f"is {best_of}: with {num_prompts} prompts that makes {best_of * num_prompts} answers, "
            f"but one call may ask for at most {limits.max_prompts}",
        )
    return n, best_of


def read_without_effect(fields: Fields) -> None:
    """What OpenAI keeps, bills or routes by: nothing is stored here, whatever ``store`` says."""
    for name in ("user", "prompt_cache_key", "safety_identifier", "api_token"):
        fields.text(name, max_chars=MAX_NAME_CHARS)
    fields.flag("store")
    fields.refuse("service_tier", "auto", "default")
    fields.refuse("verbosity", "medium")
    metadata = fields.mapping("metadata")
    if metadata is not None and len(metadata) > MAX_METADATA_KEYS:
        raise fields.wrong(
            "metadata", f"may have at most {MAX_METADATA_KEYS} keys, not {len(metadata)}"
        )


def _refuse_chat_fields(fields: Fields) -> None:
    """What only a chat can have."""
    fields.refuse("tools", [])
    fields.refuse("functions", [])
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("function_call", "none", "auto")


def _refuse_completion_fields(fields: Fields) -> None:
    """What only a completion can have, or LoRAX's chat; ``chat_template`` would run as code."""
    refuse_best_of(fields)
    fields.refuse("add_special_tokens", False)  # the template writes them
    fields.refuse("echo", False)
    for name in ("guideline", "tool_prompt", "chat_template"):
        fields.refuse(name)


def parse_chat_options(fields: Fields) -> ChatOptions:
    """What a chat template gets beside the messages."""
    continued = fields.flag("continue_final_message")
    generation = fields.flag("add_generation_prompt", default=not continued)
    if continued and generation:
        raise fields.wrong("continue_final_message", "excludes `add_generation_prompt`")
    return ChatOptions(
        documents=_parse_documents(fields),
        add_generation_prompt=generation,
        continue_final_message=continued,
        variables=fields.mapping("chat_template_kwargs") or {},
    )


def _parse_documents(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    values = fields.items("documents") or []
    if len(values) > MAX_DOCUMENTS:
        raise fields.wrong(
            "documents", f"may hold at most {MAX_DOCUMENTS} documents, not {len(values)}"
        )
    for value in values:
        if not isinstance(value, dict):
            raise fields.wrong("documents", f"must hold objects, not {kind_of(value)}")
    return tuple(values)


def parse_prompts(fields: Fields, name: str, limits: Limits) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    prompt = fields.get(name)
    if prompt in ("", [], None):
        raise fields.wrong(name, "cannot be empty")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list):
        raise fields.wrong(name, f"must be a string or a list, not {kind_of(prompt)}")
    if isinstance(prompt[0], str | list):
        if len(prompt) > limits.max_prompts:
            raise fields.wrong(
                name, f"may hold at most {limits.max_prompts} prompts, not {len(prompt)}"
            )
        return tuple(_parse_prompt(fields, name, prompt[0], item, limits) for item in prompt)
    return (checked_token_ids(fields, name, prompt, limits.vocab_size),)


def _parse_prompt(fields: Fields, name: str, first: object, item: object, limits: Limits) -> Prompt:
    if type(item) is not type(first):
        raise fields.wrong(name, f"mixes {kind_of(first)} and {kind_of(item)}")
    if not item:
        raise fields.wrong(name, "holds an empty prompt")
    if isinstance(item, str):
        return item
    assert isinstance(item, list)
    return checked_token_ids(fields, name, item, limits.vocab_size)


def over_prompt(request: GenerateRequest, prompt: Prompt, special: bool) -> GenerateRequest:
    """``special``: whether text gets the tokenizer's special tokens; ids stay as they are."""
    return replace(request, prompt=prompt, add_special_tokens=special and isinstance(prompt, str))
