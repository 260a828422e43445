"""Words for writing down an OpenAPI 3.1 document: fields, objects, operations, and the refusals
that every route of a family shares. Data and functions, no framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Schema = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

_REFUSALS = {
    400: "The body is not strict JSON in UTF-8; under /v1 also: a value is wrong.",
    401: "No API key came with the request, or an unknown one (with --api-keys).",
    403: "The key is not good for this, or the request came by a foreign host or page.",
    404: "No adapter, file or job has this name.",
    408: "The body did not arrive in time.",
    409: "The adapter exists already, is in use, or became another while it was read; a training "
    "cannot be, as this server was started or as it is now.",
    413: "The body is too large.",
    415: "The body's type is not JSON, or it is compressed.",
    422: "A value is wrong, or the adapter's files cannot be served; the message says why.",
    424: "The request failed while it was computed.",
    429: "Too many requests wait; Retry-After says when to come back.",
    500: "The answer was broken off.",
    502: "The remote that the adapter comes from is down, slow or lying.",
    503: "The engine is starting, draining or dead; Retry-After says when to come back.",
    507: "The server's disk is full.",
}
ALWAYS = (401, 403)
BODY = (400, 408, 413, 415, 422)
ADAPTER = (404, 409, 422, 502)
ENGINE = (429, 500, 503)


# Fields. Everything optional may be null, which means "not given".


def _field(kind: str, description: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], "description": description, **more}


def flag(description: str, default: bool = False) -> Schema:
    return _field("boolean", description, default=default)


def text(description: str, **more: Any) -> Schema:
    return _field("string", description, **more)


def whole(low: int, high: int, description: str, **more: Any) -> Schema:
    return _field("integer", description, minimum=low, maximum=high, **more)


def number(low: float, high: float, description: str, **more: Any) -> Schema:
    return _field("number", description, minimum=low, maximum=high, **more)


def above(low: float, high: float, description: str, **more: Any) -> Schema:
    return _field("number", description, exclusiveMinimum=low, maximum=high, **more)


def items(item: Schema, description: str, **more: Any) -> Schema:
    return _field("array", description, items=item, **more)


def mapping(description: str, **more: Any) -> Schema:
    return _field("object", description, **more)


def either(description: str, *schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, {"type": "null"}], "description": description}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def required(schema: Schema) -> Schema:
    """The same field, but for null."""
    if "anyOf" in schema:
        return schema | {"anyOf": [one for one in schema["anyOf"] if one != {"type": "null"}]}
    return schema | {"type": schema["type"][0]}


# Objects.


def obj(properties: Mapping[str, Schema], needed: Iterable[str] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(needed), **more}


def whole_obj(properties: Mapping[str, Schema], **more: Any) -> Schema:
    """One whose keys are always there."""
    return obj(properties, properties, **more)


def request_body(
    properties: Mapping[str, Schema], needed: Iterable[str], refused: Iterable[str] = ()
) -> Schema:
    """``refused``: fields of other servers that are refused by name unless they ask for nothing;
    any other field is ignored."""
    schema = obj(properties, needed)
    if names := sorted(refused):
        schema["description"] = f"Refused unless they ask for nothing: {', '.join(names)}."
        schema["x-refused"] = names
    return schema


def event(data: Schema, **more: Schema) -> Schema:
    """A server-sent event of a stream, whose data is JSON."""
    told = {"type": "string", "contentMediaType": JSON, "contentSchema": data}
    return obj({"data": told, **more}, ("data", *more))


# Operations.


def answer(description: str, *contents: tuple[str, Schema], **more: Any) -> Schema:
    if not contents:
        return {"description": description, **more}
    shown = {media: {"schema": schema} for media, schema in contents}
    return {"description": description, "content": shown, **more}


def operation(
    tag: str,
    summary: str,
    answers: Mapping[int, Schema],
    refusals: Iterable[int] = (),
    *,
    error: str,
    body: str | None = None,
    parameters: Iterable[Schema] = (),
    **more: Any,
) -> Schema:
    """``error`` and ``body`` name schemas. ``refusals`` beside those of every route."""
    refused = {
        status: answer(_REFUSALS[status], (JSON, ref(error))) for status in {*ALWAYS, *refusals}
    }
    for status in (429, 503):
        if status in refused:
            retry = {"description": "seconds", "schema": {"type": "integer"}}
            refused[status]["headers"] = {"Retry-After": retry}
    responses = refused | dict(answers)
    shown: Schema = {
        "tags": [tag],
        "summary": summary,
        "responses": {str(status): responses[status] for status in sorted(responses)},
        **more,
    }
    if parameters:
        shown["parameters"] = list(parameters)
    if body is not None:
        shown["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(body)}}}
    return shown


def in_path(name: str, description: str) -> Schema:
    schema = {"type": "string", "minLength": 1}
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema,
    }


def in_query(name: str, description: str, values: Iterable[str]) -> Schema:
    return query(name, description, {"type": "string", "enum": list(values)})


def query(name: str, description: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema}
