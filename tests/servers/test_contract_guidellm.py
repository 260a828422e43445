"""One short run of the unmodified ``guidellm`` against a server process (marker
``contract_heavy``: it needs torch, pyarrow and pandas)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.servers.contract_cases import ADAPTER
from tests.servers.contract_session import ContractSession, run

pytestmark = pytest.mark.contract_heavy

PACKAGE = "guidellm==0.8.1"
NUM_REQUESTS, NUM_OUT = 4, 5


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_short_run(route: str, session: ContractSession, tmp_path: Path) -> None:
    """It asks for /health, a fixed length (``ignore_eos``) and usage in every chunk."""
    program = session.python_with(PACKAGE).with_name("guidellm")
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={session.server.url},model={ADAPTER},request_format={route}"
    run(
        [
            *(program, "run", "--disable-progress", "--backend", backend),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=20,output_tokens={NUM_OUT}"),
            *("--tokenizer", f"kind=huggingface_auto,model={session.home / 'model'}"),
            *("--output", f"kind=json,path={report}"),
        ],
        HF_HUB_OFFLINE="1",
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)
    lengths = metrics["output_token_count"]["successful"]
    assert (lengths["min"], lengths["max"]) == (NUM_OUT, NUM_OUT)
    assert metrics["prompt_token_count"]["successful"]["min"] >= 20
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["count"] == (NUM_OUT - 1) * NUM_REQUESTS
