"""``python -m benchmarks COMMAND``: a command is a module with ``add_arguments`` and ``main``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from benchmarks import (
    beside_training,
    constraints,
    cpu,
    decode,
    front_end,
    http_streaming,
    kernels,
    make_adapters,
    serving,
    training,
)

COMMANDS = {
    "cpu": cpu,
    "kernels": kernels,
    "decode": decode,
    "constraints": constraints,
    "http": http_streaming,
    "front-end": front_end,
    "serving": serving,
    "training": training,
    "beside-training": beside_training,
    "make-adapters": make_adapters,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure JLoRAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    parsed = parser.parse_args(arguments)
    status: int = COMMANDS[parsed.command].main(parsed)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go
    sys.exit(main())
