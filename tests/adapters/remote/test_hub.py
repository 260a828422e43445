"""Adapters from a hub on loopback: found, verified, resumed, and every way it can go wrong."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jlorax.adapters.remote import Described, FetchLimits, Remote, open_remote
from jlorax.adapters.remote.hub import HubSource, network_kind
from jlorax.errors import (
    AdapterGated,
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
    SourceUnavailable,
)
from tests.adapters.remote.standin import (
    SIGNATURE,
    TOKEN,
    Action,
    Hub,
    Repo,
    Server,
    answers,
    breaks_off,
    says_nothing,
    sends_whole,
    sends_without_length,
    trickles_body,
    trickles_headers,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DATA = bytes(range(256)) * 1024  # 256 KiB
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: DATA}
LIMITS = FetchLimits(
    connect_s=5, read_s=5, describe_s=30, overall_s=60, backoff_s=0.001, slow_window_s=30
)


@pytest.fixture
def repo(hub: Hub) -> Repo:
    hub.repos["org/pirate"] = repo = Repo()
    repo.commit(FILES)
    return repo


@pytest.fixture
def source(hub: Hub, repo: Repo) -> HubSource:
    return source_of(hub)


def source_of(hub: Hub, limits: FetchLimits = LIMITS) -> HubSource:
    return HubSource("hf", limits, hub.api.url)


def fetch(source: HubSource, described: Described, folder: Path) -> None:
    source.fetch("org/pirate", described, folder, len(DATA))


def fetch_fails(source: HubSource, folder: Path) -> str:
    """The reason; and nothing is left behind."""
    described = source.describe("org/pirate")
    with pytest.raises(SourceUnavailable) as caught:
        fetch(source, described, folder)
    assert os.listdir(folder) == []
    assert_shows_no_secret(str(caught.value))
    return caught.value.reason


def assert_shows_no_secret(text: str) -> None:
    assert TOKEN not in text
    assert SIGNATURE not in text


# --- found -------------------------------------------------------------------------------------


def test_describe_asks_for_two_small_things(hub: Hub, repo: Repo, source: HubSource) -> None:
    described = source.describe("org/pirate")

    sha256 = hashlib.sha256(DATA).hexdigest()
    identity = f"hub:{repo.refs['main']}"
    assert described == Described(identity, FILES[CONFIG], len(DATA), sha256, f"sha256:{sha256}")
    assert [r.method for r in hub.api.requests] == ["GET", "HEAD"]
    assert {r.headers["Accept-Encoding"] for r in hub.api.requests} == {"identity"}
    assert hub.store.requests == []


def test_fetch_writes_both_files(source: HubSource, tmp_path: Path) -> None:
    fetch(source, source.describe("org/pirate"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == FILES


def test_several_threads_fetch_at_once(source: HubSource, tmp_path: Path) -> None:
    folders = [tmp_path / str(n) for n in range(8)]
    for folder in folders:
        folder.mkdir()
    described = source.describe("org/pirate")
    with ThreadPoolExecutor(len(folders)) as threads:
        list(threads.map(lambda folder: fetch(source, described, folder), folders))
    assert all((folder / WEIGHTS).read_bytes() == DATA for folder in folders)


def test_a_small_file_comes_from_the_hub_itself(
    hub: Hub, repo: Repo, source: HubSource, tmp_path: Path
) -> None:
    files = {CONFIG: b"{}", WEIGHTS: b"small"}
    repo.commit(files)
    described = source.describe("org/pirate")
    fetch(source, described, tmp_path)
    assert described.weights_digest is None
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "sha"])
def test_a_revision_is_served_as_it_was(
    repo: Repo, source: HubSource, tmp_path: Path, revision: str
) -> None:
    old = {CONFIG: b'{"r": 4}', WEIGHTS: DATA[:2048]}
    sha = repo.commit(old, ref=revision)
    repo.commit(FILES)
    described = source.describe(f"org/pirate@{sha if revision == 'sha' else revision}")
    fetch(source, described, tmp_path)
    assert described.identity == f"hub:{sha}"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_a_later_commit_is_another_identity_and_the_described_one_is_fetched(
    repo: Repo, source: HubSource, tmp_path: Path
) -> None:
    before = source.describe("org/pirate")
    repo.commit({CONFIG: b'{"r": 9}', WEIGHTS: DATA[::-1]})
    assert source.describe("org/pirate").identity != before.identity
    fetch(source, before, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == FILES


def test_the_token_goes_to_the_hub_and_not_to_its_file_store(
    hub: Hub, source: HubSource, tmp_path: Path
) -> None:
    fetch(source, source.describe("org/pirate"), tmp_path)
    assert {r.headers["Authorization"] for r in hub.api.requests} == {f"Bearer {TOKEN}"}
    assert [r.headers.get("Authorization") for r in hub.store.requests] == [None]


def test_nothing_secret_is_logged(
    source: HubSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        fetch(source, source.describe("org/pirate"), tmp_path)
    assert "302 Found" in caplog.text  # httpx did log the requests
    assert_shows_no_secret(caplog.text)


def test_the_endpoint_is_the_environments(hub: Hub, repo: Repo) -> None:
    code = (
        "from jlorax.adapters.remote import *\n"
        "print(open_remote(parse_remote('hf', 'hub')).describe('org/pirate').identity)"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.api.url}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == f"hub:{repo.refs['main']}"


def test_a_moved_repository_is_followed(hub: Hub, repo: Repo, source: HubSource) -> None:
    for file in (CONFIG, WEIGHTS):
        location = f"/org/pirate/resolve/main/{file}"
        hub.api.plan += [answers(307, {"Location": location}), hub.api.answer]
    assert source.describe("old/name").identity == f"hub:{repo.refs['main']}"


def test_what_the_hub_says_at_a_redirect_holds(hub: Hub, repo: Repo, source: HubSource) -> None:
    """Its cache, on the same host, says less."""
    to_cache = {"X-Repo-Commit": repo.refs["main"], "Location": "/api/resolve-cache/config"}
    hub.api.plan += [answers(307, to_cache), answers(200, {}, b"cached")]
    described = source.describe("org/pirate")
    assert (described.identity, described.config) == (f"hub:{repo.refs['main']}", b"cached")


def test_a_large_config_comes_from_the_file_store(repo: Repo, source: HubSource) -> None:
    config = b"{" + b" " * 5000 + b"}"
    sha = repo.commit({CONFIG: config, WEIGHTS: DATA})
    described = source.describe("org/pirate")
    assert (described.identity, described.config) == (f"hub:{sha}", config)


# --- not found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_id", ["org/nobody", "org/pirate@no-such-branch"])
def test_what_is_not_there(source: HubSource, adapter_id: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        source.describe(adapter_id)
    assert caught.value.adapter_id == adapter_id


def test_a_repository_without_a_config_is_no_adapter(repo: Repo, source: HubSource) -> None:
    repo.commit({WEIGHTS: DATA})
    with pytest.raises(AdapterNotFound):
        source.describe("org/pirate")


def test_a_gated_repository_says_so(repo: Repo, source: HubSource) -> None:
    repo.is_gated = True
    with pytest.raises(AdapterGated, match="is gated"):
        source.describe("org/pirate")


def test_gated_weights_say_so_too(hub: Hub, source: HubSource) -> None:
    hub.api.plan += [hub.api.answer, answers(403, {"X-Error-Code": "GatedRepo"})]
    with pytest.raises(AdapterGated, match="is gated"):
        source.describe("org/pirate")


def test_a_bad_token_is_not_an_unknown_adapter(hub: Hub, source: HubSource) -> None:
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.api.plan.append(answers(401, message))
    with pytest.raises(SourceUnavailable, match="does not accept this server's token"):
        source.describe("org/pirate")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({CONFIG: b"{}"}, "is missing$"),
        ({CONFIG: b"{}", "adapter_model.bin": DATA}, "adapter_model.bin is an unsafe format"),
    ],
)
def test_no_safe_weights(
    repo: Repo, source: HubSource, files: dict[str, bytes], reason: str
) -> None:
    repo.commit(files)
    with pytest.raises(AdapterInvalid, match=reason):
        source.describe("org/pirate")


@pytest.mark.parametrize(
    "adapter_id",
    [
        "../pirate",
        "org/../../api/whoami",
        "org//pirate",
        "org/pirate/more",
        "org/pi rate",
        "org/pirate?x=1",
        "org/pirate@",
        "org/pirate@..",
        "org/pirate@a/../../b",
        "org/pirate@a..b",
        "org/pirate@/main",
        "org/pirate@-main",
        "org/pirate@ma\nin",
        "org/pirate@ma\u202ein",
    ],
)
def test_an_id_that_names_nothing_is_never_asked_for(
    hub: Hub, source: HubSource, adapter_id: str
) -> None:
    with pytest.raises(InvalidAdapterId):
        source.describe(adapter_id)
    assert hub.api.requests == []


# --- too much ----------------------------------------------------------------------------------


def test_weights_above_the_limit_are_not_asked_for(
    hub: Hub, source: HubSource, tmp_path: Path
) -> None:
    described = source.describe("org/pirate")
    with pytest.raises(AdapterInvalid, match=f"it has {len(DATA)} bytes, more than the 1000"):
        source.fetch("org/pirate", described, tmp_path, 1000)
    assert hub.store.requests == []


def test_a_config_without_an_end(hub: Hub, source: HubSource) -> None:
    huge = bytes(5 * 2**20)
    hub.api.plan.append(answers(200, {"X-Repo-Commit": "a" * 40}, huge))
    with pytest.raises(AdapterInvalid, match="more than 4194304 bytes"):
        source.describe("org/pirate")


# --- down, slow --------------------------------------------------------------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        source = HubSource("hf", LIMITS, f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(SourceUnavailable, match=r"'hf' cannot be reached: .*\(tries: 3\)"):
            source.describe("org/pirate")


def test_a_passing_fault_is_tried_again(hub: Hub, source: HubSource, tmp_path: Path) -> None:
    hub.api.plan += [answers(503), answers(429, {"Retry-After": "0"})]
    described = source.describe("org/pirate")
    hub.store.plan += [answers(500), answers(403)]
    fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_a_lasting_fault_ends_after_three_tries(hub: Hub, source: HubSource) -> None:
    hub.api.plan += [answers(503)] * 4
    with pytest.raises(SourceUnavailable, match=r"answered 503 \(tries: 3\)"):
        source.describe("org/pirate")
    assert len(hub.api.plan) == 1


def test_a_wait_beyond_the_deadline_is_not_begun(hub: Hub, source: HubSource) -> None:
    hub.api.plan.append(answers(429, {"Retry-After": "3600"}))
    with pytest.raises(SourceUnavailable, match=r"answered 429 \(tries: 1\)"):
        source.describe("org/pirate")


def test_silence(hub: Hub, repo: Repo) -> None:
    source = source_of(hub, FetchLimits(read_s=0.05, backoff_s=0.001))
    hub.api.plan += [says_nothing] * 3
    with pytest.raises(SourceUnavailable, match=r"sent nothing for 0.05 s"):
        source.describe("org/pirate")


@pytest.mark.parametrize("action", [trickles_headers, trickles_body(1000), trickles_body(None)])
def test_a_trickle_ends_at_the_deadline(hub: Hub, repo: Repo, action: Action) -> None:
    source = source_of(hub, FetchLimits(describe_s=0.3))
    hub.api.plan.append(action)
    with pytest.raises(SourceUnavailable, match=r"took longer than 0.3 s"):
        source.describe("org/pirate")


def test_a_later_trickle_ends_at_the_deadline_too(hub: Hub, repo: Repo) -> None:
    """As it would not on a connection that was kept from the first request."""
    source = source_of(hub, FetchLimits(describe_s=0.3))
    hub.api.plan += [hub.api.answer, trickles_headers]
    with pytest.raises(SourceUnavailable, match=r"took longer than 0.3 s"):
        source.describe("org/pirate")


def test_a_slow_transfer_is_given_up_for_another_try(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = source_of(hub, FetchLimits(slow_window_s=0.1, backoff_s=0.001))
    described = source.describe("org/pirate")
    hub.store.plan.append(trickles_body(len(DATA)))
    hub.store.plan.append(sends_whole(DATA))
    fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_a_transfer_that_stays_slow_fails(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = source_of(hub, FetchLimits(slow_window_s=0.1, backoff_s=0.001))
    hub.store.plan += [trickles_body(len(DATA))] * 3
    assert "which is too slow (tries: 3)" in fetch_fails(source, tmp_path)


def test_a_fetch_ends_at_its_deadline(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = source_of(hub, FetchLimits(overall_s=0.3))
    hub.store.plan.append(trickles_body(len(DATA)))
    assert fetch_fails(source, tmp_path) == "took longer than 0.3 s"


def test_offline_mode_asks_nobody(
    hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        source.describe("org/pirate")
    assert hub.api.requests == []


# --- broken off --------------------------------------------------------------------------------


def test_a_broken_transfer_is_resumed(hub: Hub, source: HubSource, tmp_path: Path) -> None:
    described = source.describe("org/pirate")
    hub.store.plan.append(breaks_off(DATA, after=100_000))
    fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA
    assert [r.headers.get("Range") for r in hub.store.requests] == [None, "bytes=100000-"]


def test_a_server_without_ranges_sends_it_all_again(
    hub: Hub, source: HubSource, tmp_path: Path
) -> None:
    described = source.describe("org/pirate")
    hub.store.plan += [breaks_off(DATA, after=100_000), sends_whole(DATA)]
    fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_what_breaks_off_each_time_fails(hub: Hub, source: HubSource, tmp_path: Path) -> None:
    hub.store.plan += [breaks_off(DATA, after=10)] * 3
    assert "broke the connection off" in fetch_fails(source, tmp_path)


# --- lies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (sends_whole(DATA[:-1]), f"said the weights have {len(DATA)} bytes, but then"),
        (sends_whole(DATA + b"x"), f"said the weights have {len(DATA)} bytes, but then"),
        (sends_without_length(DATA + b"x"), "but sent more"),
        (sends_whole(DATA[:-1] + b"x"), "sent weights of another sha256 digest"),
        (answers(206, {"Content-Range": "bytes 5-9/10"}, b"12345"), "answered another range"),
    ],
    ids=["shorter", "longer", "more-than-said", "digest", "range"],
)
def test_a_lying_server(
    hub: Hub, source: HubSource, tmp_path: Path, action: Action, reason: str
) -> None:
    hub.store.plan.append(action)
    assert reason in fetch_fails(source, tmp_path)


def test_a_resumed_range_of_another_file(hub: Hub, source: HubSource, tmp_path: Path) -> None:
    content_range = {"Content-Range": f"bytes 10-{len(DATA)}/{len(DATA) + 1}"}
    hub.store.plan += [breaks_off(DATA, after=10), answers(206, content_range, DATA[9:])]
    assert "answered another range than 10-" in fetch_fails(source, tmp_path)


def test_a_short_answer_without_a_length_is_not_taken_for_all(
    hub: Hub, source: HubSource, tmp_path: Path
) -> None:
    hub.store.plan += [sends_without_length(DATA[:-1])] * 3
    assert "broke off after" in fetch_fails(source, tmp_path)


def test_a_web_page_is_no_hub(hub: Hub, source: HubSource) -> None:
    hub.api.plan.append(answers(200, {}, b"<html>"))
    with pytest.raises(SourceUnavailable, match="is no hub"):
        source.describe("org/pirate")


def test_a_size_is_needed(hub: Hub, repo: Repo, source: HubSource) -> None:
    linked = {"X-Linked-Etag": "x", "Location": hub.store.url}
    hub.api.plan += [hub.api.answer, answers(302, linked)]
    with pytest.raises(SourceUnavailable, match="did not say how many bytes"):
        source.describe("org/pirate")


def test_a_commit_that_is_gone_when_it_is_fetched(
    repo: Repo, source: HubSource, tmp_path: Path
) -> None:
    described = source.describe("org/pirate")
    repo.commits.clear()
    with pytest.raises(AdapterInvalid, match="changed while it was loaded"):
        fetch(source, described, tmp_path)
    assert os.listdir(tmp_path) == []


# --- redirects ---------------------------------------------------------------------------------


def test_a_circle_of_redirects(hub: Hub, source: HubSource) -> None:
    hub.api.answer = lambda request: request.reply(302, {"Location": request.path})
    with pytest.raises(SourceUnavailable, match="redirected more than 5 times"):
        source.describe("org/pirate")
    assert len(hub.api.requests) == 6


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("169.254.169.254", "link-local"),
        ("10.0.0.1", "private"),
        ("192.168.1.1:8080", "private"),
        ("[fe80::1]", "link-local"),
        ("[::ffff:10.0.0.1]", "private"),
        ("167772161", "private"),  # 10.0.0.1 as one number
    ],
)
def test_a_redirect_into_an_inner_network_is_refused(
    hub: Hub, source: HubSource, tmp_path: Path, host: str, kind: str
) -> None:
    redirect = answers(302, {"Location": f"http://{host}/latest/meta-data"})
    hub.api.plan += [hub.api.answer, hub.api.answer, redirect]
    assert f"redirected to a {kind} address" in fetch_fails(source, tmp_path)


def test_an_international_name_is_looked_up_too(
    hub: Hub, source: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"xn--bcher-kva.invalid": ["10.0.0.1"], "127.0.0.1": ["127.0.0.1"]}
    monkeypatch.setattr("jlorax.adapters.remote.http.addresses", found.get)
    redirect = answers(302, {"Location": "http://xn--bcher-kva.invalid/"})
    hub.api.plan += [hub.api.answer, hub.api.answer, redirect]
    assert "redirected to a private address, 10.0.0.1" in fetch_fails(source, tmp_path)


def test_a_hub_outside_may_not_lead_to_loopback(
    hub: Hub, repo: Repo, source: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store of the stand-in is on loopback, and its hub is said to be elsewhere."""
    monkeypatch.setattr("jlorax.adapters.remote.hub.addresses", lambda host: ["93.184.215.14"])
    assert "redirected to a loopback address, 127.0.0.1" in fetch_fails(source, tmp_path)
    assert hub.store.requests == []


