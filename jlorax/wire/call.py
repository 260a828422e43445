"""What a request body becomes: the engine's requests, and how the answer is to be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from jlorax.types import AdapterMerge, GenerateRequest, GenerateResult, SamplingParams
from jlorax.wire.fields import INT32_MAX, Fields, checked_adapter_id
from jlorax.wire.strict_json import MalformedBody, dumps, parse_object

MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 100.0
# softmax(logits / t) in float32 puts everything on the argmax long before this: call it greedy
# rather than divide by it.
GREEDY_BELOW = 1e-5
MAX_TOOL_CALLS = 128
# the last two are what TGI's clients send when nobody named a model
BASE_NAMES = frozenset({"", "base", "__base_model__", "tgi", "dummy"})

_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """What a parser must know of the server."""

    model_id: str
    vocab_size: int
    max_prompts: int
    max_best_of: int = 2
    max_input_tokens: int = INT32_MAX


@dataclass(frozen=True)
class Presentation:
    """How the answer is shown; the engine never sees this."""

    stream: bool = False
    details: bool = False
    prefill: bool = False  # native decoder_input_details
    num_alternatives: int = 0  # native return_k_alternatives
    num_top_tokens: int = 0  # native top_n_tokens
    echo: bool = False  # prompt in front of the answer (native return_full_text)
    logprobs: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made. ``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """``tool_calls`` are of an assistant's message, ``tool_call_id`` of a tool's answer."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it: arguments as an object, and only the keys that are given."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            found["name"] = self.name
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            found["tool_calls"] = [_call_to_template(call) for call in self.tool_calls]
        return found


