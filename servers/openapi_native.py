"""LoRAX's routes in the OpenAPI document, and the tokenizer's, which it shares with vLLM."""

from __future__ import annotations

from jlorax.wire.fields import INT32_MAX, MAX_TOKENIZED_CHARS
from servers.openapi_parts import (
    ADAPTER,
    BODY,
    ENGINE,
    EVENTS,
    JSON,
    TEXT,
    Schema,
    answer,
    either,
    event,
    flag,
    in_query,
    items,
    obj,
    operation,
    ref,
    request_body,
    required,
    text,
    whole,
    whole_obj,
)
from servers.openapi_shared import (
    ADAPTERS,
    ALTERNATIVES,
    CONSTRAINTS,
    REFUSED,
    SAMPLING,
    STOPPING,
    TOKENS,
)
from servers.openapi_v1 import TEMPLATE, TOOLS

_GENERATION = (*BODY, *ADAPTER, *ENGINE, 424)
_TAG = "LoRAX"

_PARAMETERS: dict[str, Schema] = {
    "adapter_id": text("Who answers; absent or empty: the base model."),
    **ADAPTERS,
    **SAMPLING,
    "do_sample": flag("Draw; also on with a temperature other than 0 and 1, top_k, top_p ..."),
    "top_k": whole(*TOKENS, "Draw among that many of the likeliest tokens."),
    "best_of": whole(1, INT32_MAX, "Draw so many answers, give the likeliest; see /info."),
    "max_new_tokens": whole(*TOKENS, "Absent: the rest of the context."),
    "min_new_tokens": whole(0, INT32_MAX, "No stop token is drawn before so many.", default=0),
    **STOPPING,
    "include_stop_text": flag("Keep the stop text in the answer.", default=True),
    "truncate": whole(*TOKENS, "Keep only the last so many tokens of the prompt."),
    "return_full_text": flag("Put the prompt in front of the answer."),
    "details": flag("Give `details`."),
    "decoder_input_details": flag("Give `details.prefill`; not while streaming."),
    "return_k_alternatives": whole(1, ALTERNATIVES[1], "So many `alternative_tokens` each."),
    "top_n_tokens": whole(*ALTERNATIVES, "TGI's: so many in `details.top_tokens`."),
    "apply_chat_template": flag("`inputs` is what the user says."),
    **CONSTRAINTS,
    "grammar": either("TGI's: a constraint.", ref("Grammar")),
    "return_token_ids": flag("Give the prompt's token ids and the times."),
}

_INPUTS: Schema = {
    "description": "A text; beyond LoRAX a list of token ids or of messages.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": ref("Message")},
    ],
}

_LOGPROB: Schema = {"type": ["number", "null"], "description": "Of the raw distribution, in nats."}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _COUNT}
_PIECE = {"id": _COUNT, "text": {"type": "string"}, "logprob": _LOGPROB}
_ENDED: dict[str, Schema] = {
    "finish_reason": {"type": "string", "enum": ["length", "eos_token", "stop_sequence"]},
    "prompt_tokens": _COUNT,
    "generated_tokens": _COUNT,
    "skipped_tokens": _COUNT,
    "seed": {"type": ["integer", "null"], "description": "Null when nothing was drawn."},
}
_ASKED: dict[str, Schema] = {
    "prompt_token_ids": {"type": "array", "items": _COUNT},
    "timings": {"type": "object", "additionalProperties": {"type": "number"}},
}
_TOKEN = {**_PIECE, "special": {"type": "boolean"}, "skipped": {"type": "boolean"}}
_DETAILS: dict[str, Schema] = {
    **_ENDED,
    "prefill": {"type": "array", "items": ref("PrefillToken")},
    "tokens": {"type": "array", "items": ref("Token")},
}
_TOP_TOKENS: Schema = {"type": "array", "items": {"type": "array", "items": ref("TopToken")}}

