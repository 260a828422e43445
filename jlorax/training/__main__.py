"""The process of one training: see ``process``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from jlorax.errors import JLoraxError
from jlorax.training.events import Event, Failed
from jlorax.training.process import JobFile

_CANCELLED = 130


def main() -> int:
    """0: the adapter is there. 1: it failed, and the last event says why. 130: cancelled."""
    job = JobFile.read(Path(sys.argv[1]))
    if job.is_idle:
        _step_aside()
    is_told = False

    def tell_to_stop(*_: object) -> None:
        nonlocal is_told
        is_told = True

    signal.signal(signal.SIGTERM, tell_to_stop)
    signal.signal(signal.SIGINT, tell_to_stop)
    try:
        from jlorax.training.run import run

        published = run(job, _say, lambda: is_told)
    except JLoraxError as error:
        _say(Failed(error.code, str(error)))
        return 1
    except Exception as error:
        logging.getLogger("jlorax.training").exception("the training failed")
        _say(Failed("internal", f"{type(error).__name__}: {error}"))
        return 1
    return 0 if published is not None else _CANCELLED


def _say(event: Event) -> None:
    print(event.to_json(), flush=True)


def _step_aside() -> None:
    """Whoever serves beside this process comes first: for the processor (nice 19; SCHED_IDLE would
    starve a training while requests keep coming), and when memory ends."""
    os.nice(19)
    with suppress(OSError):  # there is none where there is no Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