def test_a_name_that_changes_its_address_is_refused_too(
    hub: Hub, repo: Repo, source: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked when it is looked up, and again at the connection that was made."""
    monkeypatch.setattr("jlorax.adapters.remote.hub.addresses", lambda host: ["93.184.215.14"])
    monkeypatch.setattr("jlorax.adapters.remote.http.addresses", lambda host: ["93.184.215.14"])
    assert "redirected to a loopback address, 127.0.0.1" in fetch_fails(source, tmp_path)
    assert hub.store.requests == []


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://x/y", "http://[x"])
def test_a_redirect_to_something_else(
    hub: Hub, source: HubSource, tmp_path: Path, location: str
) -> None:
    hub.api.plan += [hub.api.answer, hub.api.answer, answers(302, {"Location": location})]
    assert fetch_fails(source, tmp_path).startswith("redirected to")


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "global"),
        ("2606:4700::1111", "global"),
        ("127.8.8.8", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("169.254.1.1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("172.16.0.1", "private"),
        ("fd00::1", "private"),
        ("100.64.0.1", "reserved"),
        ("224.0.0.1", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::8.8.8.8", "global"),
        ("64:ff9b::10.0.0.1", "private"),
    ],
)
def test_kinds_of_networks(address: str, kind: str) -> None:
    assert network_kind(address) == kind


def test_a_proxy_is_used_and_decides_where_it_goes(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy answers for a file store that only it can reach, and may itself be on loopback."""
    monkeypatch.setattr("jlorax.adapters.remote.hub.addresses", lambda host: ["93.184.215.14"])
    proxy = Server(sends_whole(DATA))
    with proxy.running():
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", f"127.0.0.1:{hub.api.server_port}")
        source = source_of(hub)
        described = source.describe("org/pirate")
        linked = {"Location": "http://store.invalid/file"}
        hub.api.plan.append(answers(302, linked))
        fetch(source, described, tmp_path)
    assert [r.path for r in proxy.requests] == ["http://store.invalid/file"]
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


# --- TLS ---------------------------------------------------------------------------------------


@pytest.fixture
def tls_hub(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A hub that only SSL_CERT_FILE vouches for."""
    certificate = tmp_path_factory.mktemp("tls") / "hub.pem"
    certificate.write_bytes(self_signed("127.0.0.1"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Hub(certificate).running() as hub:
        hub.repos["org/pirate"] = repo = Repo()
        repo.commit(FILES)
        yield hub


def self_signed(address: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, address)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def test_a_hub_of_an_own_authority(tls_hub: Hub, tmp_path: Path) -> None:
    source = source_of(tls_hub)
    fetch(source, source.describe("org/pirate"), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_an_unknown_authority(tls_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SourceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        source_of(tls_hub).describe("org/pirate")


def test_a_trickle_through_tls_ends_at_the_deadline(tls_hub: Hub) -> None:
    tls_hub.api.plan.append(trickles_headers)
    with pytest.raises(SourceUnavailable, match=r"took longer than 0.3 s"):
        source_of(tls_hub, FetchLimits(describe_s=0.3)).describe("org/pirate")


def test_a_trickling_handshake_ends_at_the_deadline() -> None:
    """A record of 16 KiB is announced, and comes a byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle_handshake, args=(listener,))
        thread.start()
        source = HubSource(
            "hf", FetchLimits(describe_s=0.3), f"https://127.0.0.1:{listener.getsockname()[1]}"
        )
        with pytest.raises(SourceUnavailable, match=r"took longer than 0.3 s"):
            source.describe("org/pirate")
        thread.join()


def trickle_handshake(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, suppress(OSError):
        connection.settimeout(0.02)
        connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")
        while True:
            try:
                if not connection.recv(65536):
                    return
            except TimeoutError:
                connection.sendall(b"a")


def test_a_redirect_may_not_leave_tls(tls_hub: Hub, tmp_path: Path) -> None:
    source = source_of(tls_hub)
    described = source.describe("org/pirate")
    tls_hub.api.plan.append(answers(302, {"Location": "http://127.0.0.1/"}))
    with pytest.raises(SourceUnavailable, match="redirected to a http URL"):
        fetch(source, described, tmp_path)


# --- the disk ----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A write beyond fails as on a full disk, but with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100_000, len(DATA) - 1])
def test_a_full_disk(source: HubSource, tmp_path: Path, room: int) -> None:
    described = source.describe("org/pirate")
    with files_of_at_most(room), pytest.raises(SourceUnavailable) as caught:
        fetch(source, described, tmp_path)
    assert "cannot be written: File too large" in caught.value.reason
    assert os.listdir(tmp_path) == []
    fetch(source, described, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == DATA


def test_open_remote_opens_the_hub() -> None:
    assert isinstance(open_remote(Remote("hf")), HubSource)
