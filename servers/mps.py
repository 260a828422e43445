"""CUDA's Multi-Process Service, through which a server and the trainings beside it share a GPU.

Without it the driver gives each process the whole GPU in turns of some milliseconds, and every
step of the server waits for turns of the training. With it their kernels run side by side, the
training's on a part of the GPU (``jlorax.training.process``).
https://docs.nvidia.com/deploy/mps/
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("jlorax")

_CONTROL = "nvidia-cuda-mps-control"
_DEFAULT_PIPES = "/tmp/nvidia-mps"  # where CUDA looks for a daemon that nobody named
_START_DEADLINE_S = 10.0
_STOP_DEADLINE_S = 20.0


@contextmanager
def shared_card(environment: MutableMapping[str, str]) -> Iterator[None]:
    """A daemon for this process and those it starts, told of in ``environment``; it ends with the
    block. None where one runs already, or where the driver has none. Enter it before CUDA starts.
    """
    program = shutil.which(_CONTROL)
    if _running(environment) or program is None:
        if program is None:
            log.warning("%s is not there: trainings take turns with requests", _CONTROL)
        yield
        return
    with tempfile.TemporaryDirectory(prefix="jlorax-mps-") as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment.update(own)
        daemon = subprocess.Popen(
            [program, "-f"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which needs it until it has ended
        )
        try:
            _await(Path(folder), daemon)
            yield
        finally:
            for name in own:
                environment.pop(name, None)
            _stop(program, daemon, {**environment, **own})


def _running(environment: MutableMapping[str, str]) -> bool:
    return Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", _DEFAULT_PIPES), "control").exists()


def _await(folder: Path, daemon: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline_s and daemon.poll() is None:
        if (folder / "control").exists():
            return
        time.sleep(0.05)  # the daemon has no other way to say that it is there
    log.warning("%s did not start: trainings take turns with requests", _CONTROL)


def _stop(program: str, daemon: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    """``quit`` also ends the server that the daemon started."""
    try:
        subprocess.run(
            [program],
            input=b"quit -t 1\n",
            env=environment,
            capture_output=True,
            timeout=_STOP_DEADLINE_S,
            check=False,
        )
        daemon.wait(_STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
