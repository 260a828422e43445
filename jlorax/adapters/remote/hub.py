"""Adapters of a Hugging Face hub: ``org/name`` or ``org/name@revision``.

    GET  /org/name/resolve/<revision>/adapter_config.json          -> the commit, and the config
    HEAD /org/name/resolve/<commit>/adapter_model.safetensors      -> size and digest
    GET  the same                                                  -> the weights

Everything after the first answer names its commit, so the two files belong together. Not
``hf_hub_download``: it follows any redirect, takes a file of any size and has no deadline.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HFValidationError

from jlorax.adapters.files import CONFIG_FILE, MAX_CONFIG_BYTES, UNSAFE_FILES, WEIGHTS_FILE
from jlorax.adapters.remote.download import both_or_none, download
from jlorax.adapters.remote.http import (
    Deadline,
    Http,
    TryAgain,
    addresses,
    content_length,
    httpx,
    hub_utils,
    plain_etag,
    read_at_most,
)
from jlorax.adapters.remote.settings import FetchLimits
from jlorax.adapters.remote.source import (
    CHANGED,
    Described,
    check_path,
    check_weights_size,
    config_too_large,
    weights_missing,
)
from jlorax.errors import (
    AdapterGated,
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
    SourceUnavailable,
)

MAX_REDIRECTS = 5
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BAD_TOKEN = "Invalid credentials in Authorization header"
_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_SAID_BY_THE_HUB = ("X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size")


@dataclass(frozen=True)
class _Answer:
    """``said``: the hub's own headers, also when a file store sends the bytes."""

    response: Any
    said: Mapping[str, str]

    @property
    def etag(self) -> str:
        return plain_etag(self.said.get("X-Linked-Etag") or self.response.headers.get("ETag", ""))

    @property
    def size(self) -> int | None:
        linked = self.said.get("X-Linked-Size", "")
        if linked.isascii() and linked.isdigit():
            return int(linked)
        return None if self.response.is_redirect else content_length(self.response)


