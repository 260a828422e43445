"""Files and fine-tuning jobs as JSON, both ways: OpenAI's objects, and what is ours beside them.

https://platform.openai.com/docs/api-reference/fine-tuning and .../files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jlorax.errors import AdapterConflict, InvalidParameter
from jlorax.jobs.types import (
    JobError,
    JobEvent,
    JobOrder,
    JobStatus,
    TrainingJob,
    UploadedFile,
)
from jlorax.wire.call import Limits, parse_adapter_id
from jlorax.wire.fields import MAX_ADAPTER_ID_CHARS, Fields
from jlorax.wire.strict_json import finite, kind_of

PURPOSE = "fine-tune"
MAX_EPOCHS, MAX_BATCH_SIZE = 10_000, 4096
MAX_RATE_MULTIPLIER = 1e4
MAX_SEED = 2**31 - 1
MAX_METADATA, MAX_METADATA_KEY_CHARS, MAX_METADATA_CHARS = 16, 64, 512
MAX_FILE_ID_CHARS = 64
_AUTO = "auto"


@dataclass(frozen=True)
class CreateJob:
    order: JobOrder
    unknown_fields: tuple[str, ...]


def parse_create_job(body: Mapping[str, Any], limits: Limits) -> CreateJob:
    fields = Fields(body)
    _check_model(fields, limits)
    hyperparameters = _hyperparameters(fields)
    order = JobOrder(
        training_file=_needed_text(fields, "training_file"),
        validation_file=fields.text("validation_file", MAX_FILE_ID_CHARS),
        name=_name(fields, limits),
        seed=fields.integer("seed", 0, MAX_SEED),
        num_epochs=hyperparameters.get("n_epochs"),
        batch_size=hyperparameters.get("batch_size"),
        learning_rate_multiplier=hyperparameters.get("learning_rate_multiplier"),
        training=fields.mapping("training") or {},
        metadata=_metadata(fields),
    )
    fields.refuse("integrations", [])
    return CreateJob(order, fields.unknown())


def _check_model(fields: Fields, limits: Limits) -> None:
    name = fields.text("model", MAX_ADAPTER_ID_CHARS)
    if name is None:
        raise fields.wrong("model", f"must be the base model's name, {limits.model_id!r}")
    if parse_adapter_id(name, limits) is not None:
        raise fields.wrong(
            "model", f"is {name!r}; adapters for this server's base {limits.model_id!r} are made"
        )


def _needed_text(fields: Fields, name: str) -> str:
    value = fields.text(name, MAX_FILE_ID_CHARS)
    if value is None:
        raise fields.wrong(name, "must be a string")
    return value


def _name(fields: Fields, limits: Limits) -> str | None:
    suffix = fields.text("suffix", MAX_ADAPTER_ID_CHARS)
    if suffix is None:
        return None
    name = parse_adapter_id(suffix, limits)
    if name is None:
        raise AdapterConflict(f"{suffix!r} names the base model: an adapter needs another name")
    return name


def _hyperparameters(fields: Fields) -> dict[str, Any]:
    """Of both places; what is said twice must be the same."""
    older = _read_hyperparameters(fields, fields.mapping("hyperparameters"))
    newer = _method_hyperparameters(fields)
    for name, value in newer.items():
        if older.setdefault(name, value) != value:
            raise fields.wrong(
                f"hyperparameters.{name}", f"is {older[name]}, but the method's is {value}"
            )
    return older


def _method_hyperparameters(fields: Fields) -> dict[str, Any]:
    method = fields.mapping("method")
    if method is None:
        return {}
    inside = fields.inside("method", method)
    if (kind := inside.text("type")) != "supervised":
        raise inside.wrong("type", f"must be 'supervised', not {kind!r}: others are not done here")
    supervised = inside.mapping("supervised") or {}
    deeper = inside.inside("supervised", supervised)
    found = _read_hyperparameters(deeper, deeper.mapping("hyperparameters"))
    for read in (inside, deeper):
        _refuse_unknown(read)
    return found


def _read_hyperparameters(fields: Fields, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that say more than "auto"."""
    given = {name: value for name, value in (values or {}).items() if value != _AUTO}
    inside = fields.inside("hyperparameters", given)
    found = {
        "n_epochs": inside.integer("n_epochs", 1, MAX_EPOCHS),
        "batch_size": inside.integer("batch_size", 1, MAX_BATCH_SIZE),
        "learning_rate_multiplier": inside.number(
            "learning_rate_multiplier", 0, MAX_RATE_MULTIPLIER, above_low=True
        ),
    }
    _refuse_unknown(fields.inside("hyperparameters", values or {}), tuple(found))
    return {name: value for name, value in found.items() if value is not None}


