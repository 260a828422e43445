"""What a measurement was made on: commit, machine, packages. No paths, no host names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

_COMPILERS = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "flax",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
)
_REPOSITORY = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit, with "-dirty" when tracked files differ from it; "unknown" without git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def command() -> str:
    """The command line; of an absolute path only the last name, which is not this machine's."""
    given = (Path(a).name if a.startswith("/") else a for a in sys.argv[1:])
    return shlex.join(["python", "-m", "benchmarks", *given])


def versions(*others: str) -> dict[str, str]:
    """What compiles and runs a step, and other packages."""
    found = {"python": platform.python_version()}
    for name in (*_COMPILERS, *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict[str, str]:
    """The device that jax runs on, and its driver where there is one. Starts jax."""
    import jax  # other commands never need it

    device = jax.devices()[0]
    return {"card": device.device_kind, "driver": _driver() if device.platform == "gpu" else "none"}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip() if answer.stdout else "unknown"


def machine() -> dict[str, str | int]:
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Runnable processes, averaged over the last minute: other work on the machine shows here."""
    return os.getloadavg()[0]


def _cpu_model() -> str:
    """The name, and the vector instructions that decide a float32 benchmark."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in fields}
    flags = found.get("flags", "").split()
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16") if name in flags]
    name = found.get("model name", platform.machine())
    family = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{name} ({', '.join([family, *vectors])})"