class HubSource:
    """The hub that HF_ENDPOINT names, with the token that huggingface_hub finds."""

    def __init__(self, name: str, limits: FetchLimits, endpoint: str | None = None) -> None:
        self._name = name
        self._limits = limits
        self._endpoint = endpoint or constants.ENDPOINT
        self._http = Http(name, limits)

    def describe(self, adapter_id: str) -> Described:
        self._check_online()
        repo, revision = _split(adapter_id)
        deadline = Deadline(self._limits.describe_s)
        commit, config = self._http.retry(
            deadline, lambda: self._config(adapter_id, repo, revision, deadline)
        )
        found = self._head(adapter_id, repo, commit, WEIGHTS_FILE, deadline)
        if found is None:
            raise weights_missing(adapter_id, self._unsafe(adapter_id, repo, commit, deadline))
        if found.size is None:
            raise SourceUnavailable(self._name, "did not say how many bytes the weights have")
        # A large file's ETag is its sha256. A small one's is git's, but a mirror's may be its own.
        digest = f"sha256:{found.etag}" if _SHA256.fullmatch(found.etag) else None
        return Described(f"hub:{commit}", config, found.size, found.etag, digest)

    def fetch(self, adapter_id: str, described: Described, folder: Path, max_bytes: int) -> None:
        self._check_online()
        check_weights_size(adapter_id, described, max_bytes)
        repo, _ = _split(adapter_id)
        url = self._url(adapter_id, repo, described.identity.removeprefix("hub:"), WEIGHTS_FILE)
        deadline = Deadline(self._limits.overall_s)

        def open_at(offset: int) -> AbstractContextManager[Any]:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            return self._open_body(adapter_id, url, deadline, headers)

        try:
            with both_or_none(folder, self._name, described.config) as path:
                download(self._http, described, path, open_at, self._limits, deadline)
        except AdapterNotFound as error:
            raise AdapterInvalid(adapter_id, WEIGHTS_FILE, CHANGED) from error

    def _check_online(self) -> None:
        if constants.is_offline_mode():
            raise SourceUnavailable(self._name, "is not asked: HF_HUB_OFFLINE is set")

    def _config(
        self, adapter_id: str, repo: str, revision: str | None, deadline: Deadline
    ) -> tuple[str, bytes]:
        """(commit, adapter_config.json) of what the revision means now."""
        url = self._url(adapter_id, repo, revision, CONFIG_FILE)
        with self._open(adapter_id, "GET", url, deadline) as answer:
            commit = answer.said.get("X-Repo-Commit", "")
            if not _COMMIT.fullmatch(commit):
                raise SourceUnavailable(self._name, "is no hub: its answer names no commit")
            config = read_at_most(answer.response, MAX_CONFIG_BYTES)
        if len(config) > MAX_CONFIG_BYTES:
            raise config_too_large(adapter_id)
        return commit, config

    def _head(
        self, adapter_id: str, repo: str, commit: str, file: str, deadline: Deadline
    ) -> _Answer | None:
        """None: the commit has no such file."""
        url = self._url(adapter_id, repo, commit, file)

        def attempt() -> _Answer:
            with self._open(adapter_id, "HEAD", url, deadline) as answer:
                return answer

        try:
            return self._http.retry(deadline, attempt)
        except AdapterGated:
            raise
        except AdapterNotFound:
            return None

    def _unsafe(self, adapter_id: str, repo: str, commit: str, deadline: Deadline) -> str | None:
        for file in UNSAFE_FILES:
            if self._head(adapter_id, repo, commit, file, deadline) is not None:
                return file
        return None

    def _url(self, adapter_id: str, repo: str, revision: str | None, file: str) -> str:
        try:
            return hf_hub_url(repo, file, revision=revision, endpoint=self._endpoint)
        except HFValidationError:
            raise InvalidAdapterId(
                f"{adapter_id!r} is no adapter id of a hub: it must be org/name or "
                "org/name@revision"
            ) from None

    @contextmanager
    def _open_body(
        self, adapter_id: str, url: str, deadline: Deadline, headers: Mapping[str, str]
    ) -> Iterator[Any]:
        with self._open(adapter_id, "GET", url, deadline, headers) as answer:
            yield answer.response

    @contextmanager
    def _open(
        self,
        adapter_id: str,
        method: str,
        url: str,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[_Answer]:
        """Follows the hub's redirects: to itself, and to where it keeps large files.

        What the hub says of a file stands on its own answer, so a HEAD never leaves it.
        """
        said: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS + 1):
            with self._open_one(method, url, deadline, headers or {}) as response:
                if is_ours := self._is_hub(url):
                    said = {k: v for k in _SAID_BY_THE_HUB if (v := response.headers.get(k))} | said
                target = self._redirected(url, response)
                if target is None or (method == "HEAD" and not self._is_hub(target)):
                    self._check_status(adapter_id, response, is_ours)
                    yield _Answer(response, said)
                    return
            url = target
        raise SourceUnavailable(self._name, f"redirected more than {MAX_REDIRECTS} times")

    def _open_one(
        self, method: str, url: str, deadline: Deadline, headers: Mapping[str, str]
    ) -> AbstractContextManager[Any]:
        """The token goes to the hub alone."""
        if self._is_hub(url):
            ours = hub_utils.build_hf_headers()
            return self._http.open(method, url, {**ours, **headers}, deadline)
        return self._http.open(method, url, headers, deadline, self._check_peer)

    def _is_hub(self, url: str) -> bool:
        return _origin(url) == _origin(self._endpoint)

    def _redirected(self, url: str, response: Any) -> str | None:
        """Where the answer leads. None: it is no redirect."""
        if not response.is_redirect:
            return None
        location: str = response.headers.get("Location", "")
        try:
            target = urljoin(url, location)
            scheme, host, _ = _origin(target)
        except (ValueError, httpx.InvalidURL):
            raise SourceUnavailable(self._name, "redirected to what is no URL") from None
        allowed = ("https",) if _origin(url)[0] == "https" else ("http", "https")
        if scheme not in allowed or not host:
            raise SourceUnavailable(self._name, f"redirected to a {scheme or 'nameless'} URL")
        return target

    def _check_peer(self, address: str) -> None:
        """A redirect may not reach into networks that the hub is not in itself."""
        kind = network_kind(address)
        own = {network_kind(a) for a in addresses(_origin(self._endpoint)[1])}
        if kind != "global" and kind not in own:
            raise SourceUnavailable(self._name, f"redirected to a {kind} address, {address}")

    def _check_status(self, adapter_id: str, response: Any, is_ours: bool) -> None:
        status, headers = response.status_code, response.headers
        if status < 400:
            return
        if not is_ours:  # an old signature, or a store of its own trouble
            raise TryAgain(f"has a file store that answered {status}")
        if headers.get("X-Error-Code") == "GatedRepo":
            raise AdapterGated(adapter_id, self._name)
        if status == 401 and headers.get("X-Error-Message") == _BAD_TOKEN:
            raise SourceUnavailable(self._name, "does not accept this server's token")
        if status in (401, 404):  # 401: also what is not there, to who is not logged in
            raise AdapterNotFound(adapter_id)
        raise SourceUnavailable(self._name, f"answered {status}")


def network_kind(address: str) -> str:
    """One of "global", "loopback", "link-local", "private" and "reserved"."""
    ip = _as_ipv4(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_loopback or ip.is_unspecified:
        return "loopback"
    if ip.is_link_local:
        return "link-local"
    if ip.is_multicast or ip.is_reserved:
        return "reserved"
    if ip.is_private:
        return "private"
    return "global" if ip.is_global else "reserved"


def _as_ipv4(ip: _Ip) -> _Ip:
    """What an IPv6 address stands for on a machine that reaches IPv4 through it."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip
    return ip


def _split(adapter_id: str) -> tuple[str, str | None]:
    """(repository, revision) of ``org/name@revision``."""
    repo, has_revision, revision = adapter_id.partition("@")
    check_path(adapter_id, repo)
    if not has_revision:
        return repo, None
    check_path(adapter_id, revision)
    if ".." in revision or revision.startswith("-"):
        raise InvalidAdapterId(f"{adapter_id!r} is no adapter id: {revision!r} is no revision")
    return repo, revision


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port
