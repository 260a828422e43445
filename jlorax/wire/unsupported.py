"""Features that other servers have and this one does not: refused by name, never ignored.

The values that ask for nothing pass, since many clients send every field that they know.
"""

from __future__ import annotations

from jlorax.wire.fields import INT32_MAX, Fields

# name: the values, besides null, that ask for nothing
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "adapter_parameters": ({},),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ("",),  # {} is a schema: any JSON
    "guided_regex": ("",),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "merged_adapters": (),
    "min_tokens": (0,),
    "structured_outputs": ({},),
    "use_beam_search": (False,),
    "watermark": (False,),
}


def refuse_unsupported(fields: Fields) -> None:
    """What no route can do."""
    for name, harmless in _UNSUPPORTED.items():
        fields.refuse(name, *harmless)


def refuse_tools(fields: Fields) -> None:
    fields.refuse("tools", [])
    fields.refuse("functions", [])
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("function_call", "none", "auto")


def refuse_best_of(fields: Fields) -> None:
    """Numbers that can mean nothing get the range error first."""
    fields.integer("best_of", 1, INT32_MAX)
    fields.refuse("best_of", 1)


def refuse_format(fields: Fields, *plain: str) -> None:
    """``plain``: the names of unconstrained text. A schema constrains, whatever the type says."""
    given = fields.mapping("response_format") or {}
    form = Fields(given, prefix="response_format.")
    form.refuse("type", *plain)
    form.refuse("schema")
    form.refuse("json_schema")
    if form.get("type") is None and any(value is not None for value in given.values()):
        raise form.wrong("type", f"is missing; this server supports {plain[0]!r} alone")
