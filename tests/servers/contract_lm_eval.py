"""What ``lm-eval``'s local-completions model makes of a server (``contract_cases``)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.servers.contract_cases import ADAPTER, BASE, main

TASKS = Path(__file__).parent / "contract_tasks"


def evaluated(url: str, model: str) -> Any:
    """By task: each document's responses as the program read them, and its metrics."""
    asked = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": sys.argv[2],
        "tokenizer_backend": "huggingface",
        "max_retries": 1,
    }
    found = simple_evaluate(
        model="local-completions",
        model_args=asked,
        tasks=["jlorax_choices", "jlorax_rolling", "jlorax_words"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    responses = {
        task: [sample["filtered_resps"] for sample in samples]
        for task, samples in found["samples"].items()
    }
    return {"responses": responses, "results": found["results"]}


def base(url: str) -> Any:
    return evaluated(url, BASE)


def adapter(url: str) -> Any:
    return evaluated(url, ADAPTER)


if __name__ == "__main__":
    main(base, adapter)