def _call_to_template(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatOptions:
    """What a chat template gets beside the messages. ``tools`` are OpenAI's objects; ``variables``
    are the template's own, by name."""

    tools: tuple[Mapping[str, Any], ...] = ()
    documents: tuple[Mapping[str, Any], ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


class ToolMode(Enum):
    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may, must or must not call tools. ``name``: it must call that one."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    parallel: bool = True  # several calls in one answer


@dataclass(frozen=True)
class Call:
    """One HTTP call: a request per answer, prompts outermost: answer = prompt * samples + sample.

    With ``messages`` the prompts are empty until the server has applied the chat template.
    ``num_best``: so many of each prompt's answers are shown, those with the best mean
    log-probability; None: all of them.
    """

    requests: tuple[GenerateRequest, ...]
    num_prompts: int = 1
    messages: tuple[Message, ...] | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    num_best: int | None = None
    constraint_field: str | None = None  # which field the requests' constraint is from
    show: Presentation = field(default_factory=Presentation)
    model: str = ""  # as the answer names it
    unknown_fields: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """The requests of each prompt."""
        return len(self.requests) // self.num_prompts

    @property
    def prompts(self) -> tuple[GenerateRequest, ...]:
        """One request of each prompt."""
        return self.requests[:: self.num_samples]

    def shown(self, results: Sequence[GenerateResult]) -> list[GenerateResult]:
        """The answers that are shown, out of one for each request."""
        if self.num_best is None:
            return list(results)
        of_prompts = [
            sorted(results[start : start + self.num_samples], key=mean_logprob, reverse=True)
            for start in range(0, len(results), self.num_samples)
        ]
        return [result for group in of_prompts for result in group[: self.num_best]]

    def with_prompts(self, prompts: Sequence[str | tuple[int, ...]]) -> Call:
        """The same call over prompts that are tokenized already."""
        requests = (
            replace(request, prompt=prompts[index // self.num_samples], add_special_tokens=False)
            for index, request in enumerate(self.requests)
        )
        return replace(self, requests=tuple(requests), messages=None)


def mean_logprob(result: GenerateResult) -> float:
    """What ``best_of`` ranks by: of each token, so that long answers are not worse."""
    return sum(token.logprob for token in result.tokens) / max(1, len(result.tokens))


def parse_sampling(fields: Fields, *, temperature: float, top_k_off: int) -> SamplingParams:
    """The sampling fields that all routes share. ``top_k_off``: the least value; below 1 is off."""
    given = fields.number("temperature", 0.0, MAX_TEMPERATURE)
    heat = temperature if given is None else given
    return SamplingParams(
        temperature=0.0 if heat < GREEDY_BELOW else heat,
        top_k=max(0, fields.integer("top_k", top_k_off, INT32_MAX) or 0),
        top_p=_or(fields.number("top_p", 0.0, 1.0, above_low=True), 1.0),
        min_p=_or(fields.number("min_p", 0.0, 1.0), 0.0),
        typical_p=_or(fields.number("typical_p", 0.0, 1.0, above_low=True), 1.0),
        repetition_penalty=_or(fields.number("repetition_penalty", 0.01, 100.0), 1.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2.0, 2.0), 0.0),
        presence_penalty=_or(fields.number("presence_penalty", -2.0, 2.0), 0.0),
        seed=fields.integer("seed", 0, MAX_SEED),
    )


def parse_adapter_id(name: str | None, limits: Limits) -> str | None:
    """None for the base model, under any of its names; an InvalidAdapterId for an impossible id."""
    if name is None or name in BASE_NAMES or name == limits.model_id:
        return None
    return checked_adapter_id(name)


def parse_adapter_source(fields: Fields, adapter: str | AdapterMerge | None) -> str | None:
    """ "local", or None: the registered names. Without an adapter the source means nothing."""
    source = fields.text("adapter_source", max_chars=32)
    if source is None or adapter is None:
        return None
    if source.lower() != "local":
        raise fields.wrong(
            "adapter_source", f"may be 'local' or absent (a registered name), not {source!r}"
        )
    return "local"


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def parse_messages(fields: Fields, name: str, max_messages: int = 2048) -> tuple[Message, ...]:
    values = fields.items(name)
    if not values:
        raise fields.wrong(name, "must be a list with at least one message")
    if len(values) > max_messages:
        raise fields.wrong(name, f"may hold at most {max_messages} messages, not {len(values)}")
    return name_tool_messages(
        [_parse_message(fields, f"{name}[{i}]", value) for i, value in enumerate(values)]
    )


def name_tool_messages(messages: Iterable[Message]) -> tuple[Message, ...]:
    """A tool's answer names its function, as some templates need it: that of the call before it."""
    names: dict[str, str] = {}
    named = []
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        if message.tool_call_id is not None and message.name is None:
            message = replace(message, name=names.get(message.tool_call_id))
        named.append(message)
    return tuple(named)


def _parse_message(fields: Fields, place: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise fields.wrong(place, "must be an object with `role` and `content`")
    message = Fields(value, prefix=f"{place}.")
    role = message.text("role", max_chars=64)
    if role == "function":
        raise message.wrong("role", "'function' is OpenAI's old word: use the role 'tool'")
    if role not in _ROLES:
        raise message.wrong("role", f"must be one of {', '.join(_ROLES)}. Given: {role!r}")
    for unsupported in ("audio", "refusal"):
        message.refuse(unsupported)
    if message.get("function_call") is not None:
        raise message.wrong("function_call", "is OpenAI's old word: use `tool_calls`")
    calls = _parse_tool_calls(message, role)
    return Message(
        role=_ROLES[role],
        content="" if calls and message.get("content") is None else parse_content(message),
        name=message.text("name", max_chars=256),
        tool_calls=calls,
        tool_call_id=_parse_tool_call_id(message, role),
    )


def _parse_tool_calls(message: Fields, role: str) -> tuple[ToolCall, ...]:
    values = message.items("tool_calls") or []
    if values and role != "assistant":
        raise message.wrong("tool_calls", f"are of the role 'assistant', not {role!r}")
    if len(values) > MAX_TOOL_CALLS:
        raise message.wrong(
            "tool_calls", f"may hold at most {MAX_TOOL_CALLS} calls, not {len(values)}"
        )
    return tuple(
        _parse_tool_call(message, f"tool_calls[{i}]", value) for i, value in enumerate(values)
    )


def _parse_tool_call(message: Fields, place: str, value: object) -> ToolCall:
    fields = message.inside(place, value)
    if fields.get("type") not in (None, "function"):
        raise fields.wrong("type", f"must be 'function'. Given: {str(fields.get('type'))[:64]!r}")
    function = fields.inside("function", fields.get("function"))
    call_id = fields.text("id", max_chars=256)
    if not call_id:
        raise fields.wrong("id", "must be a string")
    return ToolCall(call_id, parse_function_name(function), parse_arguments(function))


def parse_function_name(fields: Fields) -> str:
    """As OpenAI allows it: 1 to 64 letters, digits, underscores, dashes."""
    name = fields.text("name", max_chars=64)
    if name is None or not _FUNCTION_NAME.fullmatch(name):
        raise fields.wrong("name", f"must be 1 to 64 of a-z, A-Z, 0-9, _ and -. Given: {name!r}")
    return name


def parse_arguments(fields: Fields) -> str:
    """A call's arguments: a JSON object as text; "" for none."""
    text = fields.text("arguments")
    if text is None:
        raise fields.wrong("arguments", "must be a string: a JSON object")
    try:
        return dumps(parse_object(text.encode())) if text.strip() else "{}"
    except MalformedBody as error:
        raise fields.wrong("arguments", f"must be the text of a JSON object: {error}") from None


def _parse_tool_call_id(message: Fields, role: str) -> str | None:
    call_id = message.text("tool_call_id", max_chars=256)
    if role == "tool" and not call_id:
        raise message.wrong("tool_call_id", "must say which call this answers")
    if role != "tool" and call_id is not None:
        raise message.wrong("tool_call_id", f"is of the role 'tool', not {role!r}")
    return call_id


def parse_content(message: Fields, kinds: Collection[str] = ("text",)) -> str:
    """A string, or a list of text parts, which are joined as they are."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise message.wrong("content", "must be a string or a list of text parts")
    return "".join(_parse_part(message, part, kinds) for part in content)


def _parse_part(message: Fields, part: object, kinds: Collection[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds or not isinstance(part, dict):
        raise message.wrong(
            "content",
            f"parts must have the type {' or '.join(map(repr, kinds))}; "
            f"{str(kind)[:32]!r} is not supported",
        )
    text = Fields(part, prefix="content part ").text("text")
    if text is None:
        raise message.wrong("content", "has a text part without `text`")
    return text


def spread_seeds(request: GenerateRequest, n: int) -> tuple[GenerateRequest, ...]:
    """``n`` samples of one prompt. A given seed s becomes s, s + 1, ...: else all were equal."""
    seed = request.sampling.seed
    if seed is None:
        return (request,) * n
    sampled = (replace(request.sampling, seed=(seed + k) % (MAX_SEED + 1)) for k in range(n))
    return tuple(replace(request, sampling=sampling) for sampling in sampled)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
