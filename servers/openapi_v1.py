"""OpenAI's routes in the OpenAPI document."""

from __future__ import annotations

from jlorax.wire.call import MAX_TOP_LOGPROBS
from jlorax.wire.fields import INT32_MAX
from servers.openapi_parts import (
    ADAPTER,
    BODY,
    ENGINE,
    EVENTS,
    JSON,
    Schema,
    answer,
    either,
    event,
    flag,
    in_path,
    items,
    mapping,
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
    PROMPT,
    REFUSED,
    SAMPLING,
    STOPPING,
    TOKENS,
)

_TAG = "OpenAI"
_GENERATION = (*BODY, *ADAPTER, *ENGINE)
_REFUSED_V1 = (
    *REFUSED,
    "audio",
    "function_call",
    "functions",
    "modalities",
    "moderation",
    "prediction",
    "prompt_logprobs",
    "reasoning_effort",
    "service_tier",
    "skip_special_tokens",
    "suffix",
    "truncate_prompt_tokens",
    "verbosity",
    "web_search_options",
)
_MODEL: Schema = {"type": "string", "description": "The base model's id, or an adapter's."}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _COUNT}
TOOLS = items({"type": "object"}, "Functions that the model may call.", maxItems=128)
_TOOL_CHOICE: Schema = {
    "description": "auto, none, required, or {type: function, function: {name}}.",
    "anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}],
}
_FINISH: Schema = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", None]}

_WITHOUT_EFFECT: dict[str, Schema] = {
    "user": text("Read, without effect."),
    "metadata": mapping("Read, without effect.", maxProperties=64),
    "prompt_cache_key": text("Read, without effect."),
    "safety_identifier": text("Read, without effect."),
    "store": flag("Nothing is stored."),
}
_REQUEST: dict[str, Schema] = {
    "model": _MODEL,
    **ADAPTERS,
    **SAMPLING,
    "top_k": whole(-1, INT32_MAX, "Draw among that many; -1 and 0: all.", default=0),
    **STOPPING,
    "ignore_eos": flag("Go on after an end-of-text token."),
    "include_stop_str_in_output": flag("Keep the stop text in the answer."),
    "min_tokens": whole(0, INT32_MAX, "No stop token is drawn before so many.", default=0),
    **CONSTRAINTS,
    **_WITHOUT_EFFECT,
    "stream": flag("Answer with events."),
}
_SAMPLES: dict[str, Schema] = {
    "max_tokens": whole(*TOKENS, "Absent: the rest of the context."),
    "max_completion_tokens": whole(*TOKENS, "The newer name of max_tokens."),
    "n": whole(1, INT32_MAX, "So many answers.", default=1),
    "stream_options": either(
        "Only while streaming.",
        obj(
            {
                "include_usage": flag("A last event with the usage."),
                "continuous_usage_stats": flag("The usage so far in every event."),
            }
        ),
    ),
    "return_token_ids": flag("vLLM's: give token ids."),
}
TEMPLATE: dict[str, Schema] = {
    "add_generation_prompt": flag("The assistant speaks next.", default=True),
    "continue_final_message": flag("The last message goes on."),
    "chat_template_kwargs": mapping("Variables of the model's chat template."),
    "documents": items({"type": "object"}, "For templates that read them.", maxItems=256),
}

_USAGE = obj(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    ("prompt_tokens", "total_tokens"),
)
_ENVELOPE: dict[str, Schema] = {
    "id": {"type": "string"},
    "created": {"type": "integer"},
    "model": {"type": "string"},
    "system_fingerprint": {"type": "string"},
}
_CHOICE: dict[str, Schema] = {"index": _COUNT, "finish_reason": _FINISH}
_CHOICE_MORE: dict[str, Schema] = {
    "logprobs": {"type": ["object", "null"]},
    "token_ids": _IDS,
    "prompt_token_ids": _IDS,
}
_TEXT_CHOICE = obj({**_CHOICE, **_CHOICE_MORE, "text": {"type": "string"}}, (*_CHOICE, "text"))


