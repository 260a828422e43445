"""The daemon through which a GPU is shared: a stand-in for the driver's program, real processes."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jlorax.training.process import environment
from servers import mps

# with -f the daemon; without, one command on standard input
_PROGRAM = """#!/bin/sh
if [ "$1" = -f ]; then
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
    while [ ! -e "$CUDA_MPS_PIPE_DIRECTORY/quit" ]; do sleep 0.02; done
    touch "{ended}"
else
    grep -q "^quit" && touch "$CUDA_MPS_PIPE_DIRECTORY/quit"
fi
"""
_SERVER = """
import os, sys
from servers import mps
mps._DEFAULT_PIPES = sys.argv[1]
mps.share_card(os.environ)
print(os.environ["CUDA_MPS_PIPE_DIRECTORY"], flush=True)
sys.stdin.read()
"""
_DEADLINE_S = 20.0


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There once a daemon has ended as it was told."""
    ended = tmp_path / "ended"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(_PROGRAM.format(ended=ended))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(mps, "_DEFAULT_PIPES", str(tmp_path / "nobody"))
    return ended


def _gone(path: Path) -> bool:
    deadline_s = time.monotonic() + _DEADLINE_S
    while path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not path.exists()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_ends_after_its_server_however_that_ends(
    ended: Path, tmp_path: Path, end: signal.Signals
) -> None:
    command = [sys.executable, "-c", _SERVER, str(tmp_path / "nobody")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        pipes = Path(server.stdout.readline().strip())
        assert (pipes / "control").exists()
        assert not ended.exists()
        server.send_signal(end)
    assert _gone(pipes)
    assert ended.exists()


def test_one_that_runs_already_is_used(ended: Path, tmp_path: Path) -> None:
    (tmp_path / "control").touch()
    theirs = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    mps.share_card(theirs)
    assert theirs == {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}


def test_without_the_drivers_program_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told: dict[str, str] = {}
    with caplog.at_level(logging.WARNING, "jlorax"):
        mps.share_card(told)
    assert told == {}
    assert "nvidia-cuda-mps-control is not there" in caplog.text


def test_a_training_beside_a_server_gets_a_part_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    beside = environment(0.25)
    assert beside["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    assert beside["XLA_CLIENT_MEM_FRACTION"] == "0.2500"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in beside
    alone = environment()
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in alone
    assert alone["GLIBC_TUNABLES"] == beside["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
