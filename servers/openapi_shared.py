"""What requests of both families may say: sampling, merges, constraints, messages; and errors."""

from __future__ import annotations

from jlorax.types import MAX_LOGIT_BIASES, MAX_MERGED_ADAPTERS, MajoritySign, MergeStrategy
from jlorax.wire.call import MAX_SEED, MAX_TEMPERATURE, MAX_TOP_LOGPROBS
from jlorax.wire.constraints import MAX_CHOICES, MAX_LOGIT_BIAS
from jlorax.wire.fields import INT32_MAX, MAX_ADAPTER_ID_CHARS, MAX_STOP_CHARS, MAX_STOP_SEQUENCES
from jlorax.wire.merges import (
    MAX_ADAPTER_SCALE,
    MAX_MERGE_SEED,
    MAX_MERGE_WEIGHT,
    MAX_MERGED_RANK,
)
from servers.openapi_parts import (
    Schema,
    above,
    either,
    flag,
    items,
    mapping,
    number,
    obj,
    ref,
    required,
    text,
    whole,
    whole_obj,
)

REFUSED = (
    "adapter_parameters",
    "allowed_token_ids",
    "bad_words",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "length_penalty",
    "logits_processors",
    "use_beam_search",
    "watermark",
)

SAMPLING: dict[str, Schema] = {
    "temperature": number(0.0, MAX_TEMPERATURE, "0 takes the most likely token."),
    "top_p": above(
        0.0, 1.0, "Draw among the likeliest tokens of this much probability.", default=1
    ),
    "min_p": number(0.0, 1.0, "Drop tokens below this part of the likeliest one.", default=0),
    "typical_p": above(0.0, 1.0, "Locally typical sampling: keep this much.", default=1),
    "repetition_penalty": number(0.01, 100.0, "Over prompt and answer; 1 is none.", default=1),
    "frequency_penalty": number(-2.0, 2.0, "Over the answer, for each time.", default=0),
    "presence_penalty": number(-2.0, 2.0, "Over the answer, once.", default=0),
    "seed": whole(0, MAX_SEED, "Equal seeds draw equal answers; drawn when absent."),
}

STOPPING: dict[str, Schema] = {
    "stop": either(
        "Texts that end the answer.",
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
            "maxItems": MAX_STOP_SEQUENCES,
        },
    ),
    "stop_token_ids": items({"type": "integer", "minimum": 0}, "Tokens that end the answer."),
    "ignore_eos_token": flag("Go on after an end-of-text token."),
}

ADAPTERS: dict[str, Schema] = {
    "adapter_source": text("'local': a folder under the adapter root comes before a name.",
                           enum=["local", "LOCAL", "Local", None]),
    "merged_adapters": either("Several adapters as one.", ref("MergedAdapters")),
    "adapter_scale": number(
        -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE, "Multiplies the adapter's scaling.", default=1
    ),
    "api_token": text("LoRAX's; read and not used: remotes are asked with the server's own."),
}  # fmt: skip

CONSTRAINTS: dict[str, Schema] = {
    "response_format": either("What the answer must be.", ref("ResponseFormat")),
    "guided_json": either("vLLM's: a JSON schema.", {"type": "object"}, {"type": "string"}),
    "guided_regex": text("vLLM's: a regular expression of the whole answer."),
    "guided_choice": items({"type": "string", "minLength": 1}, "vLLM's: the answer is one of them.",
                           maxItems=MAX_CHOICES),
    "guided_grammar": text("vLLM's: a Lark grammar."),
    "structured_outputs": either("vLLM's newer word for a constraint.", ref("StructuredOutputs")),
    "logit_bias": mapping(
        "Token ids, and what is added to their logits.",
        maxProperties=MAX_LOGIT_BIASES,
        additionalProperties={
            "type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS,
        },
    ),
}  # fmt: skip

ALTERNATIVES = (0, MAX_TOP_LOGPROBS)
TOKENS = (1, INT32_MAX)

PROMPT: Schema = {
    "description": "A text, a list of texts, or one or several lists of token ids.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ],
}

