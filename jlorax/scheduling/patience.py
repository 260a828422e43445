"""How long a step is held for the masks of rows that it could take along."""

from __future__ import annotations

_FIRST_STEP_S = 0.004  # until a decode step was read


class Patience:
    """A share of what the last decode step took: on whatever device, the next one is there before
    the step ends that runs meanwhile.

    launched | step           read | step                  read |
             |<- it took this ---->|<- queued behind: and this ->|
    """

    def __init__(self, steps: float) -> None:
        """``steps``: the share."""
        self._steps = steps
        self._step_s = _FIRST_STEP_S
        self._begin_s = 0.0  # of the step that runs

    @property
    def hold_s(self) -> float:
        return self._steps * self._step_s

    def launched_alone(self, now_s: float) -> None:
        """Nothing ran on the device."""
        self._begin_s = now_s

    def read(self, now_s: float, *, is_decode: bool) -> None:
        if is_decode:
            self._step_s = now_s - self._begin_s
        self._begin_s = now_s
