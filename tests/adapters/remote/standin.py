"""A stand-in hub on loopback: the routes that a download uses, and ways to misbehave.

It answers as huggingface.co does: small files itself, large ones by a redirect to a file store of
another origin, whose URLs are signed; missing things by X-Error-Code.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_nobody_may_see"
SIGNATURE = "X-Amz-Signature=a-signature-that-nobody-may-see"
_RESOLVE = re.compile(r"/(?P<repo>.+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(Request(self.command, self.path, self.headers))
        with suppress(ConnectionError, ssl.SSLError):  # the client may leave at any time
            action = self.server.plan.popleft() if self.server.plan else self.server.answer
            action(self)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """With the length of the body, unless the headers give another."""
        self.begin(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


Action = Callable[[Handler], None]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Message


class Server(ThreadingHTTPServer):
    """``plan``: what the next requests get instead of ``answer``."""

    daemon_threads = True

    def __init__(self, answer: Action, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.answer = answer
        self.plan: deque[Action] = deque()
        self.requests: list[Request] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self.shutdown()
            thread.join()
            self.server_close()


@dataclass
class Repo:
    """Commits by sha, and what the branches and tags mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        content = hashlib.sha1(str(len(self.commits)).encode())
        for name, data in sorted(files.items()):
            content.update(name.encode() + data)
        self.commits[content.hexdigest()] = dict(files)
        self.refs[ref] = content.hexdigest()
        return content.hexdigest()


class Hub:
    """The hub and its file store: two servers, two origins.

    ``certificate``: a file with key and certificate for 127.0.0.1; both servers speak TLS then.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_from = 1024  # bytes
        self.api = Server(self._resolve, certificate)
        self.store = Server(self._stored, certificate)

    @contextmanager
    def running(self) -> Iterator[Hub]:
        with ExitStack() as stack:
            stack.enter_context(self.api.running())
            stack.enter_context(self.store.running())
            yield self

    def _resolve(self, request: Handler) -> None:
        match = _RESOLVE.fullmatch(urlsplit(request.path).path)
        repo = self.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            return request.reply(401, {"X-Error-Code": "RepoNotFound"})
        if repo.is_gated:
            return request.reply(403, {"X-Error-Code": "GatedRepo"}, b"ask for access")
        revision = unquote(match["revision"])
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return request.reply(404, {"X-Error-Code": "RevisionNotFound"})
        said = {"X-Repo-Commit": commit}
        data = repo.commits[commit].get(match["file"])
        if data is None:
            return request.reply(404, {**said, "X-Error-Code": "EntryNotFound"})
        if len(data) < self.large_from:
            git_id = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            return request.reply(200, {**said, "ETag": f'"{git_id}"'}, data)
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        location = f"{self.store.url}/{sha256}?{SIGNATURE}"
        return request.reply(302, {**said, **linked, "Location": location}, b"Found")

    def _stored(self, request: Handler) -> None:
        send_range(request, self.stored_data(request))

    def stored_data(self, request: Handler) -> bytes:
        sha256 = urlsplit(request.path).path.strip("/")
        files = [
            f for repo in self.repos.values() for c in repo.commits.values() for f in c.values()
        ]
        return next(data for data in files if hashlib.sha256(data).hexdigest() == sha256)


def send_range(request: Handler, data: bytes) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if asked is None:
        return request.reply(200, {"ETag": '"of-the-store"'}, data)
    start = int(asked[1])
    content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return request.reply(206, {"Content-Range": content_range}, data[start:])


def answers(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Action:
    return lambda request: request.reply(status, headers or {}, body)


def sends_whole(data: bytes) -> Action:
    """Whatever range was asked for."""
    return answers(200, body=data)


def breaks_off(data: bytes, after: int) -> Action:
    """Says the whole length, or that of the range, and closes the connection early."""

    def action(request: Handler) -> None:
        request.begin(200, {"Content-Length": str(len(data))})
        request.wfile.write(data[:after])
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)

    return action


def sends_without_length(data: bytes) -> Action:
    def action(request: Handler) -> None:
        request.begin(200, {"Connection": "close"})
        request.wfile.write(data)

    return action


def trickles_body(length: int | None) -> Action:
    """A byte now and then until the client leaves. None: a body that ends with the connection."""
    end = {"Connection": "close"} if length is None else {"Content-Length": str(length)}

    def action(request: Handler) -> None:
        request.begin(200, {**end, "X-Repo-Commit": "a" * 40})
        _trickle(request)

    return action


def trickles_headers(request: Handler) -> None:
    """A header without an end."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
    _trickle(request)


def says_nothing(request: Handler) -> None:
    request.server.closing.wait()


def _trickle(request: Handler) -> None:
    while not request.server.closing.wait(0.02):
        request.wfile.write(b"a")
        request.wfile.flush()
