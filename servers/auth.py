"""Who asks, and whether they may.

A key's tenant goes to the engine with every call. What a key must be good for is bound to the
handler that the router found, never to the text of a path or a Host, which a client can bend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import hdrs, web

from jlorax.config import ApiKey, Scope
from jlorax.errors import Forbidden, Unauthorized
from servers import (
    adapters,
    embeddings,
    files,
    fine_tuning,
    models,
    native,
    openai,
    openapi,
    responses,
    tokens,
)
from servers.keys import digest_of
from servers.serving import CONFIG, TENANT

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DEFAULT_TENANT = "default"
_API_KEY = "X-Api-Key"
_BEARER = "bearer"

_INFER = frozenset({Scope.INFER})
_ADMIN = frozenset({Scope.ADMIN})
_ANY = frozenset(Scope)

# one of the scopes is needed; None: no key at all
NEEDS: Mapping[Handler, frozenset[Scope] | None] = {
    native.compat_generate: _INFER,
    native.generate: _INFER,
    native.generate_stream: _INFER,
    tokens.tokenize: _INFER,
    tokens.detokenize: _INFER,
    native.embed: _INFER,
    native.classify: _INFER,
    native.classify_batch: _INFER,
    native.info: _INFER,
    native.health: None,
    native.startup: _ANY,
    native.metrics: _ANY,  # they name no tenant and no adapter
    openai.completions: _INFER,
    openai.chat_completions: _INFER,
    responses.responses: _INFER,
    embeddings.embeddings: _INFER,
    models.models: _INFER,
    models.model: _INFER,
    openapi.show_document: _ANY,
    openapi.show_page: None,  # it says nothing of its own
    adapters.adapters: _INFER,
    adapters.load_adapter: _ADMIN,
    adapters.prefetch_adapter: _ADMIN,
    adapters.pin_adapter: _ADMIN,
    adapters.unpin_adapter: _ADMIN,
    adapters.unload_adapter: _ADMIN,
    adapters.load_lora_adapter: _ADMIN,
    adapters.unload_lora_adapter: _ADMIN,
    files.create_file: _ADMIN,
    files.files: _ADMIN,
    files.file: _ADMIN,
    files.delete_file: _ADMIN,
    files.file_content: _ADMIN,
    fine_tuning.create_job: _ADMIN,
    fine_tuning.jobs: _ADMIN,
    fine_tuning.job: _ADMIN,
    fine_tuning.cancel_job: _ADMIN,
    fine_tuning.job_events: _ADMIN,
}


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """401 without a known key, 403 for one that is not good for this; tells strangers nothing of
    what routes there are. ``/health`` is open, ``/metrics`` for any key."""
    keys = request.app[CONFIG].api_keys
    if keys is None:
        request[TENANT] = DEFAULT_TENANT
    elif (needed := _needed(request.match_info)) is not None:
        request[TENANT] = _checked(keys, _key_in(request), needed).tenant
    return await handler(request)


def _needed(found: web.UrlMappingMatchInfo) -> frozenset[Scope] | None:
    """Who has a key learns that there is no such route or method."""
    return _ANY if found.http_exception is not None else NEEDS[found.route.handler]


def _key_in(request: web.Request) -> str:
    """The bearer token, or else ``x-api-key``; "" when there is neither."""
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return key.strip() if scheme.lower() == _BEARER else request.headers.get(_API_KEY, "")


def _checked(keys: Mapping[bytes, ApiKey], key: str, needed: frozenset[Scope]) -> ApiKey:
    """Compared by hash alone, so that the time it takes says nothing of any key."""
    known = keys.get(digest_of(key))
    if known is None:
        reason = "this API key is not known" if key else "an API key is needed"
        raise Unauthorized(f"{reason}: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
    if not known.scopes & needed:
        scopes = " or ".join(sorted(scope.value for scope in needed))
        raise Forbidden(f"this API key is not good for that: it needs the scope {scopes!r}")
    return known
