"""Files and fine-tuning jobs in the OpenAPI document."""

from __future__ import annotations

from jlorax.jobs.types import JobStatus
from jlorax.wire.fine_tuning import (
    MAX_BATCH_SIZE,
    MAX_EPOCHS,
    MAX_FILE_ID_CHARS,
    MAX_METADATA,
    MAX_METADATA_CHARS,
    MAX_RATE_MULTIPLIER,
    MAX_SEED,
    PURPOSE,
)
from servers.files import MAX_FILES_A_PAGE
from servers.fine_tuning import EVENTS_A_PAGE, JOBS_A_PAGE, MAX_A_PAGE
from servers.openapi_parts import (
    BODY,
    EVENTS,
    JSON,
    Schema,
    answer,
    either,
    in_path,
    in_query,
    mapping,
    obj,
    operation,
    query,
    ref,
    request_body,
    required,
    text,
    whole,
    whole_obj,
)
from servers.openapi_shared import ADAPTER_ID

_TAG = "Fine-tuning"
_AUTO: Schema = {"const": "auto"}
_ID = required(text("A file's id.", maxLength=MAX_FILE_ID_CHARS))


def _whole_or_auto(high: int) -> Schema:
    return either("'auto': our default.", _AUTO, {"type": "integer", "minimum": 1, "maximum": high})


def _list_of(name: str) -> Schema:
    known: Schema = {"type": ["string", "null"]}
    return whole_obj(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": ref(name)},
            "first_id": known,
            "last_id": known,
            "has_more": {"type": "boolean"},
        }
    )


_COUNT: Schema = {"type": "integer", "minimum": 0}
_MAYBE_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
_STRING: Schema = {"type": "string"}
_MAYBE_STRING: Schema = {"type": ["string", "null"]}
_OBJECT: Schema = {"type": "object"}
_MAYBE_OBJECT: Schema = {"type": ["object", "null"]}
_EMPTY: Schema = {"type": "array", "maxItems": 0}

SCHEMAS: dict[str, Schema] = {
    "Hyperparameters": obj(
        {
            "n_epochs": _whole_or_auto(MAX_EPOCHS),
            "batch_size": _whole_or_auto(MAX_BATCH_SIZE),
            "learning_rate_multiplier": either(
                "Over the default learning rate.",
                _AUTO,
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_RATE_MULTIPLIER},
            ),
        },
        additionalProperties=False,
    ),
    "FineTuningMethod": obj(
        {
            "type": {"const": "supervised"},
            "supervised": either(
                "As beside it.",
                obj(
                    {"hyperparameters": either("As beside it.", ref("Hyperparameters"))},
                    additionalProperties=False,
                ),
            ),
        },
        ("type",),
        additionalProperties=False,
    ),
    "CreateFineTuningJob": request_body(
        {
            "model": required(text("The base model's name.")),
            "training_file": _ID,
            "validation_file": text("A file's id.", maxLength=MAX_FILE_ID_CHARS),
            "suffix": either("The adapter's name: it becomes NAME/1, NAME/2.", ADAPTER_ID),
            "seed": whole(0, MAX_SEED, "Of the first weights, of dropout, of the rows' order."),
            "hyperparameters": either("OpenAI's words.", ref("Hyperparameters")),
            "method": either("OpenAI's newer words.", ref("FineTuningMethod")),
            "training": mapping(
                "Ours: keys of `jlorax train`, such as rank, learning_rate, max_seq_len; but for "
                "paths, names and the base."
            ),
            "metadata": mapping(
                "Yours.",
                maxProperties=MAX_METADATA,
                additionalProperties={"type": "string", "maxLength": MAX_METADATA_CHARS},
            ),
        },
        ("model", "training_file"),
        ("integrations",),
    ),
    "FineTuningJob": whole_obj(
        {
            "id": _STRING,
            "object": {"const": "fine_tuning.job"},
            "created_at": _COUNT,
            "finished_at": _MAYBE_COUNT,
            "estimated_finish": _MAYBE_COUNT,
            "model": _STRING,
            "fine_tuned_model": _MAYBE_STRING,
            "user_provided_suffix": _STRING,
            "organization_id": _STRING,
            "status": {"enum": [status.value for status in JobStatus]},
            "error": either(
                "Why it failed.",
                whole_obj({"code": _STRING, "message": _STRING, "param": {"type": "null"}}),
            ),
            "training_file": _STRING,
            "validation_file": _MAYBE_STRING,
            "hyperparameters": ref("Hyperparameters"),
            "method": ref("FineTuningMethod"),
            "seed": _COUNT,
            "trained_tokens": _MAYBE_COUNT,
            "result_files": _EMPTY,
            "integrations": _EMPTY,
            "metadata": _OBJECT,
            "training": _OBJECT | {"description": "Every key of its configuration."},
            "metrics": _OBJECT | {"description": "Losses at the end."},
        }
    ),
    "FineTuningJobEvent": whole_obj(
        {
            "id": _STRING,
            "object": {"const": "fine_tuning.job.event"},
            "created_at": _COUNT,
            "level": {"enum": ["info", "warn", "error"]},
            "message": _STRING,
            "type": {"enum": ["message", "metrics"]},
            "data": _MAYBE_OBJECT | {"description": "step, train_loss, valid_loss, ..."},
            "event": _MAYBE_OBJECT | {"description": "What the training itself said."},
        }
    ),
    "FileObject": whole_obj(
        {
            "id": _STRING,
            "object": {"const": "file"},
            "bytes": _COUNT,
            "created_at": _COUNT,
            "filename": _STRING,
            "purpose": {"const": PURPOSE},
            "status": {"const": "processed"},
            "expires_at": {"type": "null"},
        }
    ),
    "FileDeleted": whole_obj(
        {"id": _STRING, "object": {"const": "file"}, "deleted": {"const": True}}
    ),
    "FineTuningJobList": _list_of("FineTuningJob"),
    "FineTuningJobEventList": _list_of("FineTuningJobEvent"),
    "FileList": _list_of("FileObject"),
}

