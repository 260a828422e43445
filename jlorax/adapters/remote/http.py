"""HTTP to one remote: no request outlives its deadline, follows a redirect or shows a URL.

Proxies, certificates: as httpx reads them from the environment.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from huggingface_hub import utils

from jlorax.adapters.remote.settings import FetchLimits
from jlorax.errors import SourceUnavailable

hub_utils: Any = utils  # it exports lazily, unseen by type checkers
httpx = hub_utils.httpx  # httpx with huggingface_hub 1, httpx2 with 2: one interface

T = TypeVar("T")
PeerCheck = Callable[[str], None]
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


class TryAgain(Exception):
    """A fault that may be gone at the next try."""

    def __init__(self, reason: str, retry_after_s: float = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining_s(self) -> float:
        return self._end - time.monotonic()


class Http:
    """One remote's requests, each on a connection of its own. Safe for several threads."""

    def __init__(self, remote: str, limits: FetchLimits) -> None:
        self.remote = remote
        self._limits = limits
        # A kept connection would be one that _Connection never saw.
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(follow_redirects=False, limits=pool)

    def retry(self, deadline: Deadline, attempt: Callable[[], T]) -> T:
        """The attempt's result, after some TryAgain at most."""
        for number in range(self._limits.max_tries):
            try:
                return attempt()
            except TryAgain as fault:
                pause_s = max(self._limits.backoff_s * 2**number, fault.retry_after_s)
                is_last = number + 1 == self._limits.max_tries
                if is_last or pause_s > deadline.remaining_s:
                    reason = f"{fault.reason} (tries: {number + 1})"
                    raise SourceUnavailable(self.remote, reason) from fault
            time.sleep(pause_s)
        raise AssertionError("max_tries is at least 1")

    @contextmanager
    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: Deadline,
        check_peer: PeerCheck | None = None,
    ) -> Iterator[Any]:
        """The answer to one request, its body unread; raises TryAgain and SourceUnavailable.

        check_peer: raises for an address that must not be talked to, before a byte is sent.
        """
        connection = _Connection(httpx.URL(url).raw_host.decode(), check_peer)
        timer = threading.Timer(deadline.remaining_s, connection.cut)
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream(
                method,
                url,
                headers={**headers, "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(self._limits.read_s, connect=self._limits.connect_s),
                extensions={"trace": connection.trace},
            ) as response:
                if response.status_code in _RETRIED:
                    raise TryAgain(f"answered {response.status_code}", _retry_after_s(response))
                yield response
            if connection.is_cut:  # a body without a length seems to end there
                raise self._too_late(deadline)
        except httpx.HTTPError as error:
            if connection.is_cut:
                raise self._too_late(deadline) from error
            raise TryAgain(self._reason(error)) from error
        finally:
            timer.cancel()
            connection.close()

    def _too_late(self, deadline: Deadline) -> SourceUnavailable:
        return SourceUnavailable(self.remote, f"took longer than {deadline.seconds:g} s")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, httpx.ConnectTimeout):
            return f"took no connection within {self._limits.connect_s:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"sent nothing for {self._limits.read_s:g} s"
        if isinstance(error, httpx.ConnectError):
            return f"cannot be reached: {error}"
        return f"broke the connection off: {error}"


class _Connection:
    """The socket under a request, told of by httpcore's ``trace`` extension.

    A read timeout alone is no deadline: it begins anew with every byte of a trickling header.
    """

    def __init__(self, host: str, check_peer: PeerCheck | None) -> None:
        self.is_cut = False
        self._host = host
        self._check_peer = check_peer
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.started"):
            if info["host"] != self._host:
                self._check_peer = None  # a proxy: it decides where it may go
            elif self._check_peer is not None:
                for address in addresses(self._host):
                    self._check_peer(address)
        elif event.endswith("connect_tcp.complete"):
            # A duplicate: TLS will take the original over.
            self._socket = info["return_value"].get_extra_info("socket").dup()
            if self._check_peer is not None:  # the name may mean another by now
                self._check_peer(self._socket.getpeername()[0])
            if self.is_cut:
                self.cut()

    def cut(self) -> None:
        """Ends the request wherever it is, from another thread."""
        self.is_cut = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def addresses(host: str) -> list[str]:
    """None for a name that only a proxy knows."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(info[4][0]) for info in found]


def read_at_most(response: Any, max_bytes: int) -> bytes:
    """The body, or its first ``max_bytes + 1`` bytes when it is longer."""
    data = b""
    for chunk in response.iter_raw():
        data += chunk[: max_bytes + 1 - len(data)]
        if len(data) > max_bytes:
            break
    return data


def content_length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def plain_etag(text: str) -> str:
    return text.removeprefix("W/").strip('"')


def _retry_after_s(response: Any) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0


class _WithoutQuery(logging.Filter):
    """httpx logs each URL; a signed one is a key to its file."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                arg.copy_with(query=None) if isinstance(arg, httpx.URL) else arg
                for arg in record.args
            )
        return True


def _is_no_header(record: logging.LogRecord) -> bool:
    """httpcore's debug log would show where a redirect leads."""
    return "receive_response_headers.complete" not in record.getMessage()


logging.getLogger(httpx.__name__).addFilter(_WithoutQuery())
logging.getLogger(httpx.__name__.replace("httpx", "httpcore") + ".http11").addFilter(_is_no_header)
