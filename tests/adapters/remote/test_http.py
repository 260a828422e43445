"""A request's bounds, where no remote of ours would show them."""

from __future__ import annotations

import pytest

from jlorax.adapters.remote import FetchLimits
from jlorax.adapters.remote.http import Deadline, Http
from jlorax.errors import SourceUnavailable
from tests.adapters.remote.standin import Hub, trickles_body


def test_a_body_that_the_deadline_cuts_is_not_taken_for_a_whole_one(hub: Hub) -> None:
    hub.api.plan.append(trickles_body(None))
    http = Http("hf", FetchLimits())
    with (
        pytest.raises(SourceUnavailable, match=r"took longer than 0.2 s"),
        http.open("GET", hub.api.url, {}, Deadline(0.2)) as response,
    ):
        list(response.iter_raw())
