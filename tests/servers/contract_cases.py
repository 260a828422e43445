"""Runs in a client's own environment: calls a server in many ways, prints what came of each.

Nothing but the standard library is imported here, so that any client's environment will do.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

BASE, ADAPTER = "tiny", "one"
PROMPT = "The sea"
VERDICT = "Is this good? I loved it."

Case = Callable[[str], Any]


def main(*cases: Case) -> None:
    """Each case gets the server's URL. The last line of the output is JSON by the cases' names:
    what each answered, or how it failed."""
    url = sys.argv[1]
    print("\n" + json.dumps({case.__name__: _outcome(case, url) for case in cases}))


def _outcome(case: Case, url: str) -> dict[str, Any]:
    try:
        return {"answer": case(url)}
    except Exception:
        return {"failure": traceback.format_exc()}


def raised(call: Callable[[], object]) -> str:
    """The name of the error's class, which ``call`` must raise."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    raise AssertionError("nothing was raised")
