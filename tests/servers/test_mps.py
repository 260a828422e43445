"""The daemon through which a GPU is shared: a stand-in for the driver's program, real processes."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
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


def test_a_daemon_lives_as_long_as_the_block_and_is_told_of(ended: Path) -> None:
    told: MutableMapping[str, str] = {"PATH": "/usr/bin:/bin"}
    with mps.shared_card(told):
        pipes = Path(told["CUDA_MPS_PIPE_DIRECTORY"])
        assert (pipes / "control").exists()
        assert not ended.exists()
    assert ended.exists()
    assert not pipes.exists()
    assert told == {"PATH": "/usr/bin:/bin"}


def test_it_ends_when_the_block_fails(ended: Path) -> None:
    with pytest.raises(RuntimeError), mps.shared_card({}):
        raise RuntimeError
    assert ended.exists()


def test_one_that_runs_already_is_used(ended: Path, tmp_path: Path) -> None:
    (tmp_path / "control").touch()
    theirs = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    with mps.shared_card(theirs):
        assert theirs == {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not ended.exists()


def test_without_the_drivers_program_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told: MutableMapping[str, str] = {}
    with caplog.at_level(logging.WARNING, "jlorax"), mps.shared_card(told):
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
