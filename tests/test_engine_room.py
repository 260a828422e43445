"""How many requests a tenant may have open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jlorax.assembly import Parts
from jlorax.config import SchedulerConfig
from jlorax.engine import Engine
from jlorax.errors import Overloaded
from jlorax.types import GenerateRequest
from tests.servers.serving import in_loop


def engine(*, is_shared: bool) -> Engine:
    """Whose actors never run. It has 12 places."""
    scheduler = SchedulerConfig(max_batch=2, max_queued=10, is_shared=is_shared)
    parts = SimpleNamespace(
        model_info=None,
        tokenizer=None,
        metrics=None,
        policy=None,
        config=SimpleNamespace(scheduler=scheduler),
    )
    made = Engine(cast(Parts, parts))
    made._state = "ready"
    return made


def opened(engine: Engine, tenant: str, num: int) -> list[Any]:
    return [engine._open(GenerateRequest((1,), tenant=tenant)) for _ in range(num)]


@in_loop
async def test_of_several_tenants_none_holds_more_than_half() -> None:
    shared = engine(is_shared=True)
    first, *_ = opened(shared, "a", 6)
    with pytest.raises(Overloaded, match=r"6 requests of tenant 'a'.*12 places"):
        opened(shared, "a", 1)
    opened(shared, "b", 2)
    shared._close(first)
    opened(shared, "a", 1)


@in_loop
async def test_a_tenant_alone_may_have_every_place() -> None:
    opened(engine(is_shared=False), "a", 10)