SCHEMAS: dict[str, Schema] = {
    "Grammar": obj(
        {
            "type": {"type": "string", "enum": ["json", "regex", "json_schema"]},
            "value": {"description": "A JSON schema, or a regular expression."},
        },
        ("type", "value"),
    ),
    "GenerateParameters": request_body(_PARAMETERS, (), REFUSED),
    "GenerateRequest": request_body(
        {
            "inputs": _INPUTS,
            "parameters": either("How.", ref("GenerateParameters")),
            "stream": flag("Of / and /invocations alone: answer with events."),
        },
        ("inputs",),
    ),
    "AlternativeToken": whole_obj(_PIECE),
    "TopToken": whole_obj({**_PIECE, "special": {"type": "boolean"}}),
    "PrefillToken": obj(
        {**_PIECE, "alternative_tokens": {"type": "array", "items": ref("AlternativeToken")}},
        _PIECE,
    ),
    "Token": obj(
        {**_TOKEN, "alternative_tokens": {"type": "array", "items": ref("AlternativeToken")}},
        _TOKEN,
    ),
    "Details": obj(
        {
            **_DETAILS,
            **_ASKED,
            "top_tokens": _TOP_TOKENS,
            "best_of_sequences": {"type": "array", "items": ref("BestOfSequence")},
        },
        _DETAILS,
    ),
    "BestOfSequence": obj(
        {"generated_text": {"type": "string"}, **_DETAILS, **_ASKED, "top_tokens": _TOP_TOKENS},
        ("generated_text", *_DETAILS),
    ),
    "GenerateResponse": obj(
        {"generated_text": {"type": "string"}, "details": ref("Details")}, ("generated_text",)
    ),
    "StreamResponse": obj(
        {
            "index": {"type": "integer", "minimum": 1},
            "token": ref("Token"),
            "generated_text": {"type": ["string", "null"]},
            "details": either("With the last token.", obj({**_ENDED, **_ASKED})),
            "top_tokens": {"type": "array", "items": ref("TopToken")},
        },
        ("index", "token", "generated_text", "details"),
    ),
    "EmbedRequest": request_body(
        {
            "inputs": {"type": "string", "minLength": 1},
            "parameters": either(
                "How.",
                obj(
                    {
                        "adapter_id": _PARAMETERS["adapter_id"],
                        "adapter_source": ADAPTERS["adapter_source"],
                        "api_token": ADAPTERS["api_token"],
                    },
                    description="Refused: merged_adapters.",
                ),
            ),
        },
        ("inputs",),
    ),
    "EmbedResponse": whole_obj({"embeddings": {"type": "array", "items": {"type": "number"}}}),
    "ClassifyRequest": request_body({"inputs": {"type": "string"}}, ("inputs",)),
    "BatchClassifyRequest": request_body(
        {"inputs": required(items({"type": "string"}, "Texts."))}, ("inputs",)
    ),
    "TokenizeRequest": request_body(
        {
            "inputs": text(
                "LoRAX's: a text, whose tokens come as a list.", maxLength=MAX_TOKENIZED_CHARS
            ),
            "prompt": text(
                "vLLM's: a text, whose tokens come with a count.", maxLength=MAX_TOKENIZED_CHARS
            ),
            "messages": items(ref("Message"), "vLLM's: a conversation."),
            "model": text("Any: there is one tokenizer."),
            "add_special_tokens": flag("The tokenizer's, around a text.", default=True),
            "return_token_strs": flag("Give the tokens' texts too."),
            "tools": TOOLS,
            **TEMPLATE,
        },
        (),
        ("chat_template",),
    ),
    "DetokenizeRequest": request_body(
        {"tokens": _IDS, "model": text("Any: there is one tokenizer.")}, ("tokens",)
    ),
    "Pieces": {
        "type": "array",
        "items": whole_obj(
            {"id": _COUNT, "text": {"type": "string"}, "start": _COUNT, "stop": _COUNT}
        ),
    },
    "TokenIds": whole_obj(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _IDS,
            "token_strs": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]
            },
        }
    ),
    "Detokenized": whole_obj({"prompt": {"type": "string"}}),
    "Metrics": {
        "type": "object",
        "additionalProperties": whole_obj(
            {
                "type": {"type": "string"},
                "data": {
                    "type": "array",
                    "items": whole_obj(
                        {"key": {"type": "string"}, "value": {"type": ["number", "null"]}}
                    ),
                },
            }
        ),
    },
    "Info": obj(
        {
            "model_id": {"type": "string"},
            "model_dtype": {"type": "string"},
            "model_device_type": {"type": "string"},
            "model_pipeline_tag": {"type": "string"},
            "max_concurrent_requests": _COUNT,
            "max_best_of": _COUNT,
            "max_stop_sequences": _COUNT,
            "max_input_length": _COUNT,
            "max_total_tokens": _COUNT,
            "version": {"type": "string"},
        },
        ("model_id", "max_best_of", "max_stop_sequences", "max_input_length", "max_total_tokens"),
    ),
}

