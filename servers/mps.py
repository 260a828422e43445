"""CUDA's Multi-Process Service, through which a server and the trainings beside it share a GPU.

Without it the driver gives each process the whole GPU in turns of some milliseconds, and every
step of the server waits for turns of the training. With it their kernels run side by side, the
training's on a part of the GPU (``jlorax.training.process``).
https://docs.nvidia.com/deploy/mps/
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path

log = logging.getLogger("jlorax")

_CONTROL = "nvidia-cuda-mps-control"
_DEFAULT_PIPES = "/tmp/nvidia-mps"  # where CUDA looks for a daemon that nobody named
_START_DEADLINE_S = 10.0
# program, folder, process: the daemon stays until the process is gone, however it ended, because
# CUDA needs it up to the process's last instruction
_KEEP = """
"$1" -f &
while kill -0 "$3"; do sleep 1; done
echo "quit -t 5" | "$1"
wait
rm -rf "$2"
"""


def share_card(environment: MutableMapping[str, str]) -> None:
    """A daemon for this process and those it starts, told of in ``environment``; it ends when this
    process has ended. None where one runs already, or where the driver has none. Call it before
    CUDA starts."""
    program = shutil.which(_CONTROL)
    if program is None:
        log.warning("%s is not there: trainings take turns with requests", _CONTROL)
    elif not Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", _DEFAULT_PIPES), "control").exists():
        _start(program, environment)


def _start(program: str, environment: MutableMapping[str, str]) -> None:
    folder = tempfile.mkdtemp(prefix="jlorax-mps-")
    environment.update({"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder})
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEP, "jlorax-mps", program, folder, str(os.getpid())],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the server alone
    )
    deadline_s = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline_s and keeper.poll() is None:
        if Path(folder, "control").exists():
            return
        time.sleep(0.05)  # the daemon has no other way to say that it is there
    log.warning("%s did not start: trainings take turns with requests", _CONTROL)
