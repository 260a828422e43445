"""Adapters from S3: moto's server, and a liar where moto is too honest."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from jlorax.adapters.remote import Described, FetchLimits, RemoteSource, open_remote, parse_remote
from jlorax.errors import AdapterInvalid, AdapterNotFound, InvalidAdapterId, SourceUnavailable
from tests.adapters.remote.standin import Action, Handler, Server, answers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DATA = bytes(range(256)) * 1024  # 256 KiB
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: DATA}
LIMITS = FetchLimits(read_s=5, describe_s=30, overall_s=60, backoff_s=0.001)
SECRET = "a-secret-key-that-nobody-may-see"
ETAG = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str, request: pytest.FixtureRequest) -> S3Store:
    """A bucket of the test's own, with an adapter in it."""
    name = hashlib.sha1(request.node.name.encode()).hexdigest()[:20]
    store = store_of(moto, name)
    urlopen(Request(f"{moto}/{name}", method="PUT")).close()
    put(store, "team/pirate", FILES)
    return store


def store_of(endpoint: str, bucket: str) -> S3Store:
    options = {"access_key_id": "x", "secret_access_key": "x", "region": "us-east-1"}
    return S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True}, **options)


def put(store: S3Store, folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        obstore.put(store, f"{folder}/{name}", data, use_multipart=False)


def source_at(endpoint: str, bucket: str, options: str = "", prefix: str = "team") -> RemoteSource:
    url = f"s3://{bucket}/{prefix}?endpoint={endpoint}{options}"
    return open_remote(parse_remote("store", url), LIMITS)


@pytest.fixture
def source(moto: str, bucket: S3Store) -> RemoteSource:
    return source_at(moto, bucket.config["bucket"])


def fetch(source: RemoteSource, described: Described, folder: Path) -> None:
    source.fetch("pirate", described, folder, len(DATA))


def assert_changed(source: RemoteSource, described: Described, folder: Path) -> None:
    with pytest.raises(AdapterInvalid, match="changed while it was loaded"):
        fetch(source, described, folder)
    assert os.listdir(folder) == []


# --- against moto's server ---------------------------------------------------------------------


def test_an_adapter_is_described_and_fetched(source: RemoteSource, tmp_path: Path) -> None:
    described = source.describe("pirate")
    fetch(source, described, tmp_path)

    identity = f"s3:{hashlib.md5(FILES[CONFIG]).hexdigest()}:8:{ETAG}:{len(DATA)}"
    assert described == Described(identity, FILES[CONFIG], len(DATA), ETAG, f"md5:{ETAG}")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == FILES


def test_deeper_paths_and_odd_names_stay_below_the_prefix(
    bucket: S3Store, source: RemoteSource, tmp_path: Path
) -> None:
    name = "a/ü b@2?versions#x+y"
    put(bucket, f"team/{name}", FILES)
    source.fetch(name, source.describe(name), tmp_path, len(DATA))
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_the_whole_bucket_without_a_prefix(moto: str, bucket: S3Store) -> None:
    source = source_at(moto, bucket.config["bucket"], prefix="")
    assert source.describe("team/pirate").config == FILES[CONFIG]


def test_equal_content_is_one_identity_and_another_is_another(
    bucket: S3Store, source: RemoteSource
) -> None:
    before = source.describe("pirate").identity
    put(bucket, "team/pirate", FILES)
    assert source.describe("pirate").identity == before
    put(bucket, "team/pirate", {CONFIG: b'{"r": 9}'})
    with_config = source.describe("pirate").identity
    put(bucket, "team/pirate", {WEIGHTS: DATA[::-1]})
    assert len({before, with_config, source.describe("pirate").identity}) == 3


def test_an_upload_of_parts_has_no_md5(
    bucket: S3Store, source: RemoteSource, tmp_path: Path
) -> None:
    obstore.put(bucket, f"team/pirate/{WEIGHTS}", DATA, use_multipart=True)
    described = source.describe("pirate")
    fetch(source, described, tmp_path)
    assert described.weights_digest is None
    assert described.weights_etag.endswith("-1")
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


@pytest.mark.parametrize("files", [{}, {WEIGHTS: DATA}])
def test_what_is_not_there(bucket: S3Store, source: RemoteSource, files: dict[str, bytes]) -> None:
    put(bucket, "team/other", files)
    with pytest.raises(AdapterNotFound) as caught:
        source.describe("other")
    assert caught.value.adapter_id == "other"


def test_a_bucket_that_is_not_there_is_no_unknown_adapter(moto: str) -> None:
    with pytest.raises(SourceUnavailable, match="there is no such bucket"):
        source_at(moto, "no-such-bucket").describe("pirate")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({CONFIG: b"{}"}, "is missing$"),
        ({CONFIG: b"{}", "adapter_model.bin": DATA}, "adapter_model.bin is an unsafe format"),
    ],
)
def test_no_safe_weights(
    bucket: S3Store, source: RemoteSource, files: dict[str, bytes], reason: str
) -> None:
    put(bucket, "team/other", files)
    with pytest.raises(AdapterInvalid, match=reason):
        source.describe("other")


def test_a_huge_config(bucket: S3Store, source: RemoteSource) -> None:
    put(bucket, "team/pirate", {CONFIG: bytes(5 * 2**20)})
    with pytest.raises(AdapterInvalid, match="more than 4194304 bytes"):
        source.describe("pirate")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("data", [b"x" * 8, None])
