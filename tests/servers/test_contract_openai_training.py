"""The unmodified ``openai`` client makes an adapter and uses it (``contract``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_llama
from tests.servers.process import start_server
from tests.servers.test_fine_tuning import JSONL, LONG, SMALL

openai: Any = pytest.importorskip("openai")
pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny_llama.write_model(home / "model")
    (home / "root").mkdir()
    return home


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[Any]:
    server = start_server(
        home,
        *("--model", str(home / "model"), "--model-id", "tiny", "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "root"), "--max-seq-len", "64", "--max-batch", "4"),
        *("--buckets", "4"),
        env={"JAX_PLATFORMS": "cpu"},
    )
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    server.process.kill()
    server.process.wait()


def test_files(client: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(JSONL)
    file = client.files.create(file=data, purpose="fine-tune")
    assert (file.bytes, file.filename, file.purpose) == (len(JSONL), "rows.jsonl", "fine-tune")
    nameless = client.files.create(file=b'{"text": "w3"}\n', purpose="fine-tune")
    assert {one.id for one in client.files.list()} == {file.id, nameless.id}
    assert [one.id for one in client.files.list(limit=1, order="asc").data] != []
    assert client.files.retrieve(file.id).id == file.id
    assert client.files.content(file.id).read() == JSONL
    assert client.files.delete(nameless.id).deleted
    with pytest.raises(openai.NotFoundError, match=nameless.id):
        client.files.retrieve(nameless.id)
    with pytest.raises(openai.BadRequestError, match="'batch'"):
        client.files.create(file=data, purpose="batch")


def events_of(client: Any, job_id: str) -> list[Any]:
    """Of a job, until it has ended: the stream is ours, its events are OpenAI's."""
    path = f"/fine_tuning/jobs/{job_id}/events?stream=true"
    kind = openai.types.fine_tuning.FineTuningJobEvent
    return list(client.get(path, cast_to=kind, stream=True, stream_cls=openai.Stream[kind]))


def test_a_job_makes_an_adapter(client: Any) -> None:
    file = client.files.create(file=("rows.jsonl", JSONL), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="support",
        seed=3,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}},
        },
        metadata={"team": "a"},
        extra_body={"training": {k: v for k, v in SMALL.items() if k != "epochs"}},
    )
    assert (job.object, job.status, job.seed) == ("fine_tuning.job", "queued", 3)
    assert (job.method.supervised.hyperparameters.n_epochs, job.hyperparameters.n_epochs) == (1, 1)
    told = events_of(client, job.id)
    losses = [event.data["train_loss"] for event in told if event.type == "metrics"]
    assert len(losses) == 3
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "support/1", None)
    assert done.finished_at >= done.created_at and done.trained_tokens > 0
    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.id for event in listed] == [event.id for event in reversed(told)]
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    ask = client.completions.create
    texts = {
        ask(model=name, prompt="w3 w5", max_tokens=8, temperature=0).choices[0].text
        for name in ("tiny", "support/1")
    }
    assert len(texts) == 2


def test_what_is_wrong_is_told(client: Any) -> None:
    file = client.files.create(file=("rows.jsonl", JSONL + b"{\n"), purpose="fine-tune")
    create = client.fine_tuning.jobs.create
    with pytest.raises(openai.NotFoundError, match="file-none"):
        create(model="tiny", training_file="file-none")
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="gpt-4o-mini", training_file=file.id)
    assert caught.value.param == "model"
    job = create(model="tiny", training_file=file.id, extra_body={"training": SMALL})
    events_of(client, job.id)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error.code) == ("failed", "data_invalid")
    assert "row 13" in failed.error.message


def test_a_job_is_cancelled(client: Any) -> None:
    file = client.files.create(file=("rows.jsonl", JSONL), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="long", extra_body={"training": LONG}
    )
    with pytest.raises(openai.ConflictError, match="long"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="long")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="ended already"):
        client.fine_tuning.jobs.cancel(job.id)
    assert json.loads(client.fine_tuning.jobs.retrieve(job.id).to_json())["metrics"] == {}
