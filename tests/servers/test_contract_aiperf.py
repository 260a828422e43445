"""Two short runs of the unmodified ``aiperf`` against a server process (marker ``contract_heavy``:
it starts a dozen processes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.servers.contract_cases import ADAPTER
from tests.servers.contract_session import OTHER_ADAPTER, ContractSession, run

pytestmark = pytest.mark.contract_heavy

PACKAGE = "aiperf==0.13.0"
NUM_REQUESTS, NUM_OUT = 6, 5


def profile(session: ContractSession, folder: Path, *flags: str) -> dict[str, Any]:
    """It streams, asks for usage, and reads /metrics beside."""
    program = session.python_with(PACKAGE).with_name("aiperf")
    run(
        [
            *(program, "profile", "--url", session.server.url, "--streaming", "--ui", "none"),
            *("--tokenizer", session.home / "model", "--output-artifact-dir", folder),
            *("--request-count", str(NUM_REQUESTS), "--concurrency", "2"),
            *("--synthetic-input-tokens-mean", "20", "--output-tokens-mean", str(NUM_OUT)),
            *flags,
        ]
    )
    found: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert found["error_summary"] == []
    assert found["request_count"]["avg"] == NUM_REQUESTS
    assert found["time_to_first_token"]["min"] > 0
    return found


def num_answered(session: ContractSession, route: str, adapter: str) -> int:
    """As the server's log has it."""
    lines = session.server.log.read_text().splitlines()
    return sum(f"POST {route} 200 " in line and f" adapter={adapter} " in line for line in lines)


def test_two_adapters_in_turn(session: ContractSession, tmp_path: Path) -> None:
    route, adapters = "/v1/chat/completions", (ADAPTER, OTHER_ADAPTER)
    before = [num_answered(session, route, adapter) for adapter in adapters]
    found = profile(
        session,
        tmp_path,
        *("-m", ",".join(adapters), "--model-selection-strategy", "round_robin"),
        *("--endpoint-type", "chat", "--extra-inputs", "ignore_eos:true"),
        "--use-server-token-count",
    )
    after = [num_answered(session, route, adapter) for adapter in adapters]
    assert [b - a for a, b in zip(before, after, strict=True)] == [NUM_REQUESTS // 2] * 2
    assert found["output_sequence_length"]["min"] == NUM_OUT
    assert found["output_sequence_length"]["max"] == NUM_OUT
    served = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert served["summary"]["endpoints_successful"] == [f"{session.server.url}/metrics"]
    assert any(name.startswith("jlorax_") for name in served["metrics"])


def test_hugging_faces_route_with_an_adapter(session: ContractSession, tmp_path: Path) -> None:
    """``/generate_stream``, where the model's name says nothing and ``adapter_id`` all."""
    before = num_answered(session, "/generate_stream", ADAPTER)
    profile(
        session,
        tmp_path,
        *("-m", "any", "--endpoint-type", "huggingface-generate"),
        *("--extra-inputs", f"adapter_id:{ADAPTER}"),
    )
    assert num_answered(session, "/generate_stream", ADAPTER) == before + NUM_REQUESTS
