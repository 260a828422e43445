"""How long a step is held for masks: a share of a decode step, however it is known."""

from __future__ import annotations

import pytest

from jlorax.scheduling.patience import Patience


def test_a_step_alone_takes_from_its_launch_to_its_reading() -> None:
    patience = Patience(0.5)
    patience.launched_alone(10.0)
    patience.read(10.2, is_decode=True)
    assert patience.hold_s == pytest.approx(0.1)


def test_a_step_behind_another_begins_when_that_is_read() -> None:
    patience = Patience(0.25)
    patience.launched_alone(10.0)
    patience.read(11.0, is_decode=True)
    patience.read(11.4, is_decode=True)
    assert patience.hold_s == pytest.approx(0.1)


def test_a_prompts_step_is_no_measure_but_ends_before_the_next() -> None:
    patience = Patience(0.5)
    before_s = patience.hold_s
    patience.launched_alone(10.0)
    patience.read(12.0, is_decode=False)
    assert patience.hold_s == before_s > 0
    patience.read(12.4, is_decode=True)
    assert patience.hold_s == pytest.approx(0.2)


def test_nobody_waits_without_patience() -> None:
    patience = Patience(0.0)
    patience.read(1.0, is_decode=True)
    assert patience.hold_s == 0
