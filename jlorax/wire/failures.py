"""Errors as JSON, and back into the same exception with the same numbers.

Both route families carry ``code`` (the stable word of errors.py) and ``details`` (the exception's
own attributes) beside what their clients expect. Statuses are not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlorax import errors
from jlorax.errors import JLoraxError
from jlorax.wire.strict_json import MalformedBody

_ERROR_TYPES = {
    "validation": "Input validation error: ",
    "generation": "Request failed during generation: ",
}
_V1_CODES = {"adapter_not_found": "model_not_found", "prompt_too_long": "context_length_exceeded"}
_KINDS: dict[str, type[JLoraxError]] = {
    kind.code: kind
    for kind in reversed([*vars(errors).values(), MalformedBody])  # a parent's code is its own
    if isinstance(kind, type) and issubclass(kind, JLoraxError)
}
_KINDS |= {spoken: _KINDS[code] for code, spoken in _V1_CODES.items()}


def render_native_error(error: JLoraxError, error_type: str) -> dict[str, Any]:
    """LoRAX's two keys, its prefix, and ours."""
    return {
        "error": _ERROR_TYPES.get(error_type, "") + str(error),
        "error_type": error_type,
        "code": error.code,
        "details": _details(error),
    }


def render_openai_error(error: JLoraxError, error_type: str) -> dict[str, Any]:
    body = {
        "message": str(error),
        "type": error_type,
        "param": error.name if isinstance(error, errors.InvalidParameter) else None,
        "code": _V1_CODES.get(error.code, error.code),
        "details": _details(error),
    }
    return {"error": body}


def read_error(status: int, body: object, retry_after_s: float | None = None) -> JLoraxError:
    """The typed error of an answer of either family; by status where another server answered."""
    message, code, details = _parts(body)
    kind = _KINDS.get(code) or _kind_of_status(status)
    error = JLoraxError.__new__(kind)
    Exception.__init__(error, message or f"the server answered {status}")
    if issubclass(kind, errors.Overloaded | errors.Unavailable):
        vars(error)["retry_after_s"] = 1.0 if retry_after_s is None else retry_after_s
    vars(error).update(details)
    return error


def _details(error: JLoraxError) -> dict[str, Any]:
    """The exception's attributes that JSON can say."""
    said = {name: v for name, v in vars(error).items() if isinstance(v, str | int | float)}
    said.pop("code", None)
    return said


def _parts(body: object) -> tuple[str, str, Mapping[str, Any]]:
    if not isinstance(body, dict):
        return "", "", {}
    inner = body.get("error")
    source = inner if isinstance(inner, dict) else body
    message = str(source.get("message") if isinstance(inner, dict) else inner or "")
    for prefix in _ERROR_TYPES.values():
        message = message.removeprefix(prefix)
    details = source.get("details")
    return message, str(source.get("code")), details if isinstance(details, dict) else {}


def _kind_of_status(status: int) -> type[JLoraxError]:
    kinds: dict[int, type[JLoraxError]] = {
        401: errors.Unauthorized,
        403: errors.Forbidden,
        404: errors.AdapterNotFound,
        409: errors.AdapterConflict,
        429: errors.Overloaded,
        499: errors.RequestCancelled,
        503: errors.Unavailable,
    }
    return kinds.get(status, errors.InvalidRequest if 400 <= status < 500 else JLoraxError)
