"""The machine that is compiled for, on one that has no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jax.sharding import Mesh


@pytest.fixture(scope="session")
def h100() -> Mesh:
    """One H100 of a compile-only topology; ``h100.txtpb`` describes it."""
    from jax.experimental import topologies

    description = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=description, topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