_STREAM = (EVENTS, event(ref("StreamResponse")))  # there is no [DONE]
_ONE = answer("The answer.", (JSON, ref("GenerateResponse")))
_LIST: Schema = {"type": "array", "items": ref("GenerateResponse"), "minItems": 1, "maxItems": 1}
_HEALTHY = answer("Requests are served.")
_UNHEALTHY = answer("The engine is not ready.", (JSON, ref("Error")))


def _post(summary: str, ok: Schema, body: str = "GenerateRequest") -> Schema:
    return operation(_TAG, summary, {200: ok}, _GENERATION, error="Error", body=body)


def _compat() -> Schema:
    return _post("A list of one answer, or events", answer("As asked.", (JSON, _LIST), _STREAM))


def _health() -> Schema:
    answers = {200: _HEALTHY, 503: _UNHEALTHY}
    return operation(_TAG, "Whether requests are served", answers, error="Error")


def _tokens(summary: str, ok: Schema, body: str) -> Schema:
    return operation(_TAG, summary, {200: ok}, BODY, error="Error", body=body)


PATHS: dict[str, Schema] = {
    "/": {"post": _compat(), "get": _health()},
    "/invocations": {"post": _compat()},
    "/generate": {"post": _post("One answer", _ONE)},
    "/generate_stream": {"post": _post("An answer as events", answer("As it comes.", _STREAM))},
    "/embed": {
        "post": _post(
            "A vector", answer("The vector.", (JSON, ref("EmbedResponse"))), "EmbedRequest"
        )
    },
    "/tokenize": {
        "post": _tokens(
            "A text's tokens",
            answer(
                "LoRAX's list for `inputs`, else vLLM's object.",
                (JSON, {"anyOf": [ref("Pieces"), ref("TokenIds")]}),
            ),
            "TokenizeRequest",
        )
    },
    "/detokenize": {
        "post": _tokens(
            "Tokens' text", answer("It.", (JSON, ref("Detokenized"))), "DetokenizeRequest"
        )
    },
    "/classify": {
        "post": operation(
            _TAG,
            "Refused: this model generates text",
            {},
            (*BODY, 424),
            error="Error",
            body="ClassifyRequest",
        )
    },
    "/classify_batch": {
        "post": operation(
            _TAG,
            "Refused: this model generates text",
            {},
            (*BODY, 424),
            error="Error",
            body="BatchClassifyRequest",
        )
    },
    "/health": {"get": _health()},
    "/ping": {"get": _health()},
    "/startup": {
        "get": operation(
            _TAG,
            "Whether a real request is answered",
            {200: answer("It was answered.")},
            (*ENGINE, 424),
            error="Error",
        )
    },
    "/info": {
        "get": operation(
            _TAG, "The model and its limits", {200: answer("Both.", (JSON, ref("Info")))},
            error="Error",
        )
    },
    "/metrics": {
        "get": operation(
            _TAG,
            "Counters: Prometheus' text, or JSON",
            {200: answer("All of them.", (TEXT, {"type": "string"}), (JSON, ref("Metrics")))},
            (422,),
            error="Error",
            parameters=[in_query("format", "Before what is accepted.", ["json", "prometheus"])],
        )
    },
}  # fmt: skip
