"""``jlorax train`` and the SDK: real processes on a tiny Llama."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jlorax
from jlorax.errors import ConfigError, RequestCancelled, TrainingFailed
from jlorax.training.events import StepDone, parse_event
from tests import tiny_llama

ROWS = [{"prompt": f"w{3 + i % 20} w5", "completion": f"w{9 + i % 7}"} for i in range(24)]
SETTINGS = {"rank": 4, "epochs": 2, "batch_size": 2, "max_seq_len": 32, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("commands")
    tiny_llama.write_model(home / "model")
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return home


def jlorax_command(home: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "servers.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "JAX_PLATFORMS": "cpu"},
    )


def train_words(home: Path, name: str) -> list[str]:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    where = ["--base", str(home / "model"), "--data", str(home / "data.jsonl")]
    return ["train", *where, "--output-root", str(home / "root"), "--name", name, *flags]


def test_the_command_begins_again_with_an_allocator_of_huge_pages() -> None:
    """glibc reads its tunables when a process starts."""
    code = (
        "import os; from servers import train; train.with_huge_pages(); "
        "print(os.environ['GLIBC_TUNABLES'])"
    )
    without = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code]
    for environment, expected in (
        (without, "glibc.malloc.hugetlb=1"),
        ({**without, "GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0"),
    ):
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == expected


def test_train_says_json_lines_and_continues_after_a_signal(home: Path) -> None:
    first = jlorax_command(home, *train_words(home, "small"), "--checkpoint-every-steps=1000")
    assert first.stdout is not None
    for line in first.stdout:
        if isinstance(parse_event(line), StepDone):
            first.send_signal(signal.SIGTERM)
            break
    out, err = first.communicate(timeout=120)
    assert first.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["event"] == "cancelled"
    second = jlorax_command(home, *train_words(home, "small"), "--checkpoint-every-steps=1000")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    began = next(line for line in lines if line["event"] == "began")
    assert began["step"] >= 1 and lines[-1]["adapter_id"] == "small/1"
    assert "--adapter-root" in out + err
    assert (home / "root" / "small" / "1" / "loss.png").is_file()


def test_wrong_flags_end_it_before_it_begins(home: Path) -> None:
    words = train_words(home, "other")
    done = jlorax_command(home, *words, "--rank=1000")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 2 and "rank is 1000; allowed are 1 to 256" in err


def test_the_sdk_makes_an_adapter_of_rows_in_memory(home: Path) -> None:
    job = jlorax.start_finetune(
        str(home / "model"),
        ROWS,
        name="sdk",
        output_root=str(home / "root"),
        cache_dir=home / "cache" / "jlorax",
        **SETTINGS,
    )
    adapter = job.result()
    assert str(adapter) == "sdk/1" and adapter.record["data"]["num_rows"] == len(ROWS)
    kinds = [event.kind for event in job.watch()]  # a watcher that comes late sees all
    assert kinds[-1] == "ended" and kinds.count("step") == adapter.metrics["steps"]
    assert job.metrics["loss"] == adapter.metrics["train_loss"]


@pytest.mark.slow
def test_the_sdk_says_what_went_wrong(home: Path, tmp_path: Path) -> None:
    given = {"output_root": str(tmp_path), "cache_dir": home / "cache" / "jlorax", **SETTINGS}
    base = str(home / "model")
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        jlorax.finetune(base, ROWS, rnak=3, **given)
    with pytest.raises(TrainingFailed, match="row 1 of the data has the columns 'q'") as failed:
        jlorax.finetune(base, [{"q": "w3"}], name="x", **given)
    assert failed.value.code == "data_invalid"
    job = jlorax.start_finetune(base, ROWS, name="y", **{**given, "epochs": 1000})
    next(event for event in job.watch() if isinstance(event, StepDone))
    job.cancel()
    with pytest.raises(RequestCancelled, match="cancelled after step"):
        job.result()