def test_another_content_since_it_was_described(
    bucket: S3Store, source: RemoteSource, tmp_path: Path, file: str, data: bytes | None
) -> None:
    described = source.describe("pirate")
    if data is None:
        obstore.delete(bucket, f"team/pirate/{file}")
    else:
        put(bucket, "team/pirate", {file: data})
    assert_changed(source, described, tmp_path)


def test_weights_above_the_limit(source: RemoteSource, tmp_path: Path) -> None:
    described = source.describe("pirate")
    with pytest.raises(AdapterInvalid, match=f"it has {len(DATA)} bytes, more than the 1000"):
        source.fetch("pirate", described, tmp_path, 1000)
    assert os.listdir(tmp_path) == []


def test_a_broken_transfer_is_resumed(moto: str, bucket: S3Store, tmp_path: Path) -> None:
    with CuttingProxy(moto) as proxy:
        source = source_at(proxy.url, bucket.config["bucket"])
        described = source.describe("pirate")
        proxy.cut_after = 100_000
        fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA
    ranges = [line for line in proxy.asked if line.lower().startswith(b"range")]
    assert len(ranges) == 1
    assert int(ranges[0].split(b"=")[1].strip(b"-")) > 50_000


class CuttingProxy:
    """Passes connections on, and closes one after so many bytes of its answer."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> CuttingProxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.create_connection(self._target) as server:
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """One request and its answer; the request has no body."""
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += client.recv(65536)
        self.asked += request.split(b"\r\n")
        server.sendall(request.replace(b"keep-alive", b"close"))
        left = self.cut_after
        self.cut_after = None
        while data := server.recv(65536):
            client.sendall(data if left is None else data[:left])
            left = None if left is None else left - len(data)
            if left is not None and left <= 0:
                return


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter_id",
    ["..", "../other", "a/../../other", "a/..", "./a", "a//b", "/a", "a/", "", "a\nb", "a/\u202eb"],
)
def test_an_id_that_might_leave_the_prefix(source: RemoteSource, adapter_id: str) -> None:
    with pytest.raises(InvalidAdapterId):
        source.describe(adapter_id)
    described = Described("s3:a:1:b:1", b"", 1, "b", None)
    with pytest.raises(InvalidAdapterId):
        source.fetch(adapter_id, described, Path("/nowhere"), 1)


# --- against a server that lies ----------------------------------------------------------------


@pytest.fixture
def liar() -> Iterator[Server]:
    """An S3 of two objects; ``plan`` says how it misbehaves."""

    def answer(request: Handler) -> None:
        data = FILES[request.path.partition("?")[0].rpartition("/")[2]]
        request.reply(200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, data)

    with Server(answer).running() as server:
        yield server


def fetch_fails(liar: Server, actions: list[Action], folder: Path) -> str:
    source = source_at(liar.url, "models")
    described = source.describe("pirate")
    liar.plan += actions
    with pytest.raises(SourceUnavailable) as caught:
        fetch(source, described, folder)
    assert os.listdir(folder) == []
    assert "Signature" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        ([answers(503)] * 3, r"answered 503 (tries: 3)"),
        (
            [answers(200, {"ETag": ETAG}, DATA[:-1])],
            f"said the weights have {len(DATA)} bytes, but then",
        ),
        (
            [answers(200, {"ETag": ETAG}, DATA[:-1] + b"x")],
            "sent weights of another md5 digest than it said",
        ),
        ([answers(403)], "answered 403: the credentials may not read there"),
        ([answers(302, {"Location": "http://169.254.169.254/"})], "answered 302: its bucket"),
    ],
    ids=["down", "length", "digest", "forbidden", "redirect"],
)
def test_a_lying_server(liar: Server, tmp_path: Path, actions: list[Action], reason: str) -> None:
    assert reason in fetch_fails(liar, actions, tmp_path)


def test_a_redirect_is_never_followed(liar: Server) -> None:
    liar.plan.append(answers(307, {"Location": f"{liar.url}/elsewhere"}))
    with pytest.raises(SourceUnavailable, match="answered 307"):
        source_at(liar.url, "models").describe("pirate")
    assert len(liar.requests) == 1


def test_another_content_from_an_s3_without_conditions(liar: Server, tmp_path: Path) -> None:
    source = source_at(liar.url, "models")
    described = source.describe("pirate")
    liar.plan.append(answers(200, {"ETag": "another"}, DATA))
    assert_changed(source, described, tmp_path)


def test_an_encrypted_object_has_no_md5(liar: Server, tmp_path: Path) -> None:
    headers = {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}
    source = source_at(liar.url, "models")
    liar.plan += [liar.answer, *[answers(200, headers, DATA)] * 2]
    described = source.describe("pirate")
    fetch(source, described, tmp_path)
    assert described.weights_digest is None
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_an_object_without_an_etag(liar: Server) -> None:
    liar.plan.append(answers(200, {}, b"{}"))
    with pytest.raises(SourceUnavailable, match="did not say an object's ETag"):
        source_at(liar.url, "models").describe("pirate")


@pytest.mark.parametrize("options", ["", "&anonymous=true"])
def test_requests_are_signed_unless_anonymous(liar: Server, options: str) -> None:
    source_at(liar.url, "models", options + "&region=eu-west-7").describe("pirate")
    path, _, query = liar.requests[0].path.partition("?")
    assert path == f"/models/team/pirate/{CONFIG}"
    if options:
        assert query == ""
    else:
        assert "X-Amz-Credential=an-id%2F" in query
        assert "eu-west-7" in query


def test_no_credentials(liar: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", nobody)
        with pytest.raises(SourceUnavailable, match="has no credentials"):
            source_at(liar.url, "models").describe("pirate")
    assert liar.requests == []