def _answers(kind: str, choice: Schema) -> Schema:
    choices: Schema = {"type": "array", "items": choice}
    return whole_obj({"object": {"const": kind}, "choices": choices, **_ENVELOPE, "usage": _USAGE})


def _chunk(kind: str, choice: Schema) -> Schema:
    """``usage`` only when it was asked for: null until the last chunk, which has no choices."""
    choices: Schema = {"type": "array", "items": choice}
    needed: dict[str, Schema] = {"object": {"const": kind}, "choices": choices, **_ENVELOPE}
    return obj({**needed, "usage": {"anyOf": [_USAGE, {"type": "null"}]}}, needed)


SCHEMAS: dict[str, Schema] = {
    "CompletionRequest": request_body(
        {
            **_REQUEST,
            **_SAMPLES,
            "prompt": PROMPT,
            "best_of": whole(1, INT32_MAX, "Draw so many, give the likeliest n."),
            "echo": flag("Put the prompt in front of the answer."),
            "logprobs": whole(*ALTERNATIVES, "So many alternatives to each token."),
            "add_special_tokens": flag("The tokenizer's, around a text.", default=True),
        },
        ("model", "prompt"),
        (*_REFUSED_V1, "tools", "tool_choice"),
    ),
    "ChatRequest": request_body(
        {
            **_REQUEST,
            **_SAMPLES,
            **TEMPLATE,
            "messages": required(items(ref("Message"), "The conversation.", minItems=1)),
            "logprobs": flag("Give the tokens' log-probabilities."),
            "top_logprobs": whole(0, MAX_TOP_LOGPROBS, "So many alternatives; needs logprobs."),
            "tools": TOOLS,
            "tool_choice": _TOOL_CHOICE,
            "parallel_tool_calls": flag("Several calls in one answer.", default=True),
        },
        ("model", "messages"),
        (
            *_REFUSED_V1,
            "add_special_tokens",
            "best_of",
            "chat_template",
            "echo",
            "guideline",
            "tool_prompt",
        ),
    ),
    "ResponseRequest": request_body(
        {
            **{name: field for name, field in _REQUEST.items() if name != "response_format"},
            **TEMPLATE,
            "input": {
                "description": "A text, or messages, calls and what they gave.",
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "items": {"type": "object"}},
                ],
            },
            "instructions": text("A system message in front."),
            "max_output_tokens": whole(*TOKENS, "Absent: the rest of the context."),
            "include": items({"const": "message.output_text.logprobs"}, "What more to give."),
            "top_logprobs": whole(0, MAX_TOP_LOGPROBS, "So many alternatives to each token."),
            "text": mapping("`{format}`: what the answer must be."),
            "stream_options": mapping("Read, without effect."),
            "tools": TOOLS,
            "tool_choice": _TOOL_CHOICE,
            "parallel_tool_calls": flag("Several calls in one answer.", default=True),
        },
        ("model", "input"),
        (
            *_REFUSED_V1,
            "background",
            "chat_template",
            "context_management",
            "conversation",
            "max_tool_calls",
            "previous_response_id",
            "prompt",
            "reasoning",
            "truncation",
        ),
    ),
    "EmbeddingsRequest": request_body(
        {
            "model": _MODEL,
            "input": PROMPT,
            **_WITHOUT_EFFECT,
            "adapter_source": ADAPTERS["adapter_source"],
            "api_token": ADAPTERS["api_token"],
            "parameters": mapping("LoRAX's `{adapter_id, adapter_source}`."),
            "add_special_tokens": flag("The tokenizer's, around a text.", default=True),
            "encoding_format": text("base64: of float32.", enum=["float", "base64", None]),
            "dimensions": whole(*TOKENS, "The model's own, no other."),
            "truncate_prompt_tokens": whole(*TOKENS, "Keep only the last so many."),
        },
        ("model", "input"),
        ("service_tier", "verbosity"),
    ),
    "Completion": _answers("text_completion", _TEXT_CHOICE),
    "CompletionChunk": _chunk("text_completion", _TEXT_CHOICE),
    "Chat": _answers(
        "chat.completion",
        obj({**_CHOICE, **_CHOICE_MORE, "message": ref("AnswerMessage")}, (*_CHOICE, "message")),
    ),
    "ChatChunk": _chunk(
        "chat.completion.chunk",
        obj({**_CHOICE, **_CHOICE_MORE, "delta": {"type": "object"}}, (*_CHOICE, "delta")),
    ),
    "AnswerMessage": obj(
        {
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "tool_calls": {"type": "array", "items": ref("ToolCall")},
        },
        ("role", "content"),
    ),
    "Response": obj(
        {
            "id": {"type": "string"},
            "object": {"const": "response"},
            "created_at": {"type": "integer"},
            "status": {"type": "string", "enum": ["completed", "incomplete", "in_progress"]},
            "model": {"type": "string"},
            "output": {"type": "array", "items": {"type": "object"}},
            "usage": {"type": ["object", "null"]},
        },
        ("id", "object", "created_at", "status", "model", "output", "usage"),
    ),
    "ResponseEvent": obj(
        {"type": {"type": "string"}, "sequence_number": _COUNT}, ("type", "sequence_number")
    ),
    "Embeddings": whole_obj(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": ref("Embedding")},
            "embeddings": {"type": "array", "items": ref("Embedding")},
            "model": {"type": "string"},
            "usage": _USAGE,
        }
    ),
    "Embedding": whole_obj(
        {
            "object": {"const": "embedding"},
            "index": _COUNT,
            "embedding": {
                "anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]
            },
        }
    ),
    "Model": whole_obj(
        {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "root": {"type": "string"},
            "parent": {"type": ["string", "null"]},
            "max_model_len": _COUNT,
        }
    ),
    "ModelList": whole_obj(
        {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
    ),
}