ADAPTER_ID: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_ADAPTER_ID_CHARS,
    "description": "Letters, digits and ._@:+=- in parts joined by single slashes.",
}

_CONTENTS: tuple[Schema, ...] = (
    {"type": "string"},
    {
        "type": "array",
        "minItems": 1,
        "items": whole_obj({"type": {"const": "text"}, "text": {"type": "string"}}),
    },
)


def _said(*roles: str) -> dict[str, Schema]:
    return {
        "role": {"type": "string", "enum": list(roles)},
        "content": {"anyOf": list(_CONTENTS), "description": "A text, or parts of one."},
        "name": text("Who speaks, for templates that read it.", maxLength=256),
    }


SCHEMAS: dict[str, Schema] = {
    "Error": obj(
        {
            "error": {"type": "string"},
            "error_type": {"type": "string", "description": "LoRAX's word; its clients map on it."},
            "code": {"type": "string", "description": "A stable word for machines."},
            "details": {"type": "object", "description": "The numbers of the message."},
        },
        ("error", "error_type"),
    ),
    "OpenAIError": whole_obj(
        {
            "error": whole_obj(
                {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                    "details": {"type": "object"},
                }
            )
        }
    ),
    "MergedAdapters": obj(
        {
            "ids": required(items(ADAPTER_ID, "Who.", minItems=1, maxItems=MAX_MERGED_ADAPTERS)),
            "weights": items(
                {"type": "number", "minimum": -MAX_MERGE_WEIGHT, "maximum": MAX_MERGE_WEIGHT},
                "One for each; absent: 1 each.",
            ),
            "merge_strategy": text(
                "As PEFT names them.", enum=[*(s.value for s in MergeStrategy), None]
            ),
            "density": number(0.0, 1.0, "The share of values that ties and dare keep."),
            "majority_sign_method": text(
                "How ties elects signs.", enum=[*(s.value for s in MajoritySign), None]
            ),
            "rank": whole(1, MAX_MERGED_RANK, "Of the result, for svd."),
            "seed": whole(0, MAX_MERGE_SEED, "Of the masks, for dare."),
        },
        ("ids",),
        additionalProperties=False,
    ),
    "ResponseFormat": obj(
        {
            "type": {
                "type": "string",
                "enum": ["text", "json_object", "json_schema", "Text", "JsonObject", "JsonSchema"],
            },
            "schema": mapping("LoRAX's place of the JSON schema."),
            "value": mapping("TGI's place of it."),
            "json_schema": either(
                "OpenAI's place of it.",
                obj(
                    {
                        "name": text("Any."),
                        "description": text("Any."),
                        "strict": flag("An answer always follows the schema."),
                        "schema": {"type": "object"},
                    },
                    ("schema",),
                ),
            ),
        },
        ("type",),
    ),
    "StructuredOutputs": obj(
        {
            "json": either("A JSON schema.", {"type": "object"}, {"type": "string"}),
            "regex": text("A regular expression of the whole answer."),
            "choice": items({"type": "string", "minLength": 1}, "The answer is one of them."),
            "grammar": text("A Lark grammar."),
            "json_object": flag("Any JSON object."),
        }
    ),
    "Message": {
        "anyOf": [
            obj(_said("system", "developer", "user", "assistant"), ("role", "content")),
            obj(
                {
                    **_said("assistant"),
                    "content": either("Beside its calls.", *_CONTENTS),
                    "tool_calls": {"type": "array", "minItems": 1, "items": ref("ToolCall")},
                },
                ("role", "tool_calls"),
            ),
            obj(
                {**_said("tool"), "tool_call_id": {"type": "string", "minLength": 1}},
                ("role", "content", "tool_call_id"),
            ),
        ]
    },
    "ToolCall": whole_obj(
        {
            "id": {"type": "string", "minLength": 1},
            "type": {"const": "function"},
            "function": whole_obj(
                {
                    "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                    "arguments": {"type": "string", "description": "The text of a JSON object."},
                }
            ),
        }
    ),
}
