"""What a measurement was made on: commit, machine, packages. No paths, no host names."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

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
