"""What a request body becomes: the engine's requests, and how the answer is to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jlorax.types import GenerateRequest, SamplingParams
from jlorax.wire.fields import INT32_MAX, Fields, checked_adapter_id

MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 100.0
# softmax(logits / t) in float32 puts everything on the argmax long before this: call it greedy
# rather than divide by it.
GREEDY_BELOW = 1e-5
BASE_NAMES = frozenset({"", "base", "__base_model__"})


@dataclass(frozen=True)
class Limits:
    """What a parser must know of the server."""

    model_id: str
    vocab_size: int
    max_prompts: int


@dataclass(frozen=True)
class Presentation:
    """How the answer is shown; the engine never sees this."""

    stream: bool = False
    details: bool = False
    prefill: bool = False  # native decoder_input_details
    echo: bool = False  # prompt in front of the answer (native return_full_text)
    logprobs: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    name: str | None = None

    def to_template(self) -> dict[str, str]:
        """As chat templates read it."""
        found = {"role": self.role, "content": self.content}
        return found if self.name is None else found | {"name": self.name}


@dataclass(frozen=True)
class Call:
    """One HTTP call: a request per choice, prompts outermost, so choice = prompt * n + sample.

    With ``messages`` the prompts are empty until the server has applied the chat template.
    """

    requests: tuple[GenerateRequest, ...]
    num_prompts: int = 1
    messages: tuple[Message, ...] | None = None
    show: Presentation = field(default_factory=Presentation)
    model: str = ""  # as the answer names it
    unknown_fields: tuple[str, ...] = ()

    def with_prompts(self, prompts: Sequence[str | tuple[int, ...]]) -> Call:
        """The same call over prompts that are tokenized already."""
        n = len(self.requests) // self.num_prompts
        requests = (
            replace(request, prompt=prompts[index // n], add_special_tokens=False)
            for index, request in enumerate(self.requests)
        )
        return replace(self, requests=tuple(requests), messages=None)


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


def parse_adapter_source(fields: Fields, adapter_id: str | None) -> str | None:
    """ "local", or None: the registered names. Without an adapter the source means nothing."""
    source = fields.text("adapter_source", max_chars=32)
    if source is None or adapter_id is None:
        return None
    if source.lower() != "local":
        raise fields.wrong(
            "adapter_source", f"may be 'local' or absent (a registered name), not {source!r}"
        )
    return "local"


def parse_messages(fields: Fields, name: str, max_messages: int = 2048) -> tuple[Message, ...]:
    values = fields.items(name)
    if not values:
        raise fields.wrong(name, "must be a list with at least one message")
    if len(values) > max_messages:
        raise fields.wrong(name, f"may hold at most {max_messages} messages, not {len(values)}")
    return tuple(_parse_message(fields, f"{name}[{i}]", value) for i, value in enumerate(values))


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _parse_message(fields: Fields, place: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise fields.wrong(place, "must be an object with `role` and `content`")
    message = Fields(value, prefix=f"{place}.")
    role = message.text("role", max_chars=64)
    if role in ("tool", "function"):
        raise message.wrong("role", f"{role!r} is not supported by this server")
    if role not in _ROLES:
        raise message.wrong("role", f"must be one of {', '.join(_ROLES)}. Given: {role!r}")
    for unsupported in ("tool_calls", "function_call", "audio"):
        message.refuse(unsupported, [])
    content = _parse_content(message)
    return Message(_ROLES[role], content, message.text("name", max_chars=256))


def _parse_content(message: Fields) -> str:
    """A string, or a list of text parts, which are joined as they are."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise message.wrong("content", "must be a string or a list of text parts")
    return "".join(_parse_part(message, part) for part in content)


def _parse_part(message: Fields, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise message.wrong(
            "content", f"parts must have the type 'text'; {str(kind)[:32]!r} is not supported"
        )
    text = Fields(part, prefix="content part ").text("text") if isinstance(part, dict) else None
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