_READING = (400, 404, 409, 500)
_FILE_ID = in_path("file_id", "As an upload gave it.")
_JOB_ID = in_path("job_id", "As its creation gave it.")
_FORM = obj(
    {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"const": PURPOSE},
    },
    ("file", "purpose"),
    additionalProperties=False,
)
_UPLOAD: Schema = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}


def _page(default: int, most: int) -> list[Schema]:
    limit: Schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return [
        query("limit", "Of a page.", limit),
        query("after", "The last page's last id.", _STRING),
    ]


def _read(summary: str, found: Schema, *parameters: Schema) -> Schema:
    return operation(
        _TAG, summary, {200: found}, _READING, error="OpenAIError", parameters=parameters
    )


def _shown(name: str) -> Schema:
    return answer("It.", (JSON, ref(name)))


PATHS: dict[str, Schema] = {
    "/v1/files": {
        "post": operation(
            _TAG,
            "Send data for trainings: JSONL, JSON, CSV, TSV or Parquet",
            {200: _shown("FileObject")},
            (400, 408, 409, 413, 415, 500, 507),
            error="OpenAIError",
            requestBody=_UPLOAD,
        ),
        "get": _read(
            "All that was sent",
            _shown("FileList"),
            *_page(MAX_FILES_A_PAGE, MAX_FILES_A_PAGE),
            in_query("order", "By the time of sending.", ["asc", "desc"]),
            in_query("purpose", "Of this one alone.", [PURPOSE]),
        ),
    },
    "/v1/files/{file_id}": {
        "get": _read("One file", _shown("FileObject"), _FILE_ID),
        "delete": _read("Remove it; not while a job needs it", _shown("FileDeleted"), _FILE_ID),
    },
    "/v1/files/{file_id}/content": {
        "get": _read(
            "Its bytes",
            answer("They.", ("application/octet-stream", {"type": "string", "format": "binary"})),
            _FILE_ID,
        )
    },
    "/v1/fine_tuning/jobs": {
        "post": operation(
            _TAG,
            "Train an adapter on this server's base model",
            {200: _shown("FineTuningJob")},
            (*BODY, 404, 409, 429, 500),
            error="OpenAIError",
            body="CreateFineTuningJob",
        ),
        "get": _read(
            "All jobs since the start, the newest first",
            _shown("FineTuningJobList"),
            *_page(JOBS_A_PAGE, MAX_A_PAGE),
        ),
    },
    "/v1/fine_tuning/jobs/{job_id}": {"get": _read("One job", _shown("FineTuningJob"), _JOB_ID)},
    "/v1/fine_tuning/jobs/{job_id}/cancel": {
        "post": _read("End it; answers when it has ended", _shown("FineTuningJob"), _JOB_ID)
    },
    "/v1/fine_tuning/jobs/{job_id}/events": {
        "get": _read(
            "What happened, the newest first; as a stream from the oldest on, until it ends",
            answer(
                "Them.",
                (JSON, ref("FineTuningJobEventList")),
                (EVENTS, {"type": "string", "description": "Events of FineTuningJobEvent."}),
            ),
            _JOB_ID,
            *_page(EVENTS_A_PAGE, MAX_A_PAGE),
            in_query("stream", "Server-sent events.", ["true", "false"]),
        )
    },
}
