"""``schemathesis`` asks a real server what its own OpenAPI document promises (marker
``contract``): no 5xx, no status or content that is not described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.process import ServerProcess

pytest.importorskip("schemathesis")
pytestmark = pytest.mark.contract

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)
NUM_EXAMPLES = 8  # a route, beside those that cover its fields' limits: about a minute in all


def test_what_the_document_promises_is_kept(contract_server: ServerProcess, tmp_path: Path) -> None:
    server = contract_server
    asked = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--continue-on-failure"),
            *("--request-timeout", "30", "--no-shrink", "--warnings", "off"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert asked.returncode == 0, asked.stdout[-8000:] + asked.stderr[-2000:]
    assert server.process.poll() is None
    status, _, answer = server.request("/generate", {"inputs": "Hello"})
    assert status == 200, answer
    assert answer["generated_text"]
