"""The whole product in its own process: start, answers, bad input, disconnects, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.process import (
    ROOT,
    ServerProcess,
    free_port,
    start_server,
    write_adapter,
    write_model,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two named adapters, and a root with a good and a broken one."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model")
    for seed, name in enumerate(("one", "two")):
        write_adapter(home / name, seed + 1)
    write_adapter(home / "root" / "three", 3, rank=12)
    write_adapter(home / "root" / "four", 4)
    write_adapter(home / "root" / "broken", 4)
    (home / "root" / "broken" / "adapter_model.safetensors").write_bytes(b"not tensors")
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ServerProcess]:
    server = start(home)
    yield server
    server.process.kill()


def start(home: Path) -> ServerProcess:
    """Always with the same shapes, so that the executables are compiled once."""
    return start_server(
        home,
        *("--model", str(home / "model"), "--cache-dir", str(home / "cache")),
        *("--adapter", f"one={home / 'one'}", "--adapter", f"two={home / 'two'}"),
        *("--adapter-root", str(home / "root"), "--max-slots", "2", "--max-batch", "4"),
        *("--max-seq-len", "256", "--adapter-bank-bytes", "8MiB", "--buckets", "4"),
    )


def generate(server: ServerProcess, prompt: str, **parameters: Any) -> tuple[int, Any]:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 12, **parameters}}
    status, _, answer = server.request("/generate", body)
    return status, answer


def test_each_adapter_has_its_own_answer(server: ServerProcess) -> None:
    names = (None, "one", "two", "three")
    alone = {name: generate(server, "Hello", adapter_id=name) for name in names}
    assert all(status == 200 for status, _ in alone.values())
    assert len({answer["generated_text"] for _, answer in alone.values()}) == 4
    together: dict[int, Any] = {}

    def ask(i: int) -> None:
        together[i] = generate(server, "Hello", adapter_id=names[i % 4])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[i] == alone[names[i % 4]] for i in range(12))


def test_v1_names_adapters_by_model(server: ServerProcess) -> None:
    body = {"model": "one", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
    status, _, answer = server.request("/v1/completions", body)
    assert status == 200
    assert (
        answer["choices"][0]["text"]
        == generate(server, "Hello", adapter_id="one")[1]["generated_text"]
    )
    listed = {card["id"] for card in server.request("/v1/models")[2]["data"]}
    assert {"model", "one", "two", "three"} <= listed


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": "x", "parameters": {"adapter_id": "nobody"}}, 404, ["nobody"]),
        ({"inputs": "x", "parameters": {"adapter_id": "broken"}}, 422, ["adapter_model.safet"]),
        ({"inputs": "x", "parameters": {"adapter_id": "../two"}}, 422, [".."]),
        ({"inputs": "x" * 300, "parameters": {"max_new_tokens": 10}}, 422, ["300", "256"]),
        ({"inputs": "x", "parameters": {"max_new_tokens": 1000}}, 422, ["1000", "256"]),
        ({"inputs": "", "parameters": {}}, 422, ["empty"]),
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, ["watermark"]),
        (b"{", 400, []),
    ],
)  # fmt: skip
def test_bad_input_gets_a_clear_error_and_serving_goes_on(
    server: ServerProcess, body: Any, status: int, words: list[str]
) -> None:
    got, _, answer = server.request("/generate", body)
    assert got == status, answer
    assert all(word in answer["error"] for word in words), answer
    assert generate(server, "Hello")[0] == 200
    _await(lambda: _is_clean(server))


def test_a_client_that_leaves_is_cancelled(server: ServerProcess) -> None:
    """The socket is cut in mid-stream; the row, pages and pin come back long before the end."""
    body = json.dumps(
        {"inputs": "Hello", "parameters": {"adapter_id": "one", "ignore_eos_token": True}}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    before = server.metric("jlorax_generated_tokens_total")
    for _ in range(4):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.recv(4096)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    _await(lambda: _is_clean(server))
    assert server.metric("jlorax_generated_tokens_total") == before, "they ran to their ends"


def test_nothing_is_compiled_while_serving(server: ServerProcess) -> None:
    for parameters in ({}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.3}):
        assert generate(server, "Hello there", adapter_id="two", **parameters)[0] == 200
    assert server.metric("jlorax_executables_compiled_after_ready") == 0


def test_adapters_can_be_loaded_and_unloaded(server: ServerProcess) -> None:
    status, _, info = server.request("/v1/adapters", {"adapter_id": "late", "folder": "three"})
    assert status == 201, info
    expected = generate(server, "Hello", adapter_id="three")
    assert generate(server, "Hello", adapter_id="late") == expected
    assert server.request("/v1/adapters", {"adapter_id": "late", "folder": "three"})[0] == 409
    assert server.request("/v1/adapters/late", method="DELETE")[0] == 204
    assert generate(server, "Hello", adapter_id="late")[0] == 404


def test_an_adapter_is_replaced_and_pinned(server: ServerProcess) -> None:
    four, three = (generate(server, "Hello", adapter_id=name) for name in ("four", "three"))
    assert four != three
    body = {"adapter_id": "turn", "folder": "four"}
    assert server.request("/v1/adapters", body)[0] == 201
    assert generate(server, "Hello", adapter_id="turn") == four
    assert server.request("/v1/adapters/turn/pin", {})[2]["tier"] == "device"
    status, _, info = server.request("/v1/adapters", body | {"folder": "three", "replace": True})
    assert (status, info["generation"]) == (201, 2)
    assert generate(server, "Hello", adapter_id="turn") == three
    assert server.request("/v1/adapters/turn/pin", method="DELETE")[0] == 200
    assert server.request("/v1/unload_lora_adapter", {"lora_name": "turn"})[0] == 200
    assert generate(server, "Hello", adapter_id="turn")[0] == 404


def _is_clean(server: ServerProcess) -> bool:
    free, total = server.metric("jlorax_free_pages"), server.metric("jlorax_total_pages")
    busy = server.metric("jlorax_num_running") + server.metric("jlorax_pinned_slots")
    return free == total and busy == 0


def _await(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.02)


# ---- processes of their own


def run_cli(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servers.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


def test_sigterm_lets_running_requests_end(home: Path) -> None:
    server = start(home)
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            generate(server, "Hello", max_new_tokens=200, ignore_eos_token=True, details=True)
        )
    )
    asking.start()
    _await(lambda: server.metric("jlorax_num_running") == 1)
    assert server.stop() == 0
    asking.join()
    status, answer = answers[0]
    assert (status, answer["details"]["generated_tokens"]) == (200, 200)


def test_a_port_in_use_is_said_at_once(home: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = run_cli("serve", "--port", str(port), "--model", str(home / "model"))
    assert done.returncode == 2
    assert str(port) in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_said(home: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = run_cli("serve", "--model", str(home / "model"), "--cache-dir", str(tmp_path / "c"))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


def test_a_cache_that_is_a_file_is_said(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    done = run_cli("serve", "--model", str(home / "model"), "--cache-dir", str(cache))
    assert done.returncode == 2, done.stderr
    assert str(cache) in done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt9"}, ["gpt9", "falcon", "llama", "mistral"]),
        (None, ["config.json"]),
    ],
)
def test_a_model_that_is_not_ours_is_named(tmp_path: Path, config: Any, words: list[str]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_cli("serve", "--port", str(free_port()), "--model", str(tmp_path))
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_a_dry_run_prints_the_plan_and_ends(home: Path) -> None:
    done = run_cli("serve", "--dry-run", "--model", str(home / "model"), "--max-slots", "5")
    assert done.returncode == 0, done.stderr
    assert "5 slots" in done.stdout
    assert "KV pages" in done.stdout


def test_ctrl_c_ends_it_quietly(home: Path) -> None:
    server = start(home)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