_DONE = obj({"data": {"const": "[DONE]"}}, ("data",), description="The last event.")


def _chunks(name: str) -> tuple[str, Schema]:
    return EVENTS, {"anyOf": [event(ref(name)), _DONE]}


def _post(summary: str, ok: Schema, body: str) -> Schema:
    return operation(_TAG, summary, {200: ok}, _GENERATION, error="OpenAIError", body=body)


PATHS: dict[str, Schema] = {
    "/v1/completions": {
        "post": _post(
            "Complete prompts",
            answer("Whole or in chunks.", (JSON, ref("Completion")), _chunks("CompletionChunk")),
            "CompletionRequest",
        )
    },
    "/v1/chat/completions": {
        "post": _post(
            "Answer a conversation",
            answer("Whole or in chunks.", (JSON, ref("Chat")), _chunks("ChatChunk")),
            "ChatRequest",
        )
    },
    "/v1/responses": {
        "post": _post(
            "Answer items",
            answer(
                "Whole or in events.",
                (JSON, ref("Response")),
                (EVENTS, event(ref("ResponseEvent"), event={"type": "string"})),
            ),
            "ResponseRequest",
        )
    },
    "/v1/embeddings": {
        "post": _post(
            "A vector for each text",
            answer("Them.", (JSON, ref("Embeddings"))),
            "EmbeddingsRequest",
        )
    },
    "/v1/models": {
        "get": operation(
            _TAG,
            "The base model and the adapters",
            {200: answer("A list.", (JSON, ref("ModelList")))},
            (500, 503),
            error="OpenAIError",
        )
    },
    "/v1/models/{model_id}": {
        "get": operation(
            _TAG,
            "One of them",
            {200: answer("It.", (JSON, ref("Model")))},
            (400, 404, 500, 503),
            error="OpenAIError",
            parameters=[in_path("model_id", "Its slashes quoted as %2F, or not.")],
        )
    },
}
