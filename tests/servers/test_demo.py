"""What ``jlorax demo`` prints for people to paste."""

from __future__ import annotations

import json
import shlex

import pytest

from jlorax.config import ServerConfig
from servers.demo import _say_what_next


def test_the_printed_curl_can_be_pasted_from_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _say_what_next(ServerConfig())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "curl" in line)
    *_, body = shlex.split(line)
    assert json.loads(body)["messages"] == [{"role": "user", "content": "Hello!"}]
