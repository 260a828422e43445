"""Features that other servers have and this one does not: refused by name, never ignored.

The values that ask for nothing pass, since many clients send every field that they know.
"""

from __future__ import annotations

from jlorax.wire.fields import INT32_MAX, Fields

# name: the values, besides null, that ask for nothing
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "watermark": (False,),
}
# what no /v1 route can do
_UNSUPPORTED_V1: dict[str, tuple[object, ...]] = {
    "modalities": (["text"],),
    "moderation": (),
    "audio": (),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "web_search_options": (),
}


def refuse_unsupported(fields: Fields) -> None:
    """What no route can do."""
    if fields.get("adapter_parameters") not in (None, {}):
        raise fields.wrong("adapter_parameters", "is LoRAX's inner word: use `merged_adapters`")
    _refuse(fields, _UNSUPPORTED)


def refuse_unsupported_v1(fields: Fields) -> None:
    refuse_unsupported(fields)
    _refuse(fields, _UNSUPPORTED_V1)


def _refuse(fields: Fields, names: dict[str, tuple[object, ...]]) -> None:
    for name, harmless in names.items():
        fields.refuse(name, *harmless)


def refuse_best_of(fields: Fields) -> None:
    """Numbers that can mean nothing get the range error first."""
    fields.integer("best_of", 1, INT32_MAX)
    fields.refuse("best_of", 1)