def _refuse_unknown(fields: Fields, known: tuple[str, ...] = ()) -> None:
    known = known or fields.known()
    for name in fields.unknown():
        if name not in known:
            close = get_close_matches(name, known, 1) or known
            raise fields.wrong(name[:64], f"is unknown; did you mean {' or '.join(close)}?")


def _metadata(fields: Fields) -> dict[str, str]:
    values = fields.mapping("metadata") or {}
    if len(values) > MAX_METADATA:
        raise fields.wrong("metadata", f"may have {MAX_METADATA} keys, not {len(values)}")
    for key, value in values.items():
        if not isinstance(value, str):
            raise fields.wrong("metadata", f"must hold strings, not {kind_of(value)}")
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_CHARS:
            raise fields.wrong(
                "metadata",
                f"may have keys of {MAX_METADATA_KEY_CHARS} and values of {MAX_METADATA_CHARS} "
                f"characters, not {len(key)} and {len(value)}",
            )
    return values


# ---- objects


def render_file(file: UploadedFile) -> dict[str, Any]:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_s,
        "filename": file.filename,
        "purpose": PURPOSE,
        "status": "processed",
        "expires_at": None,
    }


def render_job(job: TrainingJob) -> dict[str, Any]:
    """``training`` and ``metrics`` are ours; ``error`` and what is not known yet are null."""
    hyperparameters = {
        "n_epochs": job.training["epochs"],
        "batch_size": job.training["batch_size"],
        "learning_rate_multiplier": job.learning_rate_multiplier,
    }
    error = job.error
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": job.created_s,
        "finished_at": job.finished_s,
        "estimated_finish": job.estimated_finish_s,
        "model": job.base,
        "fine_tuned_model": job.adapter_id,
        "user_provided_suffix": job.name,
        "organization_id": job.tenant,
        "status": job.status.value,
        "error": error and {"code": error.code, "message": error.message, "param": None},
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.training["seed"],
        "trained_tokens": job.num_trained_tokens,
        "result_files": [],
        "integrations": [],
        "metadata": dict(job.metadata),
        "training": _finite(job.training),
        "metrics": _finite(job.metrics),
    }


def render_event(job_id: str, event: JobEvent) -> dict[str, Any]:
    """``event`` is ours: what the training itself said, null where the server speaks."""
    return {
        "id": event_id(job_id, event),
        "object": "fine_tuning.job.event",
        "created_at": event.created_s,
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": _finite(event.data),
        "event": _finite(event.told),
    }


def event_id(job_id: str, event: JobEvent) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{event.number}"


def _finite(value: Any) -> Any:
    """Losses may be infinite or no numbers, and JSON has neither."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


# ---- a client's half


def render_create_job(
    training_file: str,
    validation_file: str | None,
    name: str | None,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """``model`` "" is the server's base, whatever it is."""
    said = {"training_file": training_file, "validation_file": validation_file, "suffix": name}
    return {"model": "", **said, "training": dict(training)}


def read_job(body: Mapping[str, Any]) -> TrainingJob:
    error = body["error"]
    return TrainingJob(
        job_id=body["id"],
        tenant=body["organization_id"],
        base=body["model"],
        name=body["user_provided_suffix"],
        training_file=body["training_file"],
        validation_file=body["validation_file"],
        learning_rate_multiplier=body["hyperparameters"]["learning_rate_multiplier"],
        training=body["training"],
        metadata=body["metadata"],
        created_s=body["created_at"],
        status=JobStatus(body["status"]),
        finished_s=body["finished_at"],
        estimated_finish_s=body["estimated_finish"],
        adapter_id=body["fine_tuned_model"],
        num_trained_tokens=body["trained_tokens"],
        error=error and JobError(error["code"], error["message"]),
        metrics=body["metrics"],
    )


# ---- pages


@dataclass(frozen=True)
class Page:
    """``after``: an id on the page before this one, None for the first."""

    after: str | None
    limit: int


def parse_page(query: Mapping[str, str], default_limit: int, max_limit: int) -> Page:
    said = query.get("limit", str(default_limit))
    if not said.isdecimal() or len(said) > 9 or not 1 <= int(said) <= max_limit:
        raise InvalidParameter(
            "limit", f"must be an integer between 1 and {max_limit}. Given: {said[:64]!r}"
        )
    return Page(query.get("after"), int(said))


def render_page(items: list[dict[str, Any]], page: Page) -> dict[str, Any]:
    """What follows ``after`` in ``items``, which have ids; nothing where that is no more."""
    if page.after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == page.after]
        if not places:
            raise InvalidParameter("after", f"is {page.after[:64]!r}, which is not in this list")
        items = items[places[0] + 1 :]
    shown = items[: page.limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > len(shown),
    }
