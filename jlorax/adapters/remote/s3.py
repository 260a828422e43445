"""Adapters of an S3 bucket: ``some/path`` below the remote's prefix.

obstore finds the credentials and signs; the requests are ours, since its client follows any
redirect and cannot be stopped while a slow answer trickles in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from jlorax.adapters.files import CONFIG_FILE, MAX_CONFIG_BYTES, UNSAFE_FILES, WEIGHTS_FILE
from jlorax.adapters.remote.download import both_or_none, download
from jlorax.adapters.remote.http import Deadline, Http, content_length, plain_etag, read_at_most
from jlorax.adapters.remote.settings import FetchLimits, S3Location
from jlorax.adapters.remote.source import (
    CHANGED,
    Described,
    check_path,
    check_weights_size,
    config_too_large,
    weights_missing,
)
from jlorax.errors import AdapterInvalid, AdapterNotFound, SourceUnavailable

_MD5 = re.compile(r"[0-9a-f]{32}")
_SIGNATURE_LIFE = timedelta(minutes=5)
_MAX_ERROR_BYTES = 4096


@dataclass(frozen=True)
class _Object:
    """What S3 says of one object."""

    etag: str
    size_bytes: int
    is_etag_md5: bool

    @property
    def key(self) -> str:
        return f"{self.etag}:{self.size_bytes}"


class S3Source:
    """Credentials, and what the location leaves open: from the environment (AWS_...)."""

    def __init__(self, name: str, location: S3Location, limits: FetchLimits) -> None:
        self._name = name
        self._location = location
        self._limits = limits
        self._http = Http(name, limits)
        self._store = _store(location, limits)

    def describe(self, adapter_id: str) -> Described:
        check_path(adapter_id, adapter_id)
        deadline = Deadline(self._limits.describe_s)
        config, config_object = self._http.retry(
            deadline, lambda: self._config(adapter_id, deadline)
        )
        weights = self._head(adapter_id, WEIGHTS_FILE, deadline)
        if weights is None:
            raise weights_missing(adapter_id, self._unsafe(adapter_id, deadline))
        return Described(
            identity=f"s3:{config_object.key}:{weights.key}",
            config=config,
            weights_bytes=weights.size_bytes,
            weights_etag=weights.etag,
            weights_digest=f"md5:{weights.etag}" if weights.is_etag_md5 else None,
        )

    def fetch(self, adapter_id: str, described: Described, folder: Path, max_bytes: int) -> None:
        check_path(adapter_id, adapter_id)
        check_weights_size(adapter_id, described, max_bytes)
        deadline = Deadline(self._limits.overall_s)

        def open_at(offset: int) -> AbstractContextManager[Any]:
            return self._open_weights(adapter_id, described.weights_etag, offset, deadline)

        try:
            with both_or_none(folder, self._name, described.config) as path:
                download(self._http, described, path, open_at, self._limits, deadline)
                self._check_config(adapter_id, described, deadline)
        except AdapterNotFound as error:
            raise AdapterInvalid(adapter_id, WEIGHTS_FILE, CHANGED) from error

    def _config(self, adapter_id: str, deadline: Deadline) -> tuple[bytes, _Object]:
        with self._open("GET", adapter_id, CONFIG_FILE, deadline) as response:
            found = self._object(response)
            if found.size_bytes > MAX_CONFIG_BYTES:
                raise config_too_large(adapter_id)
            return read_at_most(response, MAX_CONFIG_BYTES), found

    def _check_config(self, adapter_id: str, described: Described, deadline: Deadline) -> None:
        """An upload between the two answers of ``describe`` may have given us one file of each."""
        found = self._head(adapter_id, CONFIG_FILE, deadline)
        if found is None or not described.identity.startswith(f"s3:{found.key}:"):
            raise AdapterInvalid(adapter_id, CONFIG_FILE, CHANGED)

    def _head(self, adapter_id: str, file: str, deadline: Deadline) -> _Object | None:
        """None: it is not there."""

        def attempt() -> _Object:
            with self._open("HEAD", adapter_id, file, deadline) as response:
                return self._object(response)

        try:
            return self._http.retry(deadline, attempt)
        except AdapterNotFound:
            return None

    def _unsafe(self, adapter_id: str, deadline: Deadline) -> str | None:
        for file in UNSAFE_FILES:
            if self._head(adapter_id, file, deadline) is not None:
                return file
        return None

    @contextmanager
    def _open_weights(
        self, adapter_id: str, etag: str, offset: int, deadline: Deadline
    ) -> Iterator[Any]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._open("GET", adapter_id, WEIGHTS_FILE, deadline, headers) as response:
            # Looked at here, since not every S3 knows If-Match.
            if plain_etag(response.headers.get("ETag", "")) != etag:
                raise AdapterInvalid(adapter_id, WEIGHTS_FILE, CHANGED)
            yield response

    def _object(self, response: Any) -> _Object:
        headers = response.headers
        etag, size = plain_etag(headers.get("ETag", "")), content_length(response)
        if not etag or size is None:
            raise SourceUnavailable(self._name, "did not say an object's ETag and length")
        # With a key of KMS the ETag is no digest of the content.
        encryption = headers.get("x-amz-server-side-encryption", "AES256")
        is_md5 = _MD5.fullmatch(etag) is not None and encryption == "AES256"
        return _Object(etag, size, is_md5)

    @contextmanager
    def _open(
        self,
        method: str,
        adapter_id: str,
        file: str,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Any]:
        url = self._url(method, f"{adapter_id}/{file}")
        with self._http.open(method, url, headers or {}, deadline) as response:
            self._check_status(adapter_id, response)
            yield response

    def _url(self, method: Any, path: str) -> str:
        """Signed for this one request."""
        prefix = self._location.prefix
        key = f"{prefix}/{path}" if prefix else path
        try:
            url = obstore.sign(self._store, method, key, _SIGNATURE_LIFE)
        except (BaseError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise SourceUnavailable(self._name, f"has no credentials: {reason}") from None
        return url.partition("?")[0] if self._location.anonymous else url

    def _check_status(self, adapter_id: str, response: Any) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status == 404 and b"NoSuchBucket" not in read_at_most(response, _MAX_ERROR_BYTES):
            raise AdapterNotFound(adapter_id)
        raise SourceUnavailable(self._name, f"answered {status}{_HINTS.get(status, '')}")


_REDIRECT = ": its bucket belongs to another region or endpoint"
_HINTS = {
    301: _REDIRECT,
    302: _REDIRECT,
    307: _REDIRECT,
    308: _REDIRECT,
    403: ": the credentials may not read there, or may not list and nothing is there",
    404: ": there is no such bucket",
}


def _store(location: S3Location, limits: FetchLimits) -> S3Store:
    options: dict[str, Any] = {"endpoint": location.endpoint, "region": location.region}
    if location.anonymous:  # only to build the URL; its signature is taken off
        options |= {"access_key_id": "anonymous", "secret_access_key": "anonymous"}
    return S3Store(
        location.bucket,
        **{key: value for key, value in options.items() if value is not None},
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "timeout": timedelta(seconds=limits.read_s),
        },
        retry_config={
            "max_retries": limits.max_tries - 1,
            "retry_timeout": timedelta(seconds=limits.describe_s),
        },
    )
