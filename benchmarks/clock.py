"""A command's own clock: progress lines with their second, and a budget after which it stops."""

from __future__ import annotations

import time


class Clock:
    """``budget_s`` None: no limit. Counts from when it is made."""

    def __init__(self, budget_s: float | None = None) -> None:
        self._budget_s = budget_s
        self._start_s = time.perf_counter()
        self._last_said = ""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def is_over(self) -> bool:
        return self._budget_s is not None and self.elapsed_s >= self._budget_s

    def say(self, text: str) -> None:
        print(f"[{self.elapsed_s:6.1f} s] {text}", flush=True)

    def progress(self, what: str, fraction: float) -> None:
        """A jlorax ``Progress``: one line when something new begins."""
        if what != self._last_said:
            self._last_said = what
            self.say(what)
